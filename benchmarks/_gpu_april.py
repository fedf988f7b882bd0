"""A round with a long tail on a device: partial rollouts against synchronous ones, on a model with random weights."""

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from _gpu import free, make_model, wait
from april import enforce, tail_length
from harness import Bar

from protocol.messages import TaskRef
from swarm.config import EngineConfig, RolloutConfig
from swarm.engine.torch import TorchEngine
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.types import Task

__all__ = ["april_part"]

_GAIN = 1.44
_WARMUP_ROUNDS = 3  # until as much is written ahead as a round takes from it
_COMPLETIONS = 8


@dataclass(frozen=True)
class Asked:
    """What rollouts ask of a policy, over a model that has no tokenizer."""

    vocab_size: int
    prompt_len: int

    def encode_prompt(self, question: str) -> tuple[int, ...]:
        rng = random.Random(question)
        return tuple(rng.randrange(self.vocab_size) for _ in range(self.prompt_len))

    def decode(self, token_ids: tuple[int, ...]) -> str:
        return ""


def _tasks(num_groups: int, round_index: int) -> list[Task]:
    return [Task(TaskRef("drawn", "0" * 32, 1, at), f"q{at}") for at in range(num_groups * round_index,
            num_groups * (round_index + 1))]  # fmt: skip


def _rounds(model: Any, args: argparse.Namespace, schedule: str) -> dict[str, float]:
    """Write rounds one way; return what they took and how busy slots were."""
    slots = args.april_groups * _COMPLETIONS
    longest = max(map(tail_length, range(10_000)))
    engine = TorchEngine(
        model, eos_token_ids=(), config=EngineConfig(max_slots=slots), max_seq_len=args.prompt_len + longest
    )
    enforce(engine, tail_length)
    config = RolloutConfig(num_completions=_COMPLETIONS, max_new_tokens=longest, schedule=schedule)  # type: ignore[arg-type]
    asked: Any = Asked(model.config.vocab_size, args.prompt_len)
    rollouts: RolloutCollector
    if config.is_partial:
        rollouts = PartialRollouts(engine, asked, config, 1, lambda at: _tasks(args.april_groups, at))
    else:
        rollouts = RolloutCollector(engine, asked, config, 1)
    seconds = []
    for round_index in range(args.april_rounds + _WARMUP_ROUNDS):
        wait(args.device)
        begin = time.perf_counter()
        rollouts.collect(_tasks(args.april_groups, round_index), round_index=round_index)
        seconds.append(time.perf_counter() - begin)
    stats = engine.stats
    engine.close()
    return {
        "round_s": round(statistics.fmean(seconds[_WARMUP_ROUNDS:]), 4),
        "idle_slot_share": round(1 - stats.num_slot_steps / (stats.num_steps * slots), 3),
    }


def april_part(args: argparse.Namespace) -> tuple[dict[str, Any], list[Bar]]:
    """Measure the models that were asked for. Updates are not part of it: the policy stays as it is."""
    figures: dict[str, Any] = {"groups": args.april_groups, "completions": _COMPLETIONS, "rounds": args.april_rounds}
    bars = []
    for name in args.models:
        model = make_model(name, args.device)
        found = {schedule: _rounds(model, args, schedule) for schedule in ("synchronous", "partial")}
        gain = round(found["synchronous"]["round_s"] / found["partial"]["round_s"], 3)
        figures[name] = {**found, "times_as_fast": gain}
        bars.append(Bar(f"{name}, a round with a long tail: partial rollouts against synchronous", gain, _GAIN))
        print(name, figures[name], file=sys.stderr, flush=True)
        del model
        free(args.device)
    return figures, bars
