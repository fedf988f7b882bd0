"""An update against the same update in plain transformers: tokens per second and peak memory.

The two sides and the two batches are those of benchmarks/trainer.py: plain is a padded batch in bf16 with full
logits, log_softmax, and torch's fused AdamW on the bf16 weights (its moments are bf16; ours are fp32, with fp32 master
weights). Peak memory is what torch's allocator held at most during updates, less what the model alone takes; on a CPU
it is not measured here.
"""

import argparse
import copy
import math
import sys
import time
from typing import Any

from _gpu import free, make_model, wait
from harness import Bar
from trainer import Sizes, flops, run_ours, run_plain

__all__ = ["trainer_part"]

MODELS = ("smollm2-135m", "qwen2.5-0.5b")


def measure(name: str, side: str, sizes: Sizes, args: argparse.Namespace) -> dict[str, Any]:
    """Update a fresh model `args.updates` times."""
    import torch

    model, on_gpu = make_model(name, args.device), args.device == "cuda"
    free(args.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    update = run_ours(model, sizes, args) if side == "ours" else run_plain(model, sizes, args)
    seconds, norms = [], []
    for _ in range(args.updates):
        wait(args.device)
        start = time.perf_counter()
        norms.append(update())
        wait(args.device)
        seconds.append(time.perf_counter() - start)
    config = model.config
    found = {
        "tokens_per_s": round(sizes.num_tokens / min(seconds[1:]), 1),
        "update_s": [round(value, 4) for value in seconds],
        "peak_increase_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1) if on_gpu else None,
        "grad_norm_first": norms[0],
        "num_matmul_parameters": sum(p.numel() for p in model.parameters()),
        "attention_width": config.num_hidden_layers * config.hidden_size,
    }
    if args.profile and on_gpu and side == "ours":
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


def make_bars(figures: dict[str, Any]) -> list[Bar]:
    """Return every bar; its value is None where it was not measured."""
    bars = []
    for model in MODELS:
        ratios = figures.get(model, {}).get("ratios_distinct", {})
        bars.append(Bar(f"{model}: peak memory of an update", ratios.get("peak_memory"), 0.6, at_least=False))
        bars.append(Bar(f"{model}: tokens per second of an update", ratios.get("tokens_per_s"), 1.3))
    return bars


def trainer_part(args: argparse.Namespace, roofline: dict[str, float]) -> tuple[dict[str, Any], list[Bar]]:
    """Measure the models that were asked for; `tiny` is no model to measure an update on."""
    import torch

    names = ("num_sequences", "seq_len", "update_prompt_len", "microbatch_tokens", "chunk_tokens")
    figures: dict[str, Any] = {"sizes": {name: getattr(args, name) for name in names}}
    for name in (each for each in args.models if each in MODELS):
        figures[name] = {}
        for layout in ("distinct", "shared"):
            sizes = Sizes(args.num_sequences, args.seq_len, args.update_prompt_len, layout)
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
            if len(sides) == 2:
                figures[name][f"ratios_{layout}"] = _ratios(**sides)
    return figures, make_bars(figures)


def _ratios(plain: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    if not math.isclose(plain["grad_norm_first"], ours["grad_norm_first"], rel_tol=0.05):
        raise SystemExit("the two sides did not compute the same gradient: the comparison means nothing")
    peaks = ours["peak_increase_mib"], plain["peak_increase_mib"]
    return {
        "peak_memory": round(peaks[0] / peaks[1], 3) if None not in peaks else None,
        "tokens_per_s": round(ours["tokens_per_s"] / plain["tokens_per_s"], 2),
    }
