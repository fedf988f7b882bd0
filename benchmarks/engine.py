"""Tokens per second of our engine against vLLM, transformers and OpenVINO GenAI, and the distance to the roofline.

    python benchmarks/engine.py [--models tiny smollm2-135m] [--engines torch,vllm,transformers,openvino]
                                [--openvino-env FOLDER] [--smoke]

All sides get the same weights and the same requests: prompts of one length, no two alike as far as 100 sums of
two digits go, sampled at temperature 1, EOS ignored, so that each completion has exactly its length (cut where
the model takes no longer sequence). Only tokens that a request asked for count. Two workloads:

- *mixed*: a few long completions, many short ones: 32 on every model, other numbers on smollm2-135m in bf16.
  transformers.generate takes them as one static batch, which runs until the longest is done. transformers' continuous
  batching (sdpa, a limit for each request) is timed at 32 requests, from the first one added to the last result,
  without making its cache.
- *equal*: completions of one length on smollm2-135m in bf16, by the number of requests.

vLLM is the vLLM engine of this project, where one is installed that runs here: what a node gets that uses it.
OpenVINO GenAI runs in an environment of its own, with `../shared/peers/openvino_engine.py`, which asks one
prompt many times; it is left out where either is missing. It reads the same GGUF file and keeps its 4-bit weights.

After a warm-up the sides take turns, each repeat with other seeds. A figure is the best of the repeats. The limit
is the time that the decode steps of a workload take at least: for each step the longer of its bytes (weights
once, KV cache of all running requests, fp32 logits) at the measured read bandwidth and its FLOPs at the measured
matmul rate. Prefill is not in the limit, and it is in the time.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from harness import (  # noqa: E402
    Bar,
    PeerError,
    best_of_rooflines,
    measure_roofline,
    peer_python,
    report,
    run_peer,
)

__all__ = ["Shape", "Workload", "limits"]

DTYPES = {"tiny": "float32", "smollm2-135m": "bfloat16"}
REAL_MODEL = "smollm2-135m"
OPENVINO_SCRIPT = REPOSITORY.parent / "shared" / "peers" / "openvino_engine.py"
OPENVINO_NOTE = "4-bit weights of the same GGUF file, against our bf16; cannot take new weights without a reload"
PEER_TIME_LIMIT_S = 300.0
GENERATE, CONTINUOUS, OPENVINO = "transformers.generate", "transformers continuous batching", "OpenVINO GenAI"
VLLM = "vLLM"
ENGINES = ("torch", "vllm", "transformers", "openvino")
MANY = 32  # requests of mixed lengths on every model


@dataclass(frozen=True)
class Workload:
    """Requests by their prompts, all of one length, and by how many tokens each wants."""

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def prompt_len(self) -> int:
        return len(self.prompts[0])


@dataclass(frozen=True)
class Shape:
    """What the cost of a decode step depends on."""

    num_matmul_parameters: int  # all that a step multiplies with, the LM head among them
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    bytes_per_value: int  # of weights and KV cache

    @classmethod
    def of(cls, model: Any) -> "Shape":
        config = model.config
        embeddings = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        return cls(
            sum(p.numel() for p in model.parameters() if p.ndim == 2) - embeddings,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            model.dtype.itemsize,
        )

    def step_bytes(self, num_requests: int, num_cached_tokens: int) -> int:
        """What one decode step moves at least: weights and keys and values read, logits written."""
        cached = 2 * self.num_layers * self.num_kv_heads * self.head_dim * num_cached_tokens
        return (self.num_matmul_parameters + cached) * self.bytes_per_value + 4 * self.vocab_size * num_requests

    def step_flops(self, num_requests: int, num_cached_tokens: int) -> int:
        """What one decode step computes: every weight for each request, scores and their weighted values."""
        attention = 4 * self.num_layers * self.num_heads * self.head_dim * num_cached_tokens
        return 2 * self.num_matmul_parameters * num_requests + attention


def limits(shape: Shape, workload: Workload, gb_per_s: float, gflop_per_s: float) -> dict[str, float]:
    """Return bytes, FLOPs and least seconds of all decode steps of a workload whose requests start together."""
    num_bytes = num_flops = 0
    seconds = 0.0
    for written in range(1, max(workload.lengths)):  # the first token is drawn from the prefill
        running = sum(length > written for length in workload.lengths)
        cached = running * (workload.prompt_len + written)
        step_bytes, step_flops = shape.step_bytes(running, cached), shape.step_flops(running, cached)
        num_bytes, num_flops = num_bytes + step_bytes, num_flops + step_flops
        seconds += max(step_bytes / (gb_per_s * 1e9), step_flops / (gflop_per_s * 1e9))
    return {"bytes": num_bytes, "flops": num_flops, "seconds": seconds}


class Sides:
    """One model on every engine. Each side takes a workload and a seed and returns the seconds that it took."""

    def __init__(self, policy: Any, max_seq_len: int, max_slots: int, *, with_vllm: bool) -> None:
        from swarm.config import EngineConfig
        from swarm.engine.torch import TorchEngine
        from swarm.engine.vllm import VllmEngine

        self.policy = policy
        self.model = policy.model
        self._engine, self._vllm = (
            kind(
                policy.model,
                eos_token_ids=policy.eos_token_ids,
                config=EngineConfig(max_slots=max_slots),
                max_seq_len=max_seq_len,
            )
            if is_wanted
            else None
            for kind, is_wanted in ((TorchEngine, True), (VllmEngine, with_vllm))
        )
        settings = copy.deepcopy(policy.model.generation_config)
        settings.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
        settings.max_length = None
        policy.model.generation_config = settings  # generate() would fill an EOS that is None from the model's own

    def close(self) -> None:
        self._engine.close()
        if self._vllm is not None:
            self._vllm.close()

    def ours(self, workload: Workload, seed: int) -> float:
        return self._generate(self._engine, workload, seed)

    def vllm(self, workload: Workload, seed: int) -> float:
        return self._generate(self._vllm, workload, seed)

    def _generate(self, engine: Any, workload: Workload, seed: int) -> float:
        from swarm.engine.base import Request, SamplingParams

        requests = [
            Request(index, prompt, seed * 1_000_003 + index, SamplingParams(length, ignore_eos=True))
            for index, (prompt, length) in enumerate(zip(workload.prompts, workload.lengths, strict=True))
        ]
        start = time.perf_counter()
        completions = engine.generate(requests)
        seconds = time.perf_counter() - start
        check_lengths([len(completion.token_ids) for completion in completions], workload.lengths)
        return seconds

    def generate(self, workload: Workload, seed: int) -> float:
        import torch

        torch.manual_seed(seed)
        tokens = torch.tensor(workload.prompts)  # [num_requests, prompt_len]
        longest = max(workload.lengths)
        start = time.perf_counter()
        out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=longest)
        seconds = time.perf_counter() - start
        check_lengths([row.numel() - workload.prompt_len for row in out], [longest] * len(workload.lengths))
        return seconds

    def continuous(self, workload: Workload, seed: int) -> float:
        from transformers import ContinuousBatchingConfig

        settings = copy.deepcopy(self.model.generation_config)
        settings.eos_token_id = -1  # none
        page_size = 256
        num_pages = sum(-(-(workload.prompt_len + length) // page_size) for length in workload.lengths)
        config = ContinuousBatchingConfig(
            page_size=page_size,
            num_blocks=2 * num_pages + 8,  # room for all requests at once, and no more: the default is most of the RAM
            max_batch_tokens=max(1024, workload.prompt_len * len(workload.prompts)),
            max_requests_per_batch=len(workload.prompts),
            seed=seed,
        )
        with self.model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config, warmup=True
        ) as manager:
            self._drain(manager, Workload(workload.prompts[:1], (2,)), "warm")
            start = time.perf_counter()
            lengths = self._drain(manager, workload, "timed")
            seconds = time.perf_counter() - start
        check_lengths(lengths, workload.lengths)
        return seconds

    def _drain(self, manager: Any, workload: Workload, name: str) -> list[int]:
        """Add the requests and wait for all of them; return how many tokens each has."""
        for index, (prompt, length) in enumerate(zip(workload.prompts, workload.lengths, strict=True)):
            manager.add_request(list(prompt), request_id=f"{name}-{index}", max_new_tokens=length)
        done: dict[str, int] = {}
        while len(done) < len(workload.prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped before its requests were done")
            if result is not None and result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed: {result.error}")
            if result is not None and result.is_finished():
                done[result.request_id] = len(result.generated_tokens)
        return [done[f"{name}-{index}"] for index in range(len(workload.prompts))]


def check_lengths(found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise RuntimeError where a side did other work than it was asked for: its time would mean nothing."""
    if list(found) != list(wanted):
        raise RuntimeError(f"completions of {list(found)} tokens, not {list(wanted)}")


