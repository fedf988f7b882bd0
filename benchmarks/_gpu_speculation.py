"""Speculation on a device, whatever the drafter: what verifying costs, and what drafts of a known quality give.

Weights are random, so no drafter would guess what is written: an oracle does, which knows what comes and errs as often
as it is told. What a drafter itself takes is not in the figures; that its drafts are this good is its own business, and
`benchmarks/tlt.py`'s.

verification  a step that verifies k tokens of each sequence, against one that decodes one
speculation   whole completions with drafts of which each token is right with a given chance, against plain decoding;
              `auto` is the tuner with the worst of these oracles and the best, and may leave drafts alone
"""

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from _gpu import free, make_model, wait
from _gpu_engine import make_workload
from harness import Bar

from swarm.config import EngineConfig
from swarm.drafting.base import Drafter, SequenceState
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy, StrategyTuner
from swarm.drafting.worth import UNKNOWN, Worth
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine

__all__ = ["speculation_part"]

_DEPTH = 6
_CHANCES = (0.6, 0.8, 0.95)
_NEVER_BELOW, _BEST = 0.97, 1.7
_ROUNDS_OF_AUTO = 4  # in which the tuner learns, before it is timed


class Oracle(Drafter):
    """Knows what each request will write, and says it, each token with a chance of being another."""

    def __init__(self, truth: Mapping[int, Sequence[int]], right: float, vocab_size: int) -> None:
        self.name = f"oracle {right:g}"  # type: ignore[misc]
        self._truth, self._right, self._vocab_size = truth, right, vocab_size
        self._rng = np.random.default_rng(0)

    def propose(
        self, states: Sequence[SequenceState], depth: int, budget: int, worth: Worth = UNKNOWN
    ) -> list[list[int]]:
        drafts = []
        for state in states:
            most = min(depth, state.room, budget)
            draft = list(self._truth[state.request_id][state.num_written :][: max(0, most)])
            for place in np.flatnonzero(self._rng.random(len(draft)) >= self._right).tolist():
                draft[place] = (draft[place] + 1) % self._vocab_size
            budget -= len(draft)
            drafts.append(draft)
        return drafts

    def observe(self, state: SequenceState) -> None:
        """Learn nothing."""


class Bench:
    """One model and one batch of requests, decoded in several ways."""

    def __init__(self, model: Any, args: argparse.Namespace, batch: int, num_tokens: int) -> None:
        self._model, self._batch, self._device = model, batch, args.device
        workload = make_workload(model.config.vocab_size, batch, args.prompt_len, (num_tokens,))
        self.requests = [
            Request(at, prompt, 7919 * at + 1, SamplingParams(num_tokens, ignore_eos=True))
            for at, prompt in enumerate(workload.prompts)
        ]
        self._max_seq_len = args.prompt_len + num_tokens
        self.num_same = self.num_compared = 0
        plain = self.engine(None)
        self.truth = {one.request_id: one.token_ids for one in plain.generate(self.requests)}
        plain.close()

    def engine(self, speculator: Speculator | None) -> TorchEngine:
        return TorchEngine(
            self._model, eos_token_ids=(), config=EngineConfig(max_slots=self._batch), max_seq_len=self._max_seq_len,
            speculator=speculator,
        )  # fmt: skip

    def oracle(self, right: float) -> Oracle:
        return Oracle(self.truth, right, self._model.config.vocab_size)

    def fixed(self, right: float, depth: int = _DEPTH) -> Speculator:
        oracle = self.oracle(right)
        return Speculator([oracle], Strategy(oracle.name, depth, depth * self._batch))

    def step_s(self, num_verified: int, num_steps: int) -> float:
        """Return what a step takes that verifies so many tokens of each sequence; the median."""
        engine = self.engine(self.fixed(1.0, num_verified - 1) if num_verified > 1 else None)
        seconds: list[float] = []
        for number in range(3):  # the first two record graphs
            engine.submit(self.requests)
            engine.step()
            for _ in range(num_steps):
                begin = time.perf_counter()
                engine.step()
                wait(self._device)
                if number == 2:
                    seconds.append(time.perf_counter() - begin)
            engine.abort()
        engine.close()
        return statistics.median(seconds)

    def run_s(self, engine: TorchEngine) -> float:
        """Return what all completions take."""
        wait(self._device)
        begin = time.perf_counter()
        done = engine.generate(self.requests)
        seconds = time.perf_counter() - begin
        same = sum(one.token_ids == self.truth[one.request_id] for one in done)
        self.num_same, self.num_compared = self.num_same + same, self.num_compared + len(done)
        return seconds


def _speeds(bench: Bench, repeats: int) -> dict[str, float]:
    """Return how much faster than plain decoding each way is; the ways take turns, and the best of each counts."""
    both = [bench.oracle(right) for right in (min(_CHANCES), max(_CHANCES))]
    tuner = StrategyTuner([Strategy(one.name, depth, 32) for one in both for depth in (4, 8)])
    ways: dict[str, Speculator | None] = {"plain": None}
    ways |= {f"each token right at {right:g}": bench.fixed(right) for right in _CHANCES}
    wrong = bench.oracle(0.0)
    ways["auto, drafts that are always wrong"] = Speculator([wrong], StrategyTuner([Strategy(wrong.name, 4, 32)]))
    ways["auto"] = Speculator(both, tuner)
    engines = {way: bench.engine(one) for way, one in ways.items()}
    for way, engine in engines.items():
        for _ in range(_ROUNDS_OF_AUTO if "auto" in way else 2):
            bench.run_s(engine)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, engine in engines.items():
            seconds[way].append(bench.run_s(engine))
    for engine in engines.values():
        engine.close()
    return {way: round(min(seconds["plain"]) / min(each), 3) for way, each in seconds.items() if way != "plain"}


def speculation_part(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure the models and batches that were asked for."""
    figures: dict[str, Any] = {"depth": _DEPTH}
    bars = []
    for name in args.models:
        model, figures[name] = make_model(name, args.device), {}
        for batch in args.speculation_batches:
            longest = args.verified[-1]
            bench = Bench(model, args, batch, min(longest * (args.steps + 2) + 1, args.longest))
            plain_s = bench.step_s(1, args.steps)
            costs = {
                str(num): round(bench.step_s(num, min(args.steps, args.longest // num - 2)) / plain_s, 3)
                for num in args.verified
            }
            bench = Bench(model, args, batch, args.tokens)
            found = _speeds(bench, args.repeats)
            figures[name][f"batch {batch}"] = {
                "plain_step_ms": round(1e3 * plain_s, 3), "times_a_plain_step_by_tokens_verified": costs,
                "times_plain": found, "completions_equal": f"{bench.num_same} of {bench.num_compared}",
            }  # fmt: skip
            print(name, batch, figures[name][f"batch {batch}"], file=sys.stderr, flush=True)
            title = f"{name}, batch {batch}"
            bars += [Bar(f"{title}: {way}, against plain", found[way], _NEVER_BELOW) for way in found if "auto" in way]
            if batch <= 4:
                way = f"each token right at {_CHANCES[1]:g}"
                bars.append(Bar(f"{title}: {way}, against plain", found[way], _BEST))
        del model
        free(args.device)
    return figures, bars
