"""Partial rollouts against synchronous ones: what they gain on a long tail, and what they cost without one.

    python benchmarks/april.py [--parts throughput,discarded,overhead,own,learning,reckoned] [--workloads 2x4,4x4,8x8]
                               [--engine torch] [--repeats 5] [--short] [--cpu-time]

throughput   `tiny` with enforced lengths: log-normal, p99/p50 of 8.3, cut at 16 medians; groups per second and idle
             decode slots, under a policy that a real update moves after every round. *keep*: tokens of older policies
             stay; *verify*: the default. It says how much of what is written ahead survives updates at three rates
discarded    tokens that were written and neither returned nor in flight nor cut by a new policy, over 200 rounds
overhead     a workload without a tail, with the settings that are on by default
own          `smollm2-135m` with lengths of its own (minutes)
learning     held-out pass@1 of `tiny` over five seeds, at equal optimizer steps and at equal time (`_april_learning`)
reckoned     the same workloads on paper, by what a decode step costs beside its tokens: what other hardware would give

With `--engine vllm` the first two run on vLLM, which keeps tokens and loads the policy anew after every round: what is
resumed finds nothing in its prefix cache, as after an update. Its process is used by all sides in turn.

The sides take turns, round by round, with engines of one kind and size, over the same prompts, seeds and lengths.
A workload is groups of a round x completions of a group. Updates are not timed: only rollouts are compared.
"""

import argparse
import copy
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from _april_learning import learning
from harness import Bar, report

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig, TrainerConfig
from swarm.engine.base import Engine, Request
from swarm.engine.choice import make_engine
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy, load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.forecast import Costs, Plan, forecast
from swarm.rollout.partial import PartialRollouts
from swarm.trainer import Trainer
from swarm.types import RolloutGroup, Task, TrainingBatch, TrainingGroup

_MEDIAN, _CAP = 14, 16 * 14  # `tiny` takes 256 positions
_SIGMA = math.log(8.3) / 2.326  # of the logarithm: the 99th percentile is 8.3 medians
_MAX_SLOTS, _MAX_PROMPT = 64, 32
_PARTS = ("throughput", "discarded", "overhead")
_WORKLOADS = {"2x4": 60, "4x4": 60, "8x8": 60}  # rounds of each
_RATES = (1e-6, 1e-5, 1e-4)
_STEP_COSTS = (10.0, 40.0, 120.0, 400.0)  # `tiny` on a CPU; a GPU reads its weights in the time of 100 to 300 tokens
_OWN_WARMUP_ROUNDS = 2
_WARMUP_ROUNDS = 6  # until as much is written ahead as a round takes from it
_GAIN, _NEVER_BELOW, _OVERHEAD, _MAX_TOKENS = 1.44, 0.97, 0.99, 256


@cache
def tail_length(seed: int) -> int:
    """Tokens of a completion, by its seed: a long tail."""
    return min(_CAP, max(1, round(_MEDIAN * math.exp(_SIGMA * random.Random(seed).gauss(0.0, 1.0)))))


def enforce(engine: Engine, length: Callable[[int], int]) -> None:
    """Let an engine write as many tokens for a request as `length(seed)` says."""
    submit = partial(type(engine).submit, engine)

    def enforced(requests: Sequence[Request]) -> None:
        lengths = (replace(one.sampling, max_new_tokens=length(one.seed), ignore_eos=True) for one in requests)
        submit([replace(one, sampling=sampling) for one, sampling in zip(requests, lengths, strict=True)])

    engine.submit = enforced  # type: ignore[method-assign]


