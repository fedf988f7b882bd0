"""Tokens per second of our engine against transformers.generate, and the distance to the roofline.

The workloads are those of benchmarks/engine.py: *equal*, completions of one length by the number of requests, and
*mixed*, a few long completions and many short ones. Prompts are random tokens of one length, no two alike. Both
sides sample at temperature 1 and ignore EOS. transformers.generate takes a workload as one static batch with its
default cache and sdpa attention. Ours first does the whole workload twice, which records its graphs; `first_s` is the
first time, in which kernels are loaded. Both sides warm up with completions of four tokens; a figure is the best of
the repeats after that.
"""

import argparse
import copy
import sys
import time
from typing import Any

from _gpu import MODELS, free, make_model, wait
from engine import Shape, Workload, check_lengths, limits
from harness import Bar

__all__ = ["engine_part", "make_workload"]

GENERATE = "transformers.generate"
MIXED = (16, 16, 16, 16, 32, 32, 64, 256)


class Sides:
    """One model on both engines. Each side takes a workload and a seed and returns the seconds that it took."""

    def __init__(self, model: Any, max_seq_len: int, max_slots: int, record_graphs: bool = True) -> None:
        from swarm.config import EngineConfig
        from swarm.engine.torch import TorchEngine

        self.model = model
        self.engine = TorchEngine(
            model, eos_token_ids=(), config=EngineConfig(max_slots=max_slots), max_seq_len=max_seq_len,
            record_graphs=record_graphs,
        )  # fmt: skip
        settings = copy.deepcopy(model.generation_config)
        settings.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0)
        settings.max_length = None
        model.generation_config = settings

    def ours(self, workload: Workload, seed: int) -> float:
        from swarm.engine.base import Request, SamplingParams

        requests = [
            Request(index, prompt, seed * 1_000_003 + index, SamplingParams(length, ignore_eos=True))
            for index, (prompt, length) in enumerate(zip(workload.prompts, workload.lengths, strict=True))
        ]
        wait(self.model.device.type)
        start = time.perf_counter()
        completions = self.engine.generate(requests)
        seconds = time.perf_counter() - start
        check_lengths([len(completion.token_ids) for completion in completions], workload.lengths)
        return seconds

    def generate(self, workload: Workload, seed: int) -> float:
        import torch

        torch.manual_seed(seed)
        longest = max(workload.lengths)
        wait(self.model.device.type)
        start = time.perf_counter()
        tokens = torch.tensor(workload.prompts, device=self.model.device)  # [num_requests, prompt_len]
        out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=longest)
        rows = out.tolist()
        seconds = time.perf_counter() - start
        check_lengths([len(row) - workload.prompt_len for row in rows], [longest] * len(workload.lengths))
        return seconds


def make_workload(vocab_size: int, num_requests: int, prompt_len: int, lengths: tuple[int, ...]) -> Workload:
    import torch

    generator = torch.Generator().manual_seed(num_requests)
    prompts = torch.randint(vocab_size, (num_requests, prompt_len), generator=generator).tolist()
    return Workload(tuple(map(tuple, prompts)), tuple(lengths[i % len(lengths)] for i in range(num_requests)))


