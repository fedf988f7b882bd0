"""What partial rollouts learn, against synchronous ones: held-out pass@1 at equal optimizer steps and at equal time.

`tiny` learns sums, which it answers in two or three tokens, beside the larger of two numbers, which it has never been
asked for and rambles on about: half of the answers have up to 8 tokens, one in a hundred more than 50. The two ways
take turns, round by round, each with a policy, an engine and a trainer of its own, over the same questions, seeds and
settings. A round is timed whole: rollouts, scoring, update. Evaluations are not timed.
"""

import json
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from harness import Bar

from swarm import sapo
from swarm.config import EngineConfig, ModelConfig, RolloutConfig, SapoConfig, ScoringConfig, TasksConfig, TrainerConfig
from swarm.engine.torch import TorchEngine
from swarm.evaluation import evaluate
from swarm.policy import load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.scoring import ScoringPool
from swarm.tasks import TaskSet, build_task_set
from swarm.trainer import Trainer
from swarm.types import Task

__all__ = ["learning"]

_NUM_GROUPS, _NUM_COMPLETIONS, _MAX_TOKENS = 4, 8, 128
_NUM_EVALUATIONS, _NUM_ITEMS = 10, 256
_SUMS = {"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}}
_ROLLOUT = RolloutConfig(num_completions=_NUM_COMPLETIONS, max_new_tokens=_MAX_TOKENS, schedule="partial")
_MAX_SEQ_LEN = 192


def _tasks_config(folder: Path) -> TasksConfig:
    """Write the questions that are not reasoning-gym's, and return where all come from."""
    path = folder / "larger.jsonl"
    pairs = [(a, b) for a in range(100) for b in range(100) if a != b]
    random.Random(0).shuffle(pairs)
    lines = [{"question": f"max {a} {b}", "answer": str(max(a, b)), "verifier": "number"} for a, b in pairs[:2000]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TasksConfig.model_validate({"answer": ["whole_text"], "sources": [_SUMS, {"name": str(path)}]})


class _Learner:
    """One way of learning, from the model as it is shipped."""

    def __init__(
        self, tasks: TaskSet, scorer: ScoringPool, rollout: RolloutConfig, seed: int, num_rounds: int,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.tasks, self.scorer, self.seed, self.num_rounds, self.clock = tasks, scorer, seed, num_rounds, clock
        self.policy = load_policy(ModelConfig(name="tiny"))
        self.engine = TorchEngine(
            self.policy.model, eos_token_ids=self.policy.eos_token_ids, config=EngineConfig(max_slots=64),
            max_seq_len=_MAX_SEQ_LEN,
        )  # fmt: skip
        self.trainer = Trainer(
            self.policy.model, TrainerConfig(learning_rate=2e-4), max_completion_tokens=rollout.max_new_tokens
        )
        self.rollouts = (
            PartialRollouts(self.engine, self.policy, rollout, seed, self._ahead)
            if rollout.is_partial
            else RolloutCollector(self.engine, self.policy, rollout, seed)
        )
        self.sapo = SapoConfig(num_local=_NUM_GROUPS)
        self.round_s: list[float] = []
        self.rollout_s = 0.0
        self.lengths: list[int] = []

    def _ahead(self, round_index: int) -> list[Task]:
        return self.tasks.train_batch(round_index, _NUM_GROUPS) if round_index <= self.num_rounds else []

    def play(self, round_index: int) -> None:
        """One round, as `sapo` describes it."""
        begin = self.clock()
        groups = self.rollouts.collect(self.tasks.train_batch(round_index, _NUM_GROUPS), round_index=round_index)
        self.rollout_s += self.clock() - begin
        own = self.scorer.score_groups(groups)
        self.trainer.update(sapo.build_batch(own, [], self.sapo, random.Random(round_index)))
        self.rollouts.load_policy(self.trainer.policy_state(), self.trainer.policy_version)
        self.round_s.append(self.clock() - begin)
        self.lengths += [len(one.token_ids) for group in groups for one in group.completions]

    def pass_at_1(self) -> float:
        """Return the share of held-out questions that the policy answers at the first try."""
        found = evaluate(
            self.engine, self.policy, self.scorer, self.tasks.heldout(_NUM_ITEMS),
            temperature=1.0, max_new_tokens=_MAX_TOKENS, seed=self.seed,
        )  # fmt: skip
        return found.pass_at_1


def _at_time(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return pass@1 after so much time, on straight lines between evaluations. curve: (seconds, pass@1), ascending."""
    for (begin, low), (end, high) in pairwise(curve):
        if seconds <= end:
            return low + (high - low) * (seconds - begin) / (end - begin)
    return curve[-1][1]


def _evaluate(learners: dict[str, _Learner], curves: dict[str, list[float]]) -> dict[str, bool]:
    """Append a point to each curve, and return who has the very weights of the first: they share its point."""
    first, *_ = learners
    expected, same = learners[first].trainer.policy_state(), {}
    for name, one in learners.items():
        state = one.trainer.policy_state()
        same[name] = all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
        curves[name].append(curves[first][-1] if same[name] and name != first else one.pass_at_1())
    return same


def _seed(
    seed: int, num_rounds: int, config: TasksConfig, scorer: ScoringPool, clock: Callable[[], float]
) -> dict[str, dict[str, Any]]:
    """Let both learn, and return what they came to."""
    tasks = build_task_set(config, seed)
    plain = _ROLLOUT.model_copy(update={"schedule": "synchronous"})
    learners = {
        name: _Learner(tasks, scorer, rollout, seed, num_rounds, clock)
        for name, rollout in {"synchronous": plain, "partial": _ROLLOUT}.items()
    }
    curves: dict[str, list[float]] = {name: [] for name in learners}
    same = _evaluate(learners, curves)
    for round_index in range(1, num_rounds + 1):
        for one in learners.values():
            one.play(round_index)
        if round_index % (num_rounds // _NUM_EVALUATIONS) == 0:
            same = _evaluate(learners, curves)
    found: dict[str, dict[str, Any]] = {}
    for name, one in learners.items():
        ends = [0.0, *accumulate(one.round_s)][:: num_rounds // _NUM_EVALUATIONS]
        one.lengths.sort()
        found[name] = {
            "pass_at_1": curves[name], "seconds": [round(end, 3) for end in ends],
            "weights_are_the_synchronous_ones": same[name],
            "rollout_share_of_round": round(one.rollout_s / sum(one.round_s), 3),
            "length_p50": one.lengths[len(one.lengths) // 2], "length_p99": one.lengths[int(0.99 * len(one.lengths))],
            "length_longest": one.lengths[-1],
        }  # fmt: skip
    return found


def _differences(found: dict[str, dict[str, Any]]) -> Iterator[float]:
    """Partial less synchronous, at each time at which the quicker one was evaluated."""
    curves = {name: list(zip(one["seconds"], one["pass_at_1"], strict=True)) for name, one in found.items()}
    until = min(curve[-1][0] for curve in curves.values())
    for at in (until * step / _NUM_EVALUATIONS for step in range(1, _NUM_EVALUATIONS + 1)):
        yield _at_time(curves["partial"], at) - _at_time(curves["synchronous"], at)


def learning(seeds: Sequence[int], num_rounds: int, clock: Callable[[], float]) -> tuple[dict[str, Any], list[Bar]]:
    """Return the curves of every seed, and how the two compare."""
    with tempfile.TemporaryDirectory() as folder:
        config = _tasks_config(Path(folder))
        scorer = ScoringPool(config, ScoringConfig())
        scorer.start()
        try:
            runs = {str(seed): _seed(seed, num_rounds, config, scorer, clock) for seed in seeds}
        finally:
            scorer.close()
    at_steps = [run["partial"]["pass_at_1"][-1] - run["synchronous"]["pass_at_1"][-1] for run in runs.values()]
    over_time = [list(_differences(run)) for run in runs.values()]
    figures = {
        "runs": runs,
        "pass_at_1": {
            name: [run[name]["pass_at_1"][-1] for run in runs.values()] for name in ("synchronous", "partial")
        },
        "times_as_fast": [
            round(run["synchronous"]["seconds"][-1] / run["partial"]["seconds"][-1], 3) for run in runs.values()
        ],
    }
    return figures, [
        Bar("pass@1 at equal steps, partial less synchronous", round(statistics.fmean(at_steps), 4), 0.0),
        Bar("pass@1 at equal time, the end", round(statistics.fmean(one[-1] for one in over_time), 4), 0.0),
        Bar("pass@1 at equal time, over the run", round(statistics.fmean(x for one in over_time for x in one), 4), 0.0),
    ]
