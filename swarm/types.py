"""The records that pass between the parts of a round: completions, groups, and what the trainer learns from.

    tasks ──Task──▶ rollout ──RolloutGroup──▶ scoring ──rewards──▶ sapo ──TrainingBatch──▶ trainer

A *group* is all completions of one question (SAPO calls a group a rollout; arXiv 2509.08721, section 3).
"""

from dataclasses import dataclass, replace
from typing import Literal

from protocol.messages import TaskRef

__all__ = ["Completion", "FinishReason", "RolloutGroup", "Segment", "Task", "TrainingBatch", "TrainingGroup"]

FinishReason = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class Task:
    """A question with the reference that regenerates it. The answer stays with the source's verifier."""

    ref: TaskRef
    question: str


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens `[start, end)` of a completion, written by one version of the policy."""

    policy_version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine wrote for one request.

    `token_ids` ends with the EOS token if and only if `finish_reason` is "stop". `logprobs` holds the
    behaviour log-probability of every token under the distribution that it was sampled from (after
    temperature, top-k and top-p), in nats. `segments` cover `token_ids` without gaps. Both are empty for a
    completion that another node wrote: its distribution and its policy are not known here.
    """

    request_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    segments: tuple[Segment, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """All completions of one task; `rewards` is empty until it has been scored."""

    task: Task
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]  # one per completion, special tokens removed
    rewards: tuple[float, ...] = ()  # one per completion, each in [0, 1]
    num_masked: tuple[int, ...] = ()  # one per completion: first tokens that are not trained on; empty: none are

    def with_rewards(self, rewards: tuple[float, ...]) -> "RolloutGroup":
        """Return the same group, scored."""
        if len(rewards) != len(self.completions):
            raise ValueError(f"{len(rewards)} rewards for {len(self.completions)} completions")
        return replace(self, rewards=rewards)

    def with_more(self, more: "RolloutGroup") -> "RolloutGroup":
        """Return the group with further completions of the same task, scored if both are."""
        if more.task != self.task or self.num_masked or more.num_masked:
            raise ValueError("only whole groups of one task can be joined")
        return replace(
            self,
            completions=self.completions + more.completions,
            texts=self.texts + more.texts,
            rewards=self.rewards + more.rewards,
        )


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """One group as the trainer sees it: token ids and one advantage per completion.

    `behavior_logprobs` of a completion is None where its author's distribution is unknown (an external
    group): it is then trained on as if the own policy had written it (SAPO, section 3).
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    advantages: tuple[float, ...]
    behavior_logprobs: tuple[tuple[float, ...] | None, ...]
    num_masked: tuple[int, ...] = ()  # first tokens of each completion that are not trained on; empty: none are


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What one update learns from. Groups without any advantage have been left out."""

    groups: tuple[TrainingGroup, ...]
    num_own_zero_advantage: int = 0  # own groups that were chosen and left out
    num_external_zero_advantage: int = 0  # external groups that were discarded before the choice
    num_external_missing: int = 0  # wanted from the swarm and not there

    @property
    def num_completions(self) -> int:
        """Completions in the batch."""
        return sum(len(group.completion_ids) for group in self.groups)