@dataclass
class Side:
    """One way of writing rollouts, with its engine, and the trainer that moves its policy, if one does."""

    rollouts: RolloutCollector
    engine: Engine
    state: Mapping[str, torch.Tensor]  # loaded after every round where there is no trainer
    trainer: Trainer | None = None
    clock: Callable[[], float] = time.perf_counter
    seconds: list[float] = field(default_factory=list)
    num_groups: int = 0
    num_returned: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    stats: Counter[str] = field(default_factory=Counter)  # what the engine did for this side

    def play(self, tasks: Sequence[Task], round_index: int) -> list[RolloutGroup]:
        """One round; only the rollouts are timed."""
        before = asdict(self.engine.stats)
        begin = self.clock()
        groups = self.rollouts.collect(tasks, round_index=round_index)
        self.seconds.append(self.clock() - begin)
        self.stats.update({name: num - before[name] for name, num in asdict(self.engine.stats).items()})
        self.num_groups += len(groups)
        self.num_returned += sum(len(one.token_ids) for group in groups for one in group.completions)
        self.rows.append(self.rollouts.describe())
        if self.trainer is None:
            self.rollouts.load_policy(self.state, round_index + 1)
        else:
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


@dataclass(frozen=True)
class Bench:
    """What all sides of a comparison share."""

    policy: Policy
    clock: Callable[[], float] = time.perf_counter
    engine: Engine | None = None  # one that all sides use in turn; None: each has a torch engine
    max_prompt: int = _MAX_PROMPT

    def side(
        self, config: RolloutConfig, tasks: Callable[[int], Sequence[Task]], *,
        length: Callable[[int], int] | None, learning_rate: float = 0.0,
    ) -> Side:  # fmt: skip
        """Make a side. length: None for lengths of its own."""
        policy, state = self.policy, self.policy.model.state_dict()
        engine = self.engine or TorchEngine(
            policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=_MAX_SLOTS),
            max_seq_len=config.max_new_tokens + self.max_prompt,
        )  # fmt: skip
        if length is not None:
            enforce(engine, length)
        if self.engine is not None:
            engine.load_policy(state, 0)
        trainer = None
        if learning_rate:
            trainer = Trainer(copy.deepcopy(policy.model), TrainerConfig(learning_rate=learning_rate))
        rollouts = (
            PartialRollouts(engine, policy, config, 1, tasks)
            if config.is_partial
            else RolloutCollector(engine, policy, config, 1)
        )
        return Side(rollouts, engine, state, trainer, self.clock)


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


def _describe(side: Side, against: Side | None, num_warmup: int = _WARMUP_ROUNDS) -> dict[str, Any]:
    """Return what a side did after its warm-up."""
    seconds, stats = sum(side.seconds[num_warmup:]), side.stats
    per_round = side.num_groups / len(side.seconds)
    found: dict[str, Any] = {
        "groups_per_s": round(per_round * len(side.seconds[num_warmup:]) / seconds, 2),
        "steps_per_round": round(stats["num_steps"] / len(side.seconds), 1),
        "idle_slot_share": round(1 - stats["num_slot_steps"] / (stats["num_steps"] * _MAX_SLOTS), 3),
    }
    if against is not None:
        found["times_as_fast_as_synchronous"] = round(sum(against.seconds[num_warmup:]) / seconds, 3)
    if stats["num_draft_tokens"]:
        kept, drafts = stats["num_draft_tokens_kept"], stats["num_draft_tokens"]
        found["draft_tokens_per_round"] = round(drafts / len(side.seconds), 1)
        found["draft_tokens_kept_share"] = round(kept / drafts, 4)
    if side.rows[0]:
        found["over_provision"] = round(statistics.fmean(row["over_provision"] for row in side.rows), 2)
        found["num_groups_in_flight"] = round(statistics.fmean(row["num_groups_in_flight"] for row in side.rows), 1)
        found["staleness_mean"] = round(statistics.fmean(row["staleness_mean"] for row in side.rows), 3)
        found["saved_s_estimated_per_round"] = round(statistics.fmean(row["saved_s"] for row in side.rows), 4)
    return found


