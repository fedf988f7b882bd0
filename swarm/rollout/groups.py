"""What a scheduler holds of a group that is being written, and its form on the disk. No engine here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from swarm.compact import pack_floats, pack_ids, unpack_floats, unpack_ids
from swarm.engine.base import SamplingParams
from swarm.types import Completion, FinishReason, Segment

__all__ = ["Group", "GroupKey", "Member"]

GroupKey: TypeAlias = tuple[int, int]  # the round that asks, and the place in it: keys grow in the order of asking


@dataclass(slots=True)
class Member:
    """One completion of a group, as far as it has been written."""

    seed: int
    written: Completion | None = None

    @property
    def is_finished(self) -> bool:
        """Whether its end has been written."""
        return self.written is not None and self.written.finish_reason != "aborted"

    @property
    def num_tokens(self) -> int:
        """Tokens that have been written."""
        return 0 if self.written is None else len(self.written.token_ids)

    def is_of(self, policy_version: int) -> bool:
        """Whether this version of the policy wrote all of it."""
        parts = () if self.written is None else self.written.segments
        if len(parts) == 1:
            return parts[0].policy_version == policy_version
        return all(part.policy_version == policy_version for part in parts)


@dataclass(slots=True)
class Group:
    """A group in flight. It leaves the scheduler once, whole."""

    key: GroupKey
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    members: list[Member]
    submitted_version: int
    num_runs: int = 0  # of the scheduler, since it was submitted
    finished_as: int = 0  # its place in the order of arrival; 0: it has not arrived

    @property
    def num_tokens(self) -> int:
        """Tokens that have been written."""
        return sum(member.num_tokens for member in self.members)

    @property
    def is_finished(self) -> bool:
        """Whether every member has its end."""
        return all(member.is_finished for member in self.members)

    def age(self, policy_version: int) -> int:
        """Policy versions since it was submitted; runs of the scheduler where the policy stood still."""
        return max(policy_version - self.submitted_version, self.num_runs)

    def expected_remaining(self) -> float:
        """Tokens that its longest member may still need, by what its finished siblings needed.

        Siblings of one prompt tend to be of one length. A member that is longer than all of them is expected to need
        as much again as it has, which is what a heavy tail does.
        """
        if not self.num_tokens:
            return 1.0
        finished = [member.num_tokens for member in self.members if member.is_finished]
        most = 0.0
        for member in self.members:
            if member.is_finished:
                continue
            have = member.num_tokens
            longer = [length for length in finished if length > have]
            expected = sum(longer) / len(longer) - have if longer else max(have, 1)
            most = max(most, min(expected, self.sampling.max_new_tokens - have))
        return most

    def to_plain(self) -> dict[str, Any]:
        """Return what `from_plain` takes, for MessagePack."""
        return {
            "key": list(self.key),
            "prompt": pack_ids(self.prompt_ids),
            "version": self.submitted_version,
            "runs": self.num_runs,
            "finished_as": self.finished_as,
            "members": [[member.seed, _completion_to_plain(member.written)] for member in self.members],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], sampling: SamplingParams) -> "Group":
        """Return the group that was written."""
        members = [Member(seed, _completion_from_plain(written)) for seed, written in plain["members"]]
        round_index, place = plain["key"]
        return cls(
            (round_index, place), unpack_ids(plain["prompt"]), sampling, members,
            plain["version"], plain["runs"], plain["finished_as"],
        )  # fmt: skip


def _completion_to_plain(completion: Completion | None) -> list[Any] | None:
    if completion is None:
        return None
    segments = [[part.policy_version, part.start, part.end] for part in completion.segments]
    return [pack_ids(completion.token_ids), pack_floats(completion.logprobs), segments, completion.finish_reason]


def _completion_from_plain(plain: list[Any] | None) -> Completion | None:
    if plain is None:
        return None
    ids, logprobs, segments, reason = plain
    parts = tuple(Segment(version, start, end) for version, start, end in segments)
    return Completion(0, unpack_ids(ids), unpack_floats(logprobs), parts, cast(FinishReason, reason))