def make_workload(policy: Any, num_requests: int, lengths: Sequence[int]) -> Workload:
    """Return requests with prompts of one length; completions are cut to what the model's positions allow."""
    prompts = []
    for index in range(num_requests):
        first, second = divmod(index % 100, 10)
        if policy.name != REAL_MODEL:
            prompts.append(policy.encode_prompt(f"{first} + {second} ="))
        else:  # the text of the peer's script, without the system prompt that the template would add
            text = f"<|im_start|>user\nWhat is {first} + {second}? Answer with just the number.<|im_end|>\n"
            ids = policy.tokenizer(text + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
            prompts.append(tuple(ids))
    if len({len(prompt) for prompt in prompts}) != 1:
        raise RuntimeError("the prompts differ in length: padding would burden transformers.generate")
    room = policy.model.config.max_position_embeddings - len(prompts[0])
    turns = tuple(min(lengths[index % len(lengths)], room) for index in range(num_requests))
    return Workload(tuple(prompts), turns)


def openvino_side(folder: Path) -> Callable[[Workload, int], float] | None:
    """Return OpenVINO as a side, or None where its environment or its script is missing. It has its own seeds."""
    from swarm.models.presets import builtin_path

    python = peer_python(folder)
    if python is None or not OPENVINO_SCRIPT.exists():
        return None
    gguf = builtin_path(REAL_MODEL)

    def run(workload: Workload, seed: int) -> float:
        command = [python, OPENVINO_SCRIPT, gguf, "--lengths", ",".join(map(str, workload.lengths))]
        num_requests = len(workload.lengths)
        answer = run_peer([*command, f"--requests={num_requests}"], time_limit_s=PEER_TIME_LIMIT_S)
        return workload.num_tokens / float(answer["tokens_per_s"][str(num_requests)])

    return run


def take_turns(
    name: str, sides: dict[str, Callable[[Workload, int], float]], workload: Workload, repeats: int
) -> dict[str, Any]:
    """Time every side `repeats` times in turn. Returns tokens per second: the best of each side, and all of them."""
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    for repeat in range(1, repeats + 1):
        for side, run in sides.items():
            speeds[side].append(workload.num_tokens / run(workload, repeat))
            print(f"{name}: {side}: {speeds[side][-1]:.1f} tokens/s", file=sys.stderr, flush=True)
    best = {side: max(values) for side, values in speeds.items()}
    return {
        "num_requests": len(workload.lengths),
        "prompt_len": workload.prompt_len,
        "num_tokens": workload.num_tokens,
        "longest": max(workload.lengths),
        "tokens_per_s": {side: round(speed, 1) for side, speed in best.items()},
        "tokens_per_s_of_every_repeat": {side: [round(v, 1) for v in values] for side, values in speeds.items()},
        "times_as_fast_as": {side: round(best["ours"] / best[side], 2) for side in sides if side != "ours"},
    }


def measure_model(name: str, args: argparse.Namespace, openvino: Any) -> tuple[dict[str, Any], list[Any]]:
    """Run the workloads of one model. Returns its figures, and (figure, workload, shape) for the roofline."""
    from swarm.config import ModelConfig
    from swarm.policy import load_policy

    policy = load_policy(ModelConfig(name=name, dtype=DTYPES[name], device="cpu"))
    is_real = name == REAL_MODEL
    mixed = {n: make_workload(policy, n, args.lengths) for n in (args.mixed if is_real else [MANY])}
    equal = {n: make_workload(policy, n, [args.tokens]) for n in (args.batches if is_real else [])}
    workloads = [*mixed.values(), *equal.values()]
    max_seq_len = max(w.prompt_len + max(w.lengths) for w in workloads)
    sides = Sides(policy, max_seq_len, max(len(w.lengths) for w in workloads), with_vllm="vllm" in args.engines)
    shape, figures, limited = Shape.of(policy.model), {"dtype": DTYPES[name]}, []
    try:
        everyone: dict[str, Any] = {"ours": sides.ours}
        if "vllm" in args.engines:
            everyone[VLLM] = sides.vllm
        if "transformers" in args.engines:
            everyone |= {GENERATE: sides.generate, CONTINUOUS: sides.continuous}
        runs = [(f"mixed_{n}", work, args.mixed_repeats if is_real else args.repeats) for n, work in mixed.items()]
        runs += [(f"equal_{n}", work, args.repeats) for n, work in equal.items()]
        for key, workload, repeats in runs:
            racing = {side: run for side, run in everyone.items() if side != CONTINUOUS or key == f"mixed_{MANY}"}
            for run in racing.values():
                run(make_workload(policy, len(workload.lengths), [4]), 0)
            if is_real and openvino is not None:
                racing[OPENVINO] = openvino  # its script warms up by itself
            figures[key] = take_turns(f"{name} {key}", racing, workload, repeats)
            limited.append((figures[key], workload, shape))
    finally:
        sides.close()
    return figures, limited


def add_limits(figure: dict[str, Any], workload: Workload, shape: Shape, roofline: dict[str, float]) -> None:
    """Put the roofline beside a figure."""
    rate = roofline[f"matmul_{'bf16' if shape.bytes_per_value == 2 else 'fp32'}_gflop_per_s"]
    limit = limits(shape, workload, roofline["memory_read_gb_per_s"], rate)
    num_steps = max(workload.lengths) - 1
    seconds = workload.num_tokens / figure["tokens_per_s"]["ours"]
    figure["roofline"] = {
        "mib_per_step": round(limit["bytes"] / num_steps / 2**20, 2),
        "gflop_per_step": round(limit["flops"] / num_steps / 1e9, 3),
        "limit_ms_per_step": round(limit["seconds"] / num_steps * 1e3, 3),
        "ours_ms_per_step": round(seconds / num_steps * 1e3, 3),
        "share_reached": round(limit["seconds"] / seconds, 3),
    }


def make_bars(figures: dict[str, Any]) -> list[Bar]:
    """Return every bar that was asked for; its value is None where it was not measured."""

    def ratio(model: str, workload: str, side: str) -> float | None:
        return figures.get(model, {}).get(workload, {}).get("times_as_fast_as", {}).get(side)

    bars = []
    for side, target in ((GENERATE, 5.0), (CONTINUOUS, 1.5)):
        for model in DTYPES:
            bars.append(Bar(f"{model}, mixed lengths, against {side}", ratio(model, f"mixed_{MANY}", side), target))
    for kind in ("equal", "mixed"):
        for num_requests in (32, 64):
            generate, vllm = (ratio(REAL_MODEL, f"{kind}_{num_requests}", side) for side in (GENERATE, VLLM))
            value = None if generate is None or vllm is None else round(generate / vllm, 2)
            bars.append(Bar(f"{REAL_MODEL}, {num_requests} of {kind} length, vLLM against {GENERATE}", value, 1.5))
        for num_requests in (1, 8, 32, 64) if kind == "equal" else (8, 32, 64):
            value = ratio(REAL_MODEL, f"{kind}_{num_requests}", VLLM)
            bars.append(Bar(f"{REAL_MODEL}, {num_requests} of {kind} length, against {VLLM}", value, 1.5))
    for side, targets in ((GENERATE, {1: 3.0, 32: 4.0}), (OPENVINO, {1: 0.8, 8: 0.8, 32: 0.8, 64: 0.8})):
        for num_requests, target in targets.items():
            value = ratio(REAL_MODEL, f"equal_{num_requests}", side)
            bars.append(Bar(f"{REAL_MODEL}, {num_requests} of equal length, against {side}", value, target))
    return bars


def parse_arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        found = [int(part) for part in text.split(",")]
        if min(found) < 1:
            raise ValueError
        return found

    def at_least_two(text: str) -> list[int]:
        if min(found := numbers(text)) < 2:
            raise ValueError
        return found

    def engines(text: str) -> list[str]:
        if not set(found := text.split(",")) <= set(ENGINES) or "torch" not in found:
            raise ValueError
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--engines", type=engines, help="some of " + ",".join(ENGINES) + "; default: all that are here")
    parser.add_argument("--openvino-env", type=Path, default=REPOSITORY.parent / "openvino-env")
    parser.add_argument("--mixed", type=numbers, default=[8, MANY, 64], help="numbers of requests of mixed lengths")
    parser.add_argument("--lengths", type=at_least_two, default=[16, 16, 16, 16, 32, 32, 64, 256])
    parser.add_argument("--tokens", type=int, default=64, help="of each request of equal length")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 64], help="numbers of requests of equal length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixed-repeats", type=int, default=2, help=f"of mixed lengths on {REAL_MODEL}")
    parser.add_argument("--smoke", action="store_true", help="sizes that show only that it works")
    args = parser.parse_args()
    if args.smoke:
        args.mixed, args.lengths, args.tokens, args.batches = [4], [4, 4, 8, 16], 4, [1, 2]
        args.repeats = args.mixed_repeats = 1
    if min(args.repeats, args.mixed_repeats) < 1 or args.tokens < 2:
        parser.error("repeats must be at least 1, --tokens at least 2")
    return args


