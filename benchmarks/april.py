"""Partial rollouts against synchronous ones: what they gain on a long tail, and what they cost without one.

    python benchmarks/april.py [--parts throughput,discarded,overhead,own,learning] [--short] [--cpu-time]

throughput   `tiny` with enforced lengths: log-normal, p99/p50 of 8.3, cut at 16 medians; groups per second and idle
             decode slots. *keep* is scheduling alone. *verify* is the default, under a policy that a real update moves
             after every round; at each learning rate it says how much of a prefix survives one update
discarded    tokens that were written and neither returned nor in flight nor cut by a new policy, over 200 rounds
overhead     a workload without a tail, with the settings that are on by default
own          `smollm2-135m` with lengths of its own (minutes)
learning     held-out pass@1 of `tiny` over five seeds, at equal optimizer steps and at equal time (`_april_learning`)

The sides take turns, round by round, each with an engine of its own kind and size, over the same prompts, seeds and
lengths. Updates are not timed: only rollouts are compared.
"""

import argparse
import copy
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from _april_learning import learning
from harness import Bar, report

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig, TrainerConfig
from swarm.engine.base import Request
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy, load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.trainer import Trainer
from swarm.types import RolloutGroup, Task, TrainingBatch, TrainingGroup

_MEDIAN, _CAP = 14, 16 * 14  # `tiny` takes 256 positions
_SIGMA = math.log(8.3) / 2.326  # of the logarithm: the 99th percentile is 8.3 medians
_MAX_SLOTS = 64
_PARTS = ("throughput", "discarded", "overhead")
_RATES = (1e-6, 1e-5, 1e-4)
_WARMUP_ROUNDS = 3  # until as much is written ahead as a round takes from it
_GAIN, _OVERHEAD, _MAX_TOKENS = 1.44, 0.99, 256


@cache
def tail_length(seed: int) -> int:
    """Tokens of a completion, by its seed: a long tail."""
    return min(_CAP, max(1, round(_MEDIAN * math.exp(_SIGMA * random.Random(seed).gauss(0.0, 1.0)))))


class EnforcedEngine(TorchEngine):
    """Writes as many tokens for a request as `length(seed)` says."""

    length: Callable[[int], int]

    def submit(self, requests: Sequence[Request]) -> None:
        super().submit(
            [
                replace(
                    request,
                    sampling=replace(request.sampling, max_new_tokens=self.length(request.seed), ignore_eos=True),
                )
                for request in requests
            ]
        )


@dataclass
class Side:
    """One way of writing rollouts, with its engine, and the trainer that moves its policy."""

    rollouts: RolloutCollector
    engine: TorchEngine
    trainer: Trainer | None = None
    clock: Callable[[], float] = time.perf_counter
    seconds: list[float] = field(default_factory=list)
    num_groups: int = 0
    num_returned: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def play(self, tasks: Sequence[Task], round_index: int) -> list[RolloutGroup]:
        """One round; only the rollouts are timed."""
        begin = self.clock()
        groups = self.rollouts.collect(tasks, round_index=round_index)
        self.seconds.append(self.clock() - begin)
        self.num_groups += len(groups)
        self.num_returned += sum(len(one.token_ids) for group in groups for one in group.completions)
        self.rows.append(self.rollouts.describe())
        if self.trainer is not None:
            self.trainer.update(_random_batch(groups, round_index))
            self.rollouts.load_policy(self.trainer.policy_state(), self.trainer.policy_version)
        return groups


def _random_batch(groups: Sequence[RolloutGroup], seed: int) -> TrainingBatch:
    """Rewards by chance: an update of the usual size, in a direction that means nothing."""
    rng = random.Random(seed)
    return TrainingBatch(
        tuple(
            TrainingGroup(
                group.prompt_ids,
                tuple(one.token_ids for one in group.completions),
                tuple(rng.choice((-1.0, 1.0)) for _ in group.completions),
                tuple(one.logprobs for one in group.completions),
            )
            for group in groups
        )
    )


