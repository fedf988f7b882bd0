"""A verification pass by one recorded graph, by the same operations one by one, and without a bucket's padding.

time      what a pass over all sequences takes that verifies k drafted tokens of each, with bringing the drafts to the
          device and reading the drawn tokens back. Half of the drafts are one token shorter, so that there is padding.
equality  whole completions with drafts of all lengths, verified by recorded graphs, against plain decoding by single
          operations, token by token. In float32 all have to be equal; in bf16 a pass of another shape rounds otherwise,
          and what counts is how many tokens come before the first that differs.

On a CPU there is nothing to record: the same passes run as they are, which shows that this script runs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _gpu import free, make_model, wait
from _gpu_engine import make_workload
from _gpu_speculation import Oracle
from harness import Bar

from swarm.config import EngineConfig
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.graphs import CudaRecorder, GraphPool
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.sampling import Mode, sample
from swarm.engine.torch.slot_pass import SlotPass
from swarm.engine.torch.slots import Running, Slots

__all__ = ["passes_part"]

_CAPACITY = 256
_LONGEST_DRAFT = 8
_REPEATS = 30


class Passes:
    """One model with a batch of sequences that have just been prefilled."""

    def __init__(self, model: Any, batch: int, args: argparse.Namespace) -> None:
        self._device, self._vocab = torch.device(args.device), model.config.vocab_size
        if self._device.type == "cuda":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._runner = LlamaRunner(model, batch, _CAPACITY)
        self._slots = Slots(batch, _CAPACITY, ())
        prompts = make_workload(self._vocab, batch, args.prompt_len, (_CAPACITY - args.prompt_len,)).prompts
        for at, prompt in enumerate(prompts):
            request = Request(at, prompt, 7919 * at + 1, SamplingParams(_CAPACITY - args.prompt_len, ignore_eos=True))
            self._slots.add(Running.of(request), cached=len(prompt), version=0)
        self._runner.prefill(prompts, list(range(batch)))
        recorder = CudaRecorder(self._device) if self._device.type == "cuda" else None
        self.graphs = GraphPool(recorder)
        self._recorded = SlotPass(self._runner, batch, _CAPACITY, self.graphs)
        self._as_it_is = SlotPass(self._runner, batch, _CAPACITY, GraphPool(None))

    def _drafts(self, num_drafted: int) -> list[list[int]]:
        nums = [num_drafted - at % 2 for at in range(len(self._slots))]
        return [[(31 * at + 7 * place) % self._vocab for place in range(num)] for at, num in enumerate(nums)]

    def _unpadded(self, drafts: Sequence[Sequence[int]]) -> list[int]:
        """The same as the engine does it where there is no bucket."""
        slots, nums = self._slots, [len(draft) + 1 for draft in drafts]
        n = len(drafts)
        flat = [token for slot, draft in enumerate(drafts) for token in (int(slots.last_tokens[slot]), *draft)]
        hidden = self._runner.extend(torch.tensor(flat, device=self._device), nums, slots.cached[:n].tolist())
        repeats = torch.tensor(nums)
        ahead = torch.cat([torch.arange(num) for num in nums])
        columns = [
            torch.from_numpy(column[:n]).repeat_interleave(repeats)
            for column in (slots.seeds, slots.generated, slots.temperature, slots.top_k, slots.top_p)
        ]
        columns[1] = columns[1] + ahead
        mode = Mode.of(slots.temperature[:n], slots.top_k[:n], slots.top_p[:n])
        tokens, _ = sample(self._runner.logits(hidden), *(one.to(self._device) for one in columns), mode=mode)
        return [int(token) for token in tokens.tolist()]

    def measure(self, num_drafted: int) -> dict[str, Any]:
        """Time each way, and count where they draw the same."""
        drafts = self._drafts(num_drafted)
        ways: dict[str, Callable[[], Sequence[int]]] = {
            "one by one, unpadded": lambda: self._unpadded(drafts),
            "one by one": lambda: self._as_it_is(self._slots, drafts).tokens.tolist(),
            "recorded": lambda: self._recorded(self._slots, drafts).tokens.tolist(),
        }
        if self._device.type != "cuda":
            del ways["recorded"]
        drawn, milliseconds = {}, {}
        for way, run in ways.items():
            for _ in range(3):  # the second one records
                drawn[way] = run()
            seconds = []
            for _ in range(_REPEATS):
                wait(self._device.type)
                begin = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - begin)
            milliseconds[way] = round(1e3 * statistics.median(seconds), 4)
        expected = drawn["one by one, unpadded"]
        same = {
            way: f"{sum(one == other for one, other in zip(tokens, expected, strict=True))} of {len(expected)}"
            for way, tokens in drawn.items()
        }
        return {"ms": milliseconds, "drawn_as_unpadded": same}


class Ragged(Oracle):
    """Drafts of all lengths up to the depth."""

    def propose(self, states: Any, depth: int, budget: int, worth: Any = None) -> list[list[int]]:
        whole = super().propose(states, depth, budget)
        return [draft[: (state.request_id + state.num_written) % (depth + 1)]
                for state, draft in zip(states, whole, strict=True)]  # fmt: skip


def equality(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Compare whole completions."""
    vocab = model.config.vocab_size
    prompts = make_workload(vocab, batch, args.prompt_len, (args.tokens,)).prompts
    settings = ((1.0, 1.0, 0), (0.7, 0.95, 50), (0.0, 1.0, 0))  # temperature, top-p, top-k
    requests = [
        Request(at, prompt, 7919 * at + 1, SamplingParams(args.tokens, *settings[at % 3], ignore_eos=True))
        for at, prompt in enumerate(prompts)
    ]

    def write(speculator: Speculator | None, record: bool) -> tuple[list[tuple[int, ...]], TorchEngine]:
        engine = TorchEngine(
            model, eos_token_ids=(), config=EngineConfig(max_slots=batch), max_seq_len=args.prompt_len + args.tokens,
            runner=LlamaRunner, record_graphs=record, speculator=speculator,
        )  # fmt: skip
        for _ in range(2 if record else 1):
            done = engine.generate(requests)
        return [one.token_ids for one in done], engine

    plain, _ = write(None, record=False)
    oracle = Ragged(dict(enumerate(plain)), 0.8, vocab)
    got, engine = write(
        Speculator([oracle], Strategy(oracle.name, _LONGEST_DRAFT, _LONGEST_DRAFT * batch)), record=True
    )
    before = [
        next((at for at, (one, other) in enumerate(zip(*pair, strict=True)) if one != other), args.tokens)
        for pair in zip(got, plain, strict=True)
    ]
    return {
        "tokens_equal": sum(before), "tokens": batch * args.tokens,
        "drafted": engine.stats.num_speculated_tokens, "kept": engine.stats.num_speculated_tokens_kept,
        "num_graphs": engine._slot_pass.num_graphs if engine._slot_pass is not None else 0,
    }  # fmt: skip