def measure(sides: Sides, workload: Workload, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Time both sides on one workload."""
    figure: dict[str, Any] = {"num_requests": len(workload.lengths), "prompt_len": workload.prompt_len}
    figure |= {"num_tokens": workload.num_tokens, "longest": max(workload.lengths)}
    runs = {"ours": sides.ours} | ({} if args.skip_peers else {GENERATE: sides.generate})
    warm_up = Workload(workload.prompts, (4,) * len(workload.lengths))
    figure["first_s"] = round(runs["ours"](workload, 100), 3)
    runs["ours"](workload, 101)
    for run in runs.values():
        run(warm_up, 102)
    seconds = {side: min(run(workload, seed) for seed in range(args.repeats)) for side, run in runs.items()}
    figure["tokens_per_s"] = {side: round(workload.num_tokens / each, 1) for side, each in seconds.items()}
    figure["times_as_fast_as"] = {side: round(seconds[side] / seconds["ours"], 2) for side in runs if side != "ours"}
    print(name, figure["tokens_per_s"], figure["first_s"], figure["times_as_fast_as"], file=sys.stderr, flush=True)
    return figure


def add_limits(figure: dict[str, Any], workload: Workload, shape: Shape, roofline: dict[str, float]) -> None:
    """Put the roofline beside a figure: of decode steps alone, where the time holds prefill too."""
    rate = roofline[f"matmul_{'bf16' if shape.bytes_per_value == 2 else 'fp32'}_gflop_per_s"]
    limit = limits(shape, workload, roofline["memory_gb_per_s"], rate)
    num_steps = max(workload.lengths) - 1
    seconds = workload.num_tokens / figure["tokens_per_s"]["ours"]
    figure["roofline"] = {
        "limit_ms_per_step": round(limit["seconds"] / num_steps * 1e3, 4),
        "ours_ms_per_step": round(seconds / num_steps * 1e3, 4),
        "share_reached": round(limit["seconds"] / seconds, 3),
    }


def profile(sides: Sides, workload: Workload, title: str) -> None:
    """Print where a whole run and where decode steps spend their time on the device."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from swarm.engine.base import Request, SamplingParams

    longest = max(workload.lengths)
    requests = [
        Request(i, prompt, i, SamplingParams(longest, ignore_eos=True)) for i, prompt in enumerate(workload.prompts)
    ]
    sides.engine.submit(requests)
    start = time.perf_counter()
    sides.engine.step()
    torch.cuda.synchronize()
    print(f"\n== {title}: first step with prefill {1e3 * (time.perf_counter() - start):.2f} ms", file=sys.stderr)
    for _ in range(5):
        sides.engine.step()
    num = 10
    start = time.perf_counter()
    for _ in range(num):
        sides.engine.step()
    wall = (time.perf_counter() - start) / num
    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(num):
            sides.engine.step()
        torch.cuda.synchronize()
    events = [each for each in trace.key_averages() if each.self_device_time_total > 0]
    total = sum(each.self_device_time_total for each in events if each.device_type.name == "CUDA") / num
    print(f"wall {1e3 * wall:.3f} ms a step, kernels {total / 1e3:.3f} ms", file=sys.stderr)
    rows = [each for each in events if each.device_type.name == "CUDA"]
    for each in sorted(rows, key=lambda each: -each.self_device_time_total)[:16]:
        print(
            f"{each.self_device_time_total / num:9.1f} us {each.count / num:6.1f} x {each.key[:100]}", file=sys.stderr
        )
    sides.engine.abort()


def make_bars(figures: dict[str, Any]) -> list[Bar]:
    """Return every bar; its value is None where it was not measured."""

    def ratio(model: str, workload: str) -> float | None:
        return figures.get(model, {}).get(workload, {}).get("times_as_fast_as", {}).get(GENERATE)

    targets = {"mixed": 5.0, "equal_1": 3.0, "equal_32": 4.0}
    return [
        Bar(f"{model}, {workload}, against {GENERATE}", ratio(model, workload), target)
        for model in MODELS
        for workload, target in targets.items()
    ]


def engine_part(args: argparse.Namespace, roofline: dict[str, float]) -> tuple[dict[str, Any], list[Bar]]:
    """Measure the models and batches that were asked for."""
    figures: dict[str, Any] = {"statistic": "best of the repeats", "temperature": 1.0}
    for name in args.models:
        model = make_model(name, args.device)
        vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
        tokens = min(args.tokens, limit - args.prompt_len)
        mixed = tuple(min(length, limit - args.prompt_len) for length in MIXED)
        workloads = {f"equal_{n}": make_workload(vocab, n, args.prompt_len, (tokens,)) for n in args.batches}
        workloads["mixed"] = make_workload(vocab, args.num_mixed, args.prompt_len, mixed)
        sides = Sides(model, args.prompt_len + max(tokens, *mixed), max(args.batches))
        figures[name] = {"dtype": str(model.dtype).removeprefix("torch."), "max_slots": max(args.batches)}
        for key, workload in workloads.items():
            figure = figures[name][key] = measure(sides, workload, args, f"{name} {key}")
            add_limits(figure, workload, Shape.of(model), roofline)
        if sides.engine._slot_pass is not None:
            figures[name]["num_graphs"] = sides.engine._slot_pass.num_graphs
        if args.profile and args.device == "cuda":
            for n in (8, max(args.batches)):
                profile(sides, make_workload(vocab, n, args.prompt_len, (tokens,)), f"{name}, {n} requests")
        sides.engine.close()
        del sides, model
        free(args.device)
    return figures, make_bars(figures)
