"""What the parts of benchmarks/gpu.py share: models of known shapes, and what the device does at best.

Weights are random but for `tiny`: speed depends on shapes alone, and nothing has to be downloaded.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

from harness import REPOSITORY, measure_roofline

__all__ = ["MODELS", "free", "make_model", "roofline", "wait"]

MODELS = ("tiny", "smollm2-135m", "qwen2.5-0.5b")


def make_model(name: str, device: str) -> Any:
    """Return a model of this shape: tiny with its own weights in float32, the others at random in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    if name == "tiny":
        folder = REPOSITORY / "swarm" / "models" / "tiny"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    if name == "smollm2-135m":
        config: Any = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        )  # fmt: skip
    else:
        config = Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, rms_norm_eps=1e-6,
            tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def wait(device: str) -> None:
    """Return when the device has done what it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give back what the device holds of models that are gone."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _time_s(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the median time of one call on a GPU, after three calls to warm up."""
    for _ in range(3):
        work()
    wait("cuda")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait("cuda")
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def roofline(device: str) -> dict[str, float]:
    """Measure matmuls in GFLOP/s and memory in GB/s, on random numbers. On a GPU memory is copied, on a CPU read."""
    import torch

    if device != "cuda":
        found = measure_roofline(1.0)
        return {**found, "memory_gb_per_s": found["memory_read_gb_per_s"]}
    size, found = 8192, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        seconds = _time_s(lambda left=left, right=right: left @ right)
        found[f"matmul_{name}_gflop_per_s"] = round(2 * size**3 / seconds / 1e9, 1)
    source = torch.randn(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    found["memory_gb_per_s"] = round(2 * source.numel() * 2 / _time_s(lambda: target.copy_(source)) / 1e9, 1)
    return found
