"""Measures one round: how long its phases took, what its groups showed, what its update did.

Names that end in `_s`, `_per_s` or `_bytes` depend on the machine; everything else in a row is a function of the
run's settings.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from protocol.messages import TaskRef
from swarm.advantage import group_advantages
from swarm.config import SapoConfig
from swarm.types import RolloutGroup, TrainingBatch

if TYPE_CHECKING:
    from swarm.evaluation import Evaluation
    from swarm.trainer import UpdateStats

__all__ = ["RoundMeter", "describe_evaluation", "describe_external", "describe_groups", "describe_update"]


class RoundMeter:
    """Times the phases of one round."""

    def __init__(self, clock: Callable[[], float], on_phase: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._begin = clock()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Add the time spent within to a phase."""
        self._on_phase(phase)
        begin = self._clock()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self._clock() - begin

    def round_s(self) -> float:
        """Seconds since the round began, evaluation left out."""
        return self._clock() - self._begin - self.seconds.get("evaluation", 0.0)


def _finite(value: float) -> float | None:
    """JSON has no NaN: a number that is none is null."""
    return value if math.isfinite(value) else None


def describe_groups(
    groups: Sequence[RolloutGroup], config: SapoConfig, again: Collection[TaskRef] = ()
) -> dict[str, float]:
    """Return what the groups of a round show about the policy that wrote them.

    Reward is that of questions drawn from the node's own tasks, each with as many completions: a question that was
    asked `again` is chosen by others, and completions after the first ones by how hard a question is.
    """
    completions = [completion for group in groups for completion in group.completions]
    uniform = [group.rewards for group in groups if group.task.ref not in again]
    rewards = [reward for group in uniform for reward in group[: config.first_completions or None]]
    lengths = [len(completion.token_ids) for completion in completions]
    return {
        "reward_mean": statistics.fmean(rewards),
        "num_groups": len(groups),
        "num_broad": len(groups) - len(uniform),
        "num_groups_zero_advantage": sum(not any(group_advantages(group.rewards, config)) for group in groups),
        "num_completions": len(completions),
        "num_completions_truncated": sum(completion.finish_reason == "length" for completion in completions),
        "completion_length_mean": statistics.fmean(lengths),
        "num_tokens_generated": sum(lengths),
    }


def describe_external(num_own: int, external: Sequence[RolloutGroup], batch: TrainingBatch) -> dict[str, float | None]:
    """Return what the batch came from, and what groups of others were worth by this node's own verifier."""
    rewards = [reward for group in external for reward in group.rewards]
    return {
        "num_local": num_own,
        "num_external": len(external) - batch.num_external_zero_advantage,
        "num_external_missing": batch.num_external_missing,
        "reward_external_mean": statistics.fmean(rewards) if rewards else None,
    }


def describe_evaluation(found: "Evaluation", when: str = "") -> dict[str, Any]:
    """Return held-out pass@1, and that of each task source where there are several. `when` ends the names."""
    row: dict[str, Any] = {f"pass_at_1_heldout{when}": found.pass_at_1}
    if len(found.by_source) > 1:
        row[f"pass_at_1_heldout{when}_by_source"] = dict(found.by_source)
    return row


def describe_update(stats: "UpdateStats | None") -> dict[str, float | None]:
    """Return what an update did; nulls where a round had nothing to learn from."""
    if stats is None:
        return dict.fromkeys(("loss", "grad_norm", "clip_fraction", "tis_mean", "mismatch", "learning_rate"), None)
    return {
        "loss": _finite(stats.loss),
        "grad_norm": _finite(stats.grad_norm),
        "clip_fraction": _finite(stats.clip_fraction),
        "tis_mean": _finite(stats.tis_mean),
        "mismatch": _finite(stats.mismatch),
        "learning_rate": stats.learning_rate,
    }
