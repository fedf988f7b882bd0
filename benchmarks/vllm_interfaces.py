"""vLLM's two interfaces side by side: `LLMEngine`, stepped from outside, and `AsyncLLM`, which steps by itself.

    python benchmarks/vllm_interfaces.py [--model smollm2-135m] [--batches 1,8,32] [--tokens 64]

Both with vLLM's own sampler and the same settings, each in a process of its own, one after the other: seconds until
the first token of the first request (start-up), tokens per second, the memory of all their processes, and how long an
abort of everything takes until its partial outputs are there. What swarm/engine/vllm does beside this is left out.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import Bar, report

_WAYS = ("LLMEngine", "AsyncLLM")
_PROMPT_LEN = 24
_ABORTED_TOKENS = 4096 - 64
_TIME_LIMIT_S = 600.0


def _arguments(folder: str, max_slots: int) -> dict[str, Any]:
    """Return what both are started with: what swarm/engine/vllm starts vLLM with on a CPU, without its extensions."""
    return {
        "model": folder, "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True,
        "max_num_seqs": max_slots, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": 2 << 30,
        "enable_prefix_caching": True, "async_scheduling": False, "disable_log_stats": True,
        "generation_config": "vllm",
    }  # fmt: skip


def _sampling(index: int, num_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0, max_tokens=num_tokens, ignore_eos=True, seed=index, logprobs=0, detokenize=False
    )


def _prompt(index: int) -> Any:
    return {"prompt_token_ids": [(7 * index + place) % 4000 + 20 for place in range(_PROMPT_LEN)]}


def _memory_mib() -> int:
    """Return the proportional memory of this process and its children."""
    own = psutil.Process()
    return sum(one.memory_full_info().pss for one in (own, *own.children(recursive=True))) >> 20


class _Stepped:
    """`LLMEngine`, whose core runs in this process."""

    def __init__(self, folder: str, max_slots: int) -> None:
        from vllm import EngineArgs, LLMEngine

        self._engine = LLMEngine.from_engine_args(EngineArgs(**_arguments(folder, max_slots)))

    async def run(self, batch: int, num_tokens: int) -> int:
        for index in range(batch):
            self._engine.add_request(str(index), _prompt(index), _sampling(index, num_tokens))
        written = 0
        while self._engine.has_unfinished_requests():
            written += sum(len(one.outputs[0].token_ids) for one in self._engine.step() if one.finished)
        return written

    async def abort(self, batch: int) -> float:
        for index in range(batch):
            self._engine.add_request(f"long{index}", _prompt(index), _sampling(index, _ABORTED_TOKENS))
        for _ in range(20):
            self._engine.step()
        begin = time.perf_counter()
        self._engine.abort_request([f"long{index}" for index in range(batch)])
        return time.perf_counter() - begin


class _Alone:
    """`AsyncLLM`, whose core runs in a process of its own."""

    def __init__(self, folder: str, max_slots: int) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**_arguments(folder, max_slots)))

    async def _one(self, name: str, index: int, num_tokens: int) -> int:
        written = 0
        async for one in self._engine.generate(_prompt(index), _sampling(index, num_tokens), name):
            written = len(one.outputs[0].token_ids)
        return written

    async def run(self, batch: int, num_tokens: int) -> int:
        return sum(await asyncio.gather(*(self._one(str(index), index, num_tokens) for index in range(batch))))

    async def abort(self, batch: int) -> float:
        names = [f"long{index}" for index in range(batch)]
        tasks = [asyncio.create_task(self._one(name, at, _ABORTED_TOKENS)) for at, name in enumerate(names)]
        await asyncio.sleep(1.0)
        begin = time.perf_counter()
        await self._engine.abort(names)
        await asyncio.gather(*tasks)
        return time.perf_counter() - begin


async def _measure(way: str, folder: str, batches: list[int], num_tokens: int, repeats: int) -> dict[str, Any]:
    begin = time.perf_counter()
    engine: Any = {"LLMEngine": _Stepped, "AsyncLLM": _Alone}[way](folder, max(batches))
    await engine.run(1, 1)
    figures: dict[str, Any] = {"start_up_s": round(time.perf_counter() - begin, 1), "tokens_per_s": {}}
    for batch in batches:
        await engine.run(batch, 4)
        speeds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            written = await engine.run(batch, num_tokens)
            speeds.append(written / (time.perf_counter() - begin))
            if written != batch * num_tokens:
                raise RuntimeError(f"{way} wrote {written} tokens, not {batch * num_tokens}")
        figures["tokens_per_s"][str(batch)] = round(max(speeds), 1)
    figures["abort_ms"] = round(1e3 * await engine.abort(max(batches)), 1)
    figures["memory_mib"] = _memory_mib()
    return figures


def main() -> None:
    """Measure both, each in a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batches = [int(one) for one in options.batches.split(",")]
    if options.child:
        way, folder = options.child
        found = asyncio.run(_measure(way, folder, batches, options.tokens, options.repeats))
        Path(folder, "figures.json").write_text(json.dumps(found))
        return
    from swarm.config import ModelConfig
    from swarm.policy import export, load_policy

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        export(load_policy(ModelConfig(name=options.model, dtype="bfloat16", device="cpu")), Path(folder))
        for way in _WAYS:
            multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": "01"[way == "AsyncLLM"], "VLLM_LOGGING_LEVEL": "ERROR"}
            subprocess.run(
                [sys.executable, *sys.argv, "--child", way, folder], env=os.environ | multiprocessing, check=True,
                stdout=sys.stderr, timeout=_TIME_LIMIT_S,
            )  # fmt: skip
            figures[way] = json.loads(Path(folder, "figures.json").read_text())
            print(way, figures[way], file=sys.stderr, flush=True)
    speeds = {way: figures[way]["tokens_per_s"] for way in _WAYS}
    bars = [
        Bar(f"{batch} requests: LLMEngine against AsyncLLM", round(speed / speeds["AsyncLLM"][batch], 2), 1.0)
        for batch, speed in speeds["LLMEngine"].items()
    ]
    report({"model": options.model, "num_tokens": options.tokens} | figures, bars)


if __name__ == "__main__":
    main()
