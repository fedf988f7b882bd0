"""An update against the same update in plain transformers: tokens per second, peak memory, distance to the roofline.

    python benchmarks/trainer.py

Plain is AutoModelForCausalLM in bf16, a padded batch, full logits, log_softmax, and torch's AdamW on the bf16
weights (its moments are bf16, too; ours are fp32, with fp32 master weights). Each side runs in a process of
its own, on the same tokens. Peak memory is the highest resident size from before the optimizer exists to
after the last update, less the resident size with the model loaded.

Two batches: *distinct*, in which no two sequences share a prompt, so that nothing is gained by sharing (its
figures are what the bars hold), and *shared*, one group with one prompt.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from harness import Bar, best_of_rooflines, measure_roofline, report, run_peer  # noqa: E402

_PROC_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Sizes:
    num_sequences: int
    seq_len: int
    prompt_len: int
    layout: str

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.seq_len


def make_batch(sizes: Sizes, vocab_size: int):
    """Return prompts, completions and advantages, the same on both sides."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, vocab_size, (sizes.num_sequences, sizes.seq_len), generator=generator)
    if sizes.layout == "shared":
        tokens[:, : sizes.prompt_len] = tokens[0, : sizes.prompt_len]
    advantages = [1.0 if number % 2 == 0 else -1.0 for number in range(sizes.num_sequences)]
    return tokens, advantages


def run_ours(model, sizes: Sizes, args: argparse.Namespace):
    from swarm.config import TrainerConfig
    from swarm.trainer import Trainer
    from swarm.types import TrainingBatch, TrainingGroup

    tokens, advantages = make_batch(sizes, model.config.vocab_size)
    rows = [tuple(row) for row in tokens.tolist()]
    cut = sizes.prompt_len
    if sizes.layout == "shared":
        members = [list(range(sizes.num_sequences))]
    else:
        members = [[number] for number in range(sizes.num_sequences)]
    groups = [
        TrainingGroup(
            rows[chosen[0]][:cut],
            tuple(rows[number][cut:] for number in chosen),
            tuple(advantages[number] for number in chosen),
            (None,) * len(chosen),
        )
        for chosen in members
    ]
    config = TrainerConfig(
        learning_rate=1e-6,
        max_tokens_per_microbatch=args.microbatch_tokens,
        logprob_chunk_tokens=args.chunk_tokens,
    )
    trainer = Trainer(model, config)
    batch = TrainingBatch(tuple(groups))
    return lambda: trainer.update(batch).grad_norm


def run_plain(model, sizes: Sizes, args: argparse.Namespace):
    """Return one update in plain transformers, as a function, on the model's device."""
    import torch

    device = model.device
    tokens, advantages = make_batch(sizes, model.config.vocab_size)
    tokens = tokens.to(device)
    mask = torch.zeros(sizes.num_sequences, sizes.seq_len - 1, device=device)
    mask[:, sizes.prompt_len - 1 :] = 1.0
    weights = mask * torch.tensor(advantages, device=device)[:, None] / mask.sum()
    attention_mask = torch.ones_like(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=device.type == "cuda" or None)

    def update() -> float:
        logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, tokens[:, 1:, None])[..., 0]
        loss = -(logprobs * weights).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return update