def _side(
    policy: Policy, config: RolloutConfig, tasks: Callable[[int], Sequence[Task]], *,
    length: Callable[[int], int] | None, learning_rate: float = 0.0, clock: Callable[[], float] = time.perf_counter,
) -> Side:  # fmt: skip
    """Make a side. length: None for lengths of its own."""
    kind = TorchEngine if length is None else EnforcedEngine
    engine = kind(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=_MAX_SLOTS),
        max_seq_len=config.max_new_tokens + 32,
    )  # fmt: skip
    if isinstance(engine, EnforcedEngine) and length is not None:
        engine.length = length
    trainer = None
    if learning_rate:
        trainer = Trainer(copy.deepcopy(policy.model), TrainerConfig(learning_rate=learning_rate))
    rollouts = (
        PartialRollouts(engine, policy, config, 1, tasks)
        if config.is_partial
        else RolloutCollector(engine, policy, config, 1)
    )
    return Side(rollouts, engine, trainer, clock)


def _tasks(num_groups: int) -> Callable[[int], list[Task]]:
    """Questions of every round."""
    rng = random.Random(0)
    pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(10_000)]

    def of(round_index: int) -> list[Task]:
        return [
            Task(TaskRef("sums", "0" * 32, 1, at), "{} + {} = ".format(*pairs[at % len(pairs)]))
            for at in range(round_index * num_groups, (round_index + 1) * num_groups)
        ]

    return of


def _describe(side: Side, against: Side | None) -> dict[str, Any]:
    """Return what a side did after its warm-up."""
    seconds, stats = sum(side.seconds[_WARMUP_ROUNDS:]), side.engine.stats
    per_round = side.num_groups / len(side.seconds)
    found: dict[str, Any] = {
        "groups_per_s": round(per_round * len(side.seconds[_WARMUP_ROUNDS:]) / seconds, 2),
        "steps_per_round": round(stats.num_steps / len(side.seconds), 1),
        "idle_slot_share": round(1 - stats.num_slot_steps / (stats.num_steps * _MAX_SLOTS), 3),
    }
    if against is not None:
        found["times_as_fast_as_synchronous"] = round(sum(against.seconds[_WARMUP_ROUNDS:]) / seconds, 3)
    if stats.num_draft_tokens:
        kept, drafts = stats.num_draft_tokens_kept, stats.num_draft_tokens
        found["draft_tokens_per_round"] = round(drafts / len(side.seconds), 1)
        found["draft_tokens_kept_share"] = round(kept / drafts, 4)
    if side.rows[0]:
        found["over_provision"] = round(statistics.fmean(row["over_provision"] for row in side.rows), 2)
        found["num_groups_in_flight"] = round(statistics.fmean(row["num_groups_in_flight"] for row in side.rows), 1)
        found["staleness_mean"] = round(statistics.fmean(row["staleness_mean"] for row in side.rows), 3)
        found["saved_s_estimated_per_round"] = round(statistics.fmean(row["saved_s"] for row in side.rows), 4)
    return found