@torch.inference_mode()
def passes_part(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure the models and batches that were asked for."""
    figures: dict[str, Any] = {"statistic": f"median of {_REPEATS}", "positions": args.prompt_len}
    bars = []
    for name in args.models:
        model, figures[name] = make_model(name, args.device), {}
        for batch in args.pass_batches:
            reserved = torch.cuda.memory_reserved() if args.device == "cuda" else 0
            passes = Passes(model, batch, args)
            found = {str(num): passes.measure(num) for num in args.drafted}
            figure = figures[name][f"batch {batch}"] = {"by_drafted": found, "equality": equality(model, batch, args)}
            if args.device == "cuda":
                figure["num_graphs"] = passes.graphs.num_graphs
                figure["reserved_mib"] = round((torch.cuda.memory_reserved() - reserved) / 2**20, 1)
                slower = [one["ms"]["recorded"] / one["ms"]["one by one"] for one in found.values()]
                bars.append(Bar(f"{name}, batch {batch}: a recorded pass, against its operations one by one",
                                round(max(slower), 3), 0.5, at_least=False))  # fmt: skip
            same = figure["equality"]
            if model.dtype == torch.float32:
                share = same["tokens_equal"] / same["tokens"]
                bars.append(Bar(f"{name}, batch {batch}: tokens equal to plain decoding", round(share, 4), 1.0))
            print(name, batch, figure, file=sys.stderr, flush=True)
            del passes
            free(args.device)
        del model
        free(args.device)
    return figures, bars