def _settings(num_completions: int, *, learns: bool) -> dict[str, tuple[RolloutConfig, float]]:
    """Return the sides of `throughput` and the learning rates of their policies.

    Where they learn, all of them do, the synchronous one too: after an update caches are cold.
    """
    rate = _RATES[0] if learns else 0.0
    base = RolloutConfig(num_completions=num_completions, max_new_tokens=_CAP, schedule="partial")
    keep = base.model_copy(update={"stale_tokens": "correct"})
    found = {"synchronous": (base.model_copy(update={"schedule": "synchronous"}), rate)}
    found |= {f"keep x{f:g}": (keep.model_copy(update={"over_provision": f}), rate) for f in (2.0, 4.0)}
    found["keep, adaptive"] = keep, rate
    found["keep, arrival x2"] = keep.model_copy(update={"over_provision": 2.0, "order": "arrival"}), rate
    if learns:
        for factor in (2.0, 4.0, 6.0):
            found[f"verify x{factor:g}"] = base.model_copy(update={"over_provision": factor}), rate
        found["verify, adaptive"] = base, rate
        found |= {f"verify, adaptive, learning rate {more:g}": (base, more) for more in _RATES[1:]}
    return found


def throughput(bench: Bench, workloads: Mapping[str, int], num_repeats: int) -> tuple[dict[str, Any], list[Bar]]:
    """Groups per second on the long tail. workloads: rounds of each."""
    figures: dict[str, Any] = {}
    bars = []
    for workload, num_rounds in workloads.items():
        found = _median_of([_play_all(bench, workload, num_rounds) for _ in range(num_repeats)])
        figures[workload] = found | {"num_rounds": num_rounds, "num_repeats": num_repeats}
        for way, names in {
            "kept tokens, best fixed factor": [name for name in found if name.startswith("keep x")],
            "kept tokens, adaptive": ["keep, adaptive"],
            "exact, best fixed factor": [name for name in found if name.startswith("verify x")],
            "exact, adaptive": [name for name in found if name == "verify, adaptive"],
        }.items():
            if names:
                best = max(found[name]["times_as_fast_as_synchronous"] for name in names)
                bars.append(Bar(f"tiny, {workload}: {way}, against synchronous", best, _GAIN))
        adaptive = [one["times_as_fast_as_synchronous"] for name, one in found.items() if "adaptive" in name]
        bars.append(Bar(f"tiny, {workload}: the slowest adaptive one", min(adaptive), _NEVER_BELOW))
        idle = found["synchronous"]["idle_slot_share"] - found["keep x4"]["idle_slot_share"]
        bars.append(Bar(f"tiny, {workload}: share of slots idle, synchronous less partial", round(idle, 3), 0.0))
    return figures | {"lengths": _lengths(tail_length)}, bars


def _play_all(bench: Bench, workload: str, num_rounds: int) -> dict[str, dict[str, Any]]:
    """Let the sides take turns, and return what each did."""
    num_groups, num_completions = map(int, workload.split("x"))
    tasks = _tasks(num_groups)
    sides = {
        name: bench.side(config, tasks, length=tail_length, learning_rate=rate)
        for name, (config, rate) in _settings(num_completions, learns=bench.engine is None).items()
    }
    for round_index in range(num_rounds + _WARMUP_ROUNDS):
        for name in _in_turn(list(sides), round_index):
            sides[name].play(tasks(round_index), round_index)
    against = sides["synchronous"]
    return {name: _describe(side, None if side is against else against) for name, side in sides.items()}


def _in_turn(names: list[str], round_index: int) -> list[str]:
    """Let another one be first in every round."""
    first = round_index % len(names)
    return names[first:] + names[:first]