def throughput(
    policy: Policy, workloads: Sequence[tuple[int, int, int]], clock: Callable[[], float]
) -> tuple[dict[str, Any], list[Bar]]:
    """Groups per second on the long tail. workloads: groups of a round, completions of a group, rounds."""
    figures: dict[str, Any] = {}
    bars = []
    for num_groups, num_completions, num_rounds in workloads:
        tasks = _tasks(num_groups)
        base = RolloutConfig(num_completions=num_completions, max_new_tokens=_CAP, schedule="partial")
        keep = base.model_copy(update={"stale_tokens": "correct"})
        plain = base.model_copy(update={"schedule": "synchronous"})
        settings: dict[str, tuple[RolloutConfig, float]] = {"synchronous": (plain, 0.0)}
        settings |= {f"keep x{f:g}": (keep.model_copy(update={"over_provision": f}), 0.0) for f in (2.0, 3.0, 4.0)}
        settings["keep, arrival x2"] = keep.model_copy(update={"over_provision": 2.0, "order": "arrival"}), 0.0
        settings["keep, adaptive"] = keep, 0.0
        settings |= {
            f"verify x2, learning rate {r:g}": (base.model_copy(update={"over_provision": 2.0}), r) for r in _RATES
        }
        usual = f"learning rate {_RATES[0]:g}"
        for factor in (3.0, 4.0):
            settings[f"verify x{factor:g}, {usual}"] = base.model_copy(update={"over_provision": factor}), _RATES[0]
        settings[f"verify, adaptive, {usual}"] = base, _RATES[0]
        sides = {
            name: _side(policy, config, tasks, length=tail_length, learning_rate=rate, clock=clock)
            for name, (config, rate) in settings.items()
        }
        for round_index in range(num_rounds + _WARMUP_ROUNDS):
            for side in sides.values():
                side.play(tasks(round_index), round_index)
        workload = f"{num_groups} groups of {num_completions}"
        against = sides["synchronous"]
        found = {name: _describe(side, None if side is against else against) for name, side in sides.items()}
        figures[workload] = found
        for way, names in {
            "kept tokens, best fixed factor": [name for name in found if name.startswith("keep x")],
            "kept tokens, adaptive": ["keep, adaptive"],
            "exact, best fixed factor": [name for name in found if name.startswith("verify x") and usual in name],
            "exact, adaptive": [f"verify, adaptive, {usual}"],
        }.items():
            best = max(found[name]["times_as_fast_as_synchronous"] for name in names)
            bars.append(Bar(f"tiny, {workload}: {way}, against synchronous", best, _GAIN))
        idle = found["synchronous"]["idle_slot_share"] - found["keep x3"]["idle_slot_share"]
        bars.append(Bar(f"tiny, {workload}: share of slots idle, synchronous less partial", round(idle, 3), 0.0))
    return figures | {"lengths": _lengths(tail_length)}, bars


def _lengths(length: Callable[[int], int]) -> dict[str, float]:
    drawn = sorted(length(seed) for seed in range(10_000))
    return {
        "median": drawn[5000], "p99_over_p50": round(drawn[9900] / drawn[5000], 2),
        "longest_over_median": round(drawn[-1] / drawn[5000], 2),
    }  # fmt: skip


def discarded(policy: Policy, num_rounds: int) -> tuple[dict[str, Any], list[Bar]]:
    """Tokens that were written for nothing."""
    tasks, figures, bars = _tasks(4), {}, []
    base = RolloutConfig(num_completions=4, max_new_tokens=96, schedule="partial", over_provision=2.5)
    for name, settings in {
        "keep": {"stale_tokens": "correct"},
        "keep, arrival": {"stale_tokens": "correct", "order": "arrival"},
        "verify": {},
        "verify, arrival": {"order": "arrival"},
    }.items():
        config = base.model_copy(update=settings)
        side = _side(policy, config, tasks, length=lambda seed: 1 + tail_length(seed) % 96, learning_rate=1e-5)
        for round_index in range(num_rounds):
            side.play(tasks(round_index), round_index)
        state = side.rollouts.state()
        assert state is not None
        in_flight = sum(
            len(written[0]) // 4 for group in state["groups"] for _, written in group["members"] if written is not None
        )
        cut = sum(row["num_tokens_cut"] for row in side.rows)
        lost = side.engine.stats.num_tokens_generated - side.num_returned - in_flight - cut
        figures[name] = {
            "num_rounds": num_rounds, "num_tokens_generated": side.engine.stats.num_tokens_generated,
            "num_tokens_returned": side.num_returned, "num_tokens_in_flight": in_flight,
            "num_tokens_cut_by_new_policies": cut, "num_tokens_discarded": lost,
        }  # fmt: skip
        bars.append(Bar(f"tokens discarded over {num_rounds} rounds: {name}", abs(lost), 0, at_least=False))
    return figures, bars