def no_vllm() -> str | None:
    """Return why vLLM cannot run on this machine's CPU; None where it can."""
    import torch

    from swarm.devices import look_at
    from swarm.engine.vllm.installed import find_vllm, why_not

    return why_not(find_vllm(), look_at(torch.device("cpu")))


def main() -> None:
    """Measure what was asked for and report it."""
    args = parse_arguments()
    args.engines = args.engines or [name for name in ENGINES if name != "vllm" or no_vllm() is None]
    if "vllm" in args.engines and (problem := no_vllm()) is not None:
        raise SystemExit(f"error: {problem}")
    openvino = openvino_side(args.openvino_env) if "openvino" in args.engines else None
    figures: dict[str, Any] = {"statistic": "best of the repeats", "temperature": 1.0}
    figures["openvino_note"] = OPENVINO_NOTE
    if openvino is None:
        figures["openvino_note"] = "left out: skipped, or its environment or script is missing"
        print("OpenVINO GenAI is not here: left out", file=sys.stderr)
    before = measure_roofline()
    limited = []
    try:
        for name in args.models:
            figures[name], found = measure_model(name, args, openvino)
            limited += found
    except PeerError as error:
        raise SystemExit(f"error: a peer failed: {error}") from error
    roofline = figures["roofline"] = best_of_rooflines(before, measure_roofline())
    for figure, workload, shape in limited:
        add_limits(figure, workload, shape, roofline)
    report(figures, make_bars(figures))


if __name__ == "__main__":
    main()
