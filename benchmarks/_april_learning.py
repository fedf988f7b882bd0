"""What partial rollouts learn, against synchronous ones: held-out pass@1 at equal optimizer steps and at equal time.

`tiny` counts down: "down 5" is answered by "5 4 3 2 1". Where it begins is log-normal, so that half of the answers have
up to 10 tokens and one in a hundred 100 and more. It is taught that for a little while, as a model is before it learns
from rewards, and then learns from rewards alone: 1 for a countdown without a mistake. The ways take turns, round by
round, each with a policy, an engine and a trainer of its own, over the same questions, seeds and settings. A round is
timed whole: rollouts, scoring, update. Evaluations are not timed.
"""

import copy
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from swarm.types import Task, TrainingBatch, TrainingGroup

__all__ = ["learning"]

_NUM_GROUPS, _NUM_COMPLETIONS, _MAX_TOKENS = 4, 4, 224
_NUM_EVALUATIONS, _NUM_ITEMS = 10, 256
_ROLLOUT = RolloutConfig(num_completions=_NUM_COMPLETIONS, max_new_tokens=_MAX_TOKENS, schedule="partial")
_WAYS = {
    "synchronous": _ROLLOUT.model_copy(update={"schedule": "synchronous"}),
    "partial": _ROLLOUT,
    "partial, tokens kept": _ROLLOUT.model_copy(update={"stale_tokens": "correct"}),
}
_MAX_SEQ_LEN = 256
_LEARNING_RATE = 1e-4
_MEDIAN_START, _SIGMA, _MOST_START = 8, 1.0, 70
_NUM_LESSONS, _LESSON = 90, 16  # optimizer steps, and answers of each


def _start(rng: random.Random) -> int:
    """Return where a countdown begins."""
    return max(1, min(_MOST_START, round(_MEDIAN_START * math.exp(_SIGMA * rng.gauss(0.0, 1.0)))))


def _question(start: int, salt: int) -> str:
    return f"down {start} {salt}"


def _answer(start: int) -> str:
    return " ".join(map(str, range(start, 0, -1)))


def _tasks_config(folder: Path) -> TasksConfig:
    """Write the questions, and return where they come from. The second number of a question means nothing."""
    path, rng = folder / "countdown.jsonl", random.Random(0)
    starts = [_start(rng) for _ in range(4000)]
    lines = [
        {"question": _question(start, salt), "answer": _answer(start), "verifier": "exact"}
        for salt, start in enumerate(starts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TasksConfig.model_validate({"answer": ["whole_text"], "sources": [{"name": str(path)}]})


def _taught() -> Mapping[str, torch.Tensor]:
    """Return weights of `tiny` that were shown some countdowns: an advantage of 1 is the gradient of likelihood."""
    policy, rng = load_policy(ModelConfig(name="tiny")), random.Random(1)
    trainer = Trainer(policy.model, TrainerConfig(learning_rate=1e-3, warmup_updates=10, normalization="dapo"))
    for _ in range(_NUM_LESSONS):
        groups = []
        for start in (_start(rng) for _ in range(_LESSON)):
            ids = policy.encode_completion(_answer(start), finished=True)
            assert ids is not None
            prompt_ids = policy.encode_prompt(_question(start, rng.randrange(4000)))
            groups.append(TrainingGroup(prompt_ids, (ids,), (1.0,), (None,)))
        trainer.update(TrainingBatch(tuple(groups)))
    return copy.deepcopy(trainer.policy_state())


class _Learner:
    """One way of learning, from the weights that were taught."""

    def __init__(
        self, taught: Mapping[str, torch.Tensor], tasks: TaskSet, scorer: ScoringPool, rollout: RolloutConfig,
        seed: int, num_rounds: int, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.tasks, self.scorer, self.seed, self.num_rounds, self.clock = tasks, scorer, seed, num_rounds, clock
        self.policy = load_policy(ModelConfig(name="tiny"))
        self.policy.model.load_state_dict(taught)
        self.engine = TorchEngine(
            self.policy.model, eos_token_ids=self.policy.eos_token_ids, config=EngineConfig(max_slots=64),
            max_seq_len=_MAX_SEQ_LEN,
        )  # fmt: skip
        self.trainer = Trainer(
            self.policy.model, TrainerConfig(learning_rate=_LEARNING_RATE), max_completion_tokens=rollout.max_new_tokens
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
    taught: Mapping[str, torch.Tensor], seed: int, num_rounds: int, config: TasksConfig, scorer: ScoringPool,
    clock: Callable[[], float],
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Let all learn, and return what they came to."""
    tasks = build_task_set(config, seed)
    learners = {
        name: _Learner(taught, tasks, scorer, rollout, seed, num_rounds, clock) for name, rollout in _WAYS.items()
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


def _differences(found: dict[str, dict[str, Any]], way: str) -> Iterator[float]:
    """A way less synchronous, at times over the run of the quicker one."""
    curves = {name: list(zip(one["seconds"], one["pass_at_1"], strict=True)) for name, one in found.items()}
    until = min(curves[way][-1][0], curves["synchronous"][-1][0])
    for at in (until * step / _NUM_EVALUATIONS for step in range(1, _NUM_EVALUATIONS + 1)):
        yield _at_time(curves[way], at) - _at_time(curves["synchronous"], at)


def learning(seeds: Sequence[int], num_rounds: int, clock: Callable[[], float]) -> tuple[dict[str, Any], list[Bar]]:
    """Return the curves of every seed, and how the ways compare."""
    taught = _taught()
    with tempfile.TemporaryDirectory() as folder:
        config = _tasks_config(Path(folder))
        scorer = ScoringPool(config, ScoringConfig())
        scorer.start()
        try:
            runs = {str(seed): _seed(taught, seed, num_rounds, config, scorer, clock) for seed in seeds}
        finally:
            scorer.close()
    figures: dict[str, Any] = {
        "runs": runs, "pass_at_1": {name: [run[name]["pass_at_1"][-1] for run in runs.values()] for name in _WAYS}
    }  # fmt: skip
    bars = []
    for way in (name for name in _WAYS if name != "synchronous"):
        pairs = [(run[way], run["synchronous"]) for run in runs.values()]
        at_steps = [one["pass_at_1"][-1] - plain["pass_at_1"][-1] for one, plain in pairs]
        over_time = [list(_differences(run, way)) for run in runs.values()]
        figures[way] = {
            "times_as_fast": [round(plain["seconds"][-1] / one["seconds"][-1], 3) for one, plain in pairs],
            "at_equal_time": [round(statistics.fmean(one), 4) for one in over_time],
        }
        means = {
            "at equal steps": statistics.fmean(at_steps),
            "at equal time, the end": statistics.fmean(one[-1] for one in over_time),
            "at equal time, over the run": statistics.fmean(x for one in over_time for x in one),
        }
        bars += [Bar(f"pass@1 {when}, {way} less synchronous", round(mean, 4), 0.0) for when, mean in means.items()]
    return figures, bars
