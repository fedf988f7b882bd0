"""Held-out pass@1 of the node's own policy: one completion per question, each question once.

Its seeds are its own, so that an evaluation changes nothing about training. Which questions are held out is
`swarm.tasks`'s, what is correct is `swarm.scoring`'s.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from protocol.messages import TaskRef
from swarm.engine.base import Engine, Request, SamplingParams
from swarm.types import Task

__all__ = ["Evaluation", "evaluate"]

_CORRECT = 1.0  # a reward of less is not a pass, whatever partial credit a scorer gives


class _Policy(Protocol):
    def encode_prompt(self, question: str) -> tuple[int, ...]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class _Score(Protocol):
    @property
    def reward(self) -> float: ...


class _Scorer(Protocol):
    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> Sequence[_Score]: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one evaluation found."""

    pass_at_1: float  # share of questions answered fully correctly at the first try
    num_items: int
    by_source: Mapping[str, float]  # the same for the questions of each task source


def evaluate(
    engine: Engine,
    policy: _Policy,
    scorer: _Scorer,
    tasks: Sequence[Task],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Evaluation:
    """Answer every task once and score the answers. The engine must hold no other request."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    requests = [
        Request(index, policy.encode_prompt(task.question), _request_seed(seed, task.ref), sampling)
        for index, task in enumerate(tasks)
    ]
    completions = engine.generate(requests)
    jobs = [
        (task.ref, policy.decode(completion.token_ids)) for task, completion in zip(tasks, completions, strict=True)
    ]
    passed: dict[str, list[bool]] = {}
    for task, score in zip(tasks, scorer.score(jobs), strict=True):
        passed.setdefault(task.ref.source, []).append(score.reward >= _CORRECT)
    by_source = {source: sum(found) / len(found) for source, found in sorted(passed.items())}
    return Evaluation(sum(map(sum, passed.values())) / len(tasks), len(tasks), by_source)


def _request_seed(seed: int, ref: TaskRef) -> int:
    """The same question meets the same noise in every evaluation, so that two evaluations differ by the policy."""
    text = f"evaluation\0{seed}\0{ref.source}\0{ref.digest}\0{ref.seed}\0{ref.index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
