"""An update on a GPU against the same update in plain transformers: tokens per second and peak memory.

    python benchmarks/cuda_trainer.py [--models smollm2-135m qwen2.5-0.5b] [--profile]

The two sides and the two batches are those of benchmarks/trainer.py: plain is a padded batch in bf16 with full
logits, log_softmax, and torch's fused AdamW on the bf16 weights (its moments are bf16; ours are fp32, with fp32 master
weights). Peak memory is what torch's allocator held at most during updates, less what the model alone takes.

On a machine without a GPU it reports that there is none.
"""

import argparse
import copy
import gc
import math
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from _cuda import gpu_roofline, make_model  # noqa: E402
from harness import Bar, report  # noqa: E402
from trainer import Sizes, flops, make_batch, run_ours  # noqa: E402

MODELS = ("smollm2-135m", "qwen2.5-0.5b")


def run_plain(model: Any, sizes: Sizes) -> Any:
    """Return one update in plain transformers, as a function."""
    import torch

    device = model.device
    tokens, advantages = make_batch(sizes, model.config.vocab_size)
    tokens = tokens.to(device)
    mask = torch.zeros(sizes.num_sequences, sizes.seq_len - 1, device=device)
    mask[:, sizes.prompt_len - 1 :] = 1.0
    weights = mask * torch.tensor(advantages, device=device)[:, None] / mask.sum()
    attention_mask = torch.ones_like(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

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


def measure(name: str, side: str, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Update a fresh model `args.updates` times."""
    import torch

    model = make_model(name, "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    update = run_ours(model, sizes, args) if side == "ours" else run_plain(model, sizes)
    seconds, norms = [], []
    for _ in range(args.updates):
        torch.cuda.synchronize()
        start = time.perf_counter()
        norms.append(update())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    config = model.config
    found = {
        "tokens_per_s": round(sizes.num_tokens / min(seconds[1:]), 1),
        "update_s": [round(value, 4) for value in seconds],
        "peak_increase_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
        "grad_norm_first": norms[0],
        "num_matmul_parameters": sum(p.numel() for p in model.parameters()),
        "attention_width": config.num_hidden_layers * config.hidden_size,
    }
    if args.profile and side == "ours":
        profile(update)
    return found


def profile(update: Any) -> None:
    """Print where an update spends its time on the device."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        update()
        torch.cuda.synchronize()
    rows = [each for each in trace.key_averages() if each.device_type.name == "CUDA"]
    print(f"kernels {sum(each.self_device_time_total for each in rows) / 1e3:.1f} ms", file=sys.stderr)
    for each in sorted(rows, key=lambda each: -each.self_device_time_total)[:18]:
        print(f"{each.self_device_time_total / 1e3:9.2f} ms {each.count:6d} x {each.key[:110]}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--updates", type=int, default=6, help="the first is a warm-up")
    parser.add_argument("--microbatch-tokens", type=int, default=16384)
    parser.add_argument("--chunk-tokens", type=int, default=4096)
    parser.add_argument("--profile", action="store_true", help="also print kernels by their time")
    return parser.parse_args()


def make_bars(figures: dict[str, Any]) -> list[Bar]:
    """Return every bar; its value is None where it was not measured."""
    bars = []
    for model in MODELS:
        ratios = figures.get(model, {}).get("ratios_distinct", {})
        bars.append(Bar(f"{model}: peak memory of an update", ratios.get("peak_memory"), 0.6, at_least=False))
        bars.append(Bar(f"{model}: tokens per second of an update", ratios.get("tokens_per_s"), 1.3))
    return bars


def main() -> None:
    """Measure what was asked for and report it."""
    import torch

    args = parse_arguments()
    if not torch.cuda.is_available():
        report({"note": "torch sees no GPU here"}, make_bars({}))
        return
    names = ("num_sequences", "seq_len", "prompt_len", "microbatch_tokens", "chunk_tokens")
    figures: dict[str, Any] = {"sizes": {name: getattr(args, name) for name in names}}
    roofline = figures["roofline"] = gpu_roofline()
    for name in args.models:
        figures[name] = {}
        for layout in ("distinct", "shared"):
            sizes = Sizes(args.num_sequences, args.seq_len, args.prompt_len, layout)
            sides = {}
            for side in ("plain", "ours"):
                try:
                    sides[side] = measure(name, side, sizes, copy.copy(args))
                except torch.OutOfMemoryError:
                    print(f"{name} {layout} {side}: out of memory", file=sys.stderr)
                    break
                found = sides[side]
                limit_s = flops(args, found) / (roofline["matmul_bf16_gflop_per_s"] * 1e9)
                found["times_flop_limit"] = round(min(found["update_s"][1:]) / limit_s, 2)
                print(name, layout, side, found, file=sys.stderr, flush=True)
            figures[name] |= {f"{side}_{layout}": found for side, found in sides.items()}
            if len(sides) < 2:
                continue
            plain, ours = sides["plain"], sides["ours"]
            if not math.isclose(plain["grad_norm_first"], ours["grad_norm_first"], rel_tol=0.05):
                raise SystemExit("the two sides did not compute the same gradient: the comparison means nothing")
            figures[name][f"ratios_{layout}"] = {
                "peak_memory": round(ours["peak_increase_mib"] / plain["peak_increase_mib"], 3),
                "tokens_per_s": round(ours["tokens_per_s"] / plain["tokens_per_s"], 2),
            }
    report(figures, make_bars(figures))


if __name__ == "__main__":
    main()