def overhead(policy: Policy, num_rounds: int, clock: Callable[[], float]) -> tuple[dict[str, Any], list[Bar]]:
    """No tail: nothing to gain."""
    tasks = _tasks(8)
    base = RolloutConfig(num_completions=8, max_new_tokens=64, schedule="partial")
    plain = base.model_copy(update={"schedule": "synchronous"})
    sides = [_side(policy, config, tasks, length=lambda seed: 64, clock=clock) for config in (plain, base)]
    for round_index in range(num_rounds):
        for side in sides if round_index % 2 else reversed(sides):
            side.play(tasks(round_index), round_index)
    first, second = (sorted(side.seconds) for side in sides)
    half = num_rounds // 2  # of the quicker halves: what else ran on the machine is in the slower ones
    ratio = sum(first[:half]) / sum(second[:half])
    figures = {
        "synchronous_s": round(statistics.median(first), 5), "partial_s": round(statistics.median(second), 5),
        "over_provision_at_most": max(row["over_provision"] for row in sides[1].rows),
    }  # fmt: skip
    return figures, [Bar("no tail: partial against synchronous", round(ratio, 4), _OVERHEAD)]


def own(num_rounds: int, clock: Callable[[], float]) -> tuple[dict[str, Any], list[Bar]]:
    """A model's own lengths."""
    policy, tasks = load_policy(ModelConfig(name="smollm2-135m")), _tasks(4)
    base = RolloutConfig(num_completions=4, max_new_tokens=_MAX_TOKENS, schedule="partial", over_provision=3.0)
    keep = base.model_copy(update={"stale_tokens": "correct"})
    plain = base.model_copy(update={"schedule": "synchronous"})
    sides = {
        "synchronous": _side(policy, plain, tasks, length=None, clock=clock),
        "keep x3": _side(policy, keep, tasks, length=None, clock=clock),
        "verify x3, learning rate 1e-06": _side(policy, base, tasks, length=None, learning_rate=1e-6, clock=clock),
    }
    lengths: list[int] = []
    for round_index in range(num_rounds + _WARMUP_ROUNDS):
        for name, side in sides.items():
            groups = side.play(tasks(round_index), round_index)
            if name == "synchronous":
                lengths += [len(one.token_ids) for group in groups for one in group.completions]
    against = sides["synchronous"]
    figures: dict[str, Any] = {
        name: _describe(side, None if side is against else against) for name, side in sides.items()
    }
    lengths.sort()
    figures["lengths"] = {"median": lengths[len(lengths) // 2], "longest": lengths[-1]}
    return figures, [
        Bar(f"smollm2-135m: {name}, against synchronous", figures[name]["times_as_fast_as_synchronous"], _GAIN)
        for name in sides
        if name != "synchronous"
    ]


def main() -> None:
    """Run the parts that are asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--short", action="store_true", help="few rounds: to see that it runs")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU seconds: where other work goes on")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    few, tiny = args.short, load_policy(ModelConfig(name="tiny"))
    parts: dict[str, Callable[[], tuple[dict[str, Any], list[Bar]]]] = {
        "throughput": lambda: throughput(tiny, [(4, 4, 2)] if few else [(2, 4, 40), (4, 4, 40), (8, 8, 12)], clock),
        "discarded": lambda: discarded(tiny, 12 if few else 200),
        "overhead": lambda: overhead(tiny, 10 if few else 100, clock),
        "own": lambda: own(1 if few else 4, clock),
        "learning": lambda: learning(range(1 if few else 5), 20 if few else 100, clock),
    }
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    for name in args.parts.split(","):
        if name not in parts:
            raise SystemExit(f"no part {name!r}: choose from {', '.join(parts)}")
        begin = time.monotonic()
        figures[name], found = parts[name]()
        bars += found
        print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    report(figures | {"seconds": "of the CPU, one thread" if args.cpu_time else "wall time"}, bars)


if __name__ == "__main__":
    main()