def _median_of(repeats: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the repeat in the middle, side by side; with the ratios of all of them."""
    found = {}
    for name, first in repeats[0].items():
        key = "times_as_fast_as_synchronous" if "times_as_fast_as_synchronous" in first else "groups_per_s"
        ordered = sorted((one[name] for one in repeats), key=lambda one: one[key])
        found[name] = ordered[(len(ordered) - 1) // 2] | {f"{key}_each": [one[key] for one in ordered]}
    return found


def _lengths(length: Callable[[int], int]) -> dict[str, float]:
    drawn = sorted(length(seed) for seed in range(10_000))
    return {
        "median": drawn[5000], "p99_over_p50": round(drawn[9900] / drawn[5000], 2),
        "longest_over_median": round(drawn[-1] / drawn[5000], 2),
    }  # fmt: skip


def discarded(bench: Bench, num_rounds: int) -> tuple[dict[str, Any], list[Bar]]:
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
        if config.stale_tokens == "verify" and bench.engine is not None:
            continue
        side = bench.side(config, tasks, length=lambda seed: 1 + tail_length(seed) % 96, learning_rate=1e-5)
        for round_index in range(num_rounds):
            side.play(tasks(round_index), round_index)
        state = side.rollouts.state()
        assert state is not None
        in_flight = sum(
            len(written[0]) // 4 for group in state["groups"] for _, written in group["members"] if written is not None
        )
        cut = sum(row["num_tokens_cut"] for row in side.rows)
        lost = side.stats["num_tokens_generated"] - side.num_returned - in_flight - cut
        figures[name] = {
            "num_rounds": num_rounds, "num_tokens_generated": side.stats["num_tokens_generated"],
            "num_tokens_returned": side.num_returned, "num_tokens_in_flight": in_flight,
            "num_tokens_cut_by_new_policies": cut, "num_tokens_discarded": lost,
        }  # fmt: skip
        bars.append(Bar(f"tokens discarded over {num_rounds} rounds: {name}", abs(lost), 0, at_least=False))
    return figures, bars


def overhead(bench: Bench, num_rounds: int) -> tuple[dict[str, Any], list[Bar]]:
    """No tail: nothing to gain. Rounds are compared pair by pair, as the machine drifts."""
    tasks = _tasks(8)
    base = RolloutConfig(num_completions=8, max_new_tokens=64, schedule="partial")
    plain = base.model_copy(update={"schedule": "synchronous"})
    sides = [bench.side(config, tasks, length=lambda seed: 64) for config in (plain, base)]
    for round_index in range(num_rounds):
        for side in sides if round_index % 2 else reversed(sides):
            side.play(tasks(round_index), round_index)
    first, second = (side.seconds for side in sides)
    ratios = sorted(one / other for one, other in zip(first, second, strict=True))
    off = round(0.98 * math.sqrt(num_rounds))  # ranks between the median and the ends of its 95 % interval
    middle = num_rounds // 2
    figures = {
        "synchronous_s": round(statistics.median(first), 5), "partial_s": round(statistics.median(second), 5),
        "ratio_95": [round(ratios[max(0, middle - off)], 4), round(ratios[min(num_rounds - 1, middle + off)], 4)],
        "over_provision_at_most": max(row["over_provision"] for row in sides[1].rows), "num_rounds": num_rounds,
    }  # fmt: skip
    return figures, [Bar("no tail: partial against synchronous", round(statistics.median(ratios), 4), _OVERHEAD)]


def own(workloads: Mapping[str, int], clock: Callable[[], float]) -> tuple[dict[str, Any], list[Bar]]:
    """A model's own lengths. workloads: rounds of each."""
    bench = Bench(load_policy(ModelConfig(name="smollm2-135m")), clock, max_prompt=64)
    figures: dict[str, Any] = {}
    bars = []
    for workload, num_rounds in workloads.items():
        num_groups, num_completions = map(int, workload.split("x"))
        tasks, lengths = _tasks(num_groups), list[int]()
        base = RolloutConfig(num_completions=num_completions, max_new_tokens=_MAX_TOKENS, schedule="partial")
        settings = {
            "synchronous": base.model_copy(update={"schedule": "synchronous"}),
            "keep x3": base.model_copy(update={"over_provision": 3.0, "stale_tokens": "correct"}),
            "verify x3": base.model_copy(update={"over_provision": 3.0}),
            "verify, adaptive": base,
        }
        sides = {
            name: bench.side(config, tasks, length=None, learning_rate=_RATES[0]) for name, config in settings.items()
        }
        for round_index in range(num_rounds + _OWN_WARMUP_ROUNDS):
            for name, side in sides.items():
                groups = side.play(tasks(round_index), round_index)
                if name == "synchronous":
                    lengths += [len(one.token_ids) for group in groups for one in group.completions]
        against = sides["synchronous"]
        found = {
            name: _describe(side, None if side is against else against, _OWN_WARMUP_ROUNDS)
            for name, side in sides.items()
        }
        lengths.sort()
        spread = {"median": lengths[len(lengths) // 2], "p90": lengths[len(lengths) * 9 // 10], "longest": lengths[-1]}
        figures[workload] = found | {"lengths": spread, "num_rounds": num_rounds}
        bars += [
            Bar(f"smollm2-135m, {workload}: {name}, against synchronous", one["times_as_fast_as_synchronous"], _GAIN)
            for name, one in found.items()
            if name != "synchronous"
        ]
    return figures, bars


def reckoned() -> tuple[dict[str, Any], list[Bar]]:
    """The best factor on paper, for machines on which a step costs as much as so many tokens. A bar: none."""
    figures: dict[str, Any] = {}
    for workload in _WORKLOADS:
        num_groups, num_completions = map(int, workload.split("x"))
        seeds = iter(range(400 * num_completions))
        lengths = [[tail_length(next(seeds)) for _ in range(num_completions)] for _ in range(400)]
        for step_cost in _STEP_COSTS:
            costs = Costs(step_cost, 1.0)
            plain = forecast(lengths, 8.0, 0.0, Plan(num_groups, num_groups, _MAX_SLOTS, False, False), costs)
            for way, rate in {"keep": 0.0, "verify": 0.0, "verify, a token in a hundred changes": 0.01}.items():
                found = {
                    factor: plain
                    / forecast(
                        lengths, 8.0, rate,
                        Plan(num_groups, round(factor * num_groups), _MAX_SLOTS, way != "keep", False), costs,
                    )
                    for factor in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
                }  # fmt: skip
                best = max(found, key=lambda factor: found[factor])
                figures[f"{workload}, a step costs {step_cost:g} tokens, {way}"] = {
                    "times_as_fast_as_synchronous": round(found[best], 3), "over_provision": best,
                }  # fmt: skip
    return figures, []


def main() -> None:
    """Run the parts that are asked for, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--workloads", help="groups of a round x completions of a group, with commas")
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--repeats", type=int, default=5, help="of throughput; the one in the middle is reported")
    parser.add_argument("--short", action="store_true", help="few rounds: to see that it runs")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, CPU seconds: where other work goes on")
    args = parser.parse_args()
    if args.cpu_time and args.engine == "vllm":
        parser.error("vLLM computes in a process of its own, which --cpu-time does not see")
    clock = time.process_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        torch.set_num_threads(1)
    few, tiny = args.short, load_policy(ModelConfig(name="tiny"))
    config = EngineConfig(backend=args.engine, max_slots=_MAX_SLOTS)
    shared = make_engine(tiny, config, max_seq_len=_CAP + _MAX_PROMPT) if args.engine == "vllm" else None
    bench = Bench(tiny, clock, shared)

    def rounds(usual: Mapping[str, int]) -> dict[str, int]:
        chosen = args.workloads.split(",") if args.workloads else [*usual]
        return {one: 2 if few else usual.get(one, 10) for one in chosen}

    parts: dict[str, Callable[[], tuple[dict[str, Any], list[Bar]]]] = {
        "throughput": lambda: throughput(bench, rounds({"4x4": 2} if few else _WORKLOADS), 1 if few else args.repeats),
        "discarded": lambda: discarded(bench, 12 if few else 200),
        "overhead": lambda: overhead(bench, 10 if few else 200),
        "own": lambda: own(rounds({"4x4": 4}), clock),
        "learning": lambda: learning(range(1 if few else 5), 20 if few else 40, clock),
        "reckoned": reckoned,
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
    if bench.engine is not None:
        bench.engine.close()
    report(
        figures | {"engine": args.engine, "seconds": "of the CPU, one thread" if args.cpu_time else "wall time"}, bars
    )


if __name__ == "__main__":
    main()