def reset_peak() -> int:
    """Give freed memory back, set the peak to the present resident size where that is possible, and return it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    if _PROC_STATUS.exists():
        return next(int(line.split()[1]) * 1024 for line in _PROC_STATUS.open() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def worker(args: argparse.Namespace) -> None:
    """Load the model, update `args.updates` times, print what it took."""
    import torch

    from swarm.config import ModelConfig
    from swarm.policy import load_policy

    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = Sizes(args.num_sequences, args.seq_len, args.prompt_len, args.layout)
    model = load_policy(ModelConfig(name=args.model, dtype=args.dtype, device="cpu")).model
    before = reset_peak()
    update = (run_ours if args.worker == "ours" else run_plain)(model, sizes, args)
    seconds, norms = [], []
    for _ in range(args.updates):
        start = time.perf_counter()
        norms.append(update())
        seconds.append(time.perf_counter() - start)
    found = {"update_s": seconds, "grad_norm": norms[0], "peak_increase_bytes": peak_bytes() - before}
    config = model.config
    embeddings = model.get_input_embeddings().weight.numel()
    found["num_matmul_parameters"] = sum(p.numel() for p in model.parameters()) - (
        0 if config.tie_word_embeddings else embeddings
    )
    found["attention_width"] = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    print(json.dumps(found), flush=True)


def measure(args: argparse.Namespace, side: str, layout: str) -> dict:
    command = [sys.executable, __file__, "--worker", side, "--layout", layout]
    for name in ("model", "dtype", "num_sequences", "seq_len", "prompt_len", "updates", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--microbatch-tokens", str(args.microbatch_tokens), "--chunk-tokens", str(args.chunk_tokens)]
    print(f"{side}, {layout} prompts", file=sys.stderr, flush=True)
    return run_peer(command, time_limit_s=args.time_limit_s)


def flops(args: argparse.Namespace, found: dict) -> float:
    """Forward and backward: 6 per matmul parameter and token, and causal attention (half of the score square)."""
    tokens = args.num_sequences * args.seq_len
    return 6.0 * found["num_matmul_parameters"] * tokens + 6.0 * found["attention_width"] * args.seq_len * tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--num-sequences", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--updates", type=int, default=4, help="updates per process; the first is a warm-up")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--microbatch-tokens", type=int, default=1536)
    parser.add_argument("--chunk-tokens", type=int, default=1024)
    parser.add_argument("--no-shared", action="store_true", help="leave out the batch with one shared prompt")
    parser.add_argument("--time-limit-s", type=float, default=900.0, help="for each process")
    parser.add_argument("--worker", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--layout", choices=["distinct", "shared"], default="distinct", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.worker:
        worker(args)
        return
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    figures: dict = {
        "sizes": {name: getattr(args, name) for name in ("model", "num_sequences", "seq_len", "prompt_len")}
    }
    before = measure_roofline()
    measured = {
        layout: {side: measure(args, side, layout) for side in ("plain", "ours")}
        for layout in (["distinct"] if args.no_shared else ["distinct", "shared"])
    }
    roofline = figures["roofline"] = best_of_rooflines(before, measure_roofline())
    rate = roofline["matmul_bf16_gflop_per_s" if args.dtype == "bfloat16" else "matmul_fp32_gflop_per_s"]
    ratios = {}
    for layout, sides in measured.items():
        for side, found in sides.items():
            best = min(found["update_s"][1:] or found["update_s"])
            limit_s = flops(args, found) / (rate * 1e9)
            figures[f"{side}_{layout}"] = {
                "tokens_per_s": round(args.num_sequences * args.seq_len / best, 1),
                "update_s": [round(value, 3) for value in found["update_s"]],
                "peak_increase_mib": round(found["peak_increase_bytes"] / 2**20, 1),
                "grad_norm_first": found["grad_norm"],
                "flop_limit_s": round(limit_s, 3),
                "times_flop_limit": round(best / limit_s, 2),
            }
        plain, ours = figures[f"plain_{layout}"], figures[f"ours_{layout}"]
        if not math.isclose(plain["grad_norm_first"], ours["grad_norm_first"], rel_tol=0.05):
            raise SystemExit("the two sides did not compute the same gradient: the comparison means nothing")
        ratios[layout] = (
            ours["peak_increase_mib"] / plain["peak_increase_mib"],
            ours["tokens_per_s"] / plain["tokens_per_s"],
        )
    figures["ratios"] = {
        layout: {"peak_memory": round(memory, 3), "tokens_per_s": round(speed, 2)}
        for layout, (memory, speed) in ratios.items()
    }
    memory, speed = ratios["distinct"]
    report(
        figures,
        [
            Bar("peak memory of an update against plain transformers", round(memory, 3), 0.6, at_least=False),
            Bar("tokens per second of an update against plain transformers", round(speed, 2), 1.3),
        ],
    )


if __name__ == "__main__":
    main()
