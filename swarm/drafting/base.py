"""The contract of a drafter: tokens that a running sequence may write next.

The engine verifies them and keeps those that the policy draws itself, so a draft changes how fast a completion is
written, and nothing else. A drafter knows no engine: it sees tokens and, if it wants to, what the policy's last layer
said after them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from swarm.drafting.worth import UNKNOWN, Worth

__all__ = [
    "HASH_BASE",
    "HASH_MASK",
    "Drafter",
    "Drawing",
    "Seen",
    "SequenceState",
    "extend_hashes",
    "within_budget",
]

HASH_BASE = 0x9E3779B97F4A7C15
HASH_MASK = (1 << 64) - 1


def extend_hashes(hashes: list[int], tokens: Sequence[int]) -> None:
    """Append the hash of every prefix of `tokens` that `hashes` lacks; the first one, 0, is of the empty prefix.

    The hash of the n tokens before i is hashes[i] - hashes[i - n] * HASH_BASE**n, modulo 2**64: one subtraction for
    a context of any length. A collision costs a bad draft.
    """
    last = hashes[-1]
    for index in range(len(hashes) - 1, len(tokens)):
        last = (last * HASH_BASE + tokens[index] + 1) & HASH_MASK
        hashes.append(last)


def within_budget(drafts: Sequence[list[int]], chances: Sequence[Sequence[float]], budget: int) -> list[list[int]]:
    """Shorten drafts to the `budget` likeliest tokens of all.

    chances: that all of a draft up to a token is right, for each of its tokens. They fall along a draft, so that the
    likeliest tokens of all are beginnings of drafts.
    """
    if sum(map(len, drafts)) <= budget:
        return list(drafts)
    likeliest = sorted((-one, place) for place, chance in enumerate(chances) for one in chance)[:budget]
    nums = [0] * len(drafts)
    for _, place in likeliest:
        nums[place] += 1
    return [draft[:num] for draft, num in zip(drafts, nums, strict=True)]


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the tokens of a sequence are drawn, for drafters that draw as well."""

    seed: int  # of its noise, as a signed 64-bit number
    temperature: float
    top_k: int
    top_p: float


@dataclass(frozen=True, slots=True)
class Seen:
    """Which states of a forward pass are of a sequence."""

    request_id: int
    first: int  # position of the first token
    row: int  # of the state after it
    num: int


class SequenceState:
    """One running sequence, as drafters see it. Who runs it appends its tokens."""

    __slots__ = ("_hashes", "drawing", "prompt_ids", "request_id", "room", "tokens")

    def __init__(self, request_id: int, prompt_ids: Sequence[int], drawing: Drawing | None = None) -> None:
        self.request_id = request_id
        self.drawing = drawing
        self.prompt_ids = tuple(prompt_ids)  # sequences with one prompt are of one group
        self.tokens = list(prompt_ids)  # the prompt and what has been written
        self.room = 0  # the most tokens that are worth drafting now
        self._hashes = [0]

    @property
    def num_written(self) -> int:
        """Tokens of the completion."""
        return len(self.tokens) - len(self.prompt_ids)

    def append(self, tokens: Iterable[int]) -> None:
        """Take tokens that have been written."""
        self.tokens.extend(tokens)

    def prefix_hashes(self) -> list[int]:
        """Return the hashes of all prefixes (`extend_hashes`), to be read."""
        if len(self._hashes) <= len(self.tokens):
            extend_hashes(self._hashes, self.tokens)
        return self._hashes


class Drafter(ABC):
    """Proposes tokens. Not thread-safe: the engine's thread calls it, between two forward passes."""

    name: ClassVar[str]
    num_states: ClassVar[int] = 0  # the most states of a prompt that it wants to see; 0: `saw` need not be called

    def saw(self, seen: Callable[[], Iterable[Seen]], states: Any) -> None:
        """Take what a forward pass of the policy said. states: tensor [num_rows, hidden], not to be changed.

        seen: says of what the states are; most passes are never asked.
        """
        return

    @abstractmethod
    def propose(
        self, states: Sequence[SequenceState], depth: int, budget: int, worth: Worth = UNKNOWN
    ) -> list[list[int]]:
        """Return a draft, maybe empty, for each sequence.

        None is longer than `depth` or the sequence's `room`; all of them together are `budget` tokens at most. Tokens
        that are not worth verifying are left out, as far as the drafter can tell.
        """

    def verified(self, state: SequenceState, draft: Sequence[int], num_kept: int) -> None:
        """Learn how many tokens of the last draft of a sequence the policy drew itself."""
        return

    @abstractmethod
    def observe(self, state: SequenceState) -> None:
        """Take what a sequence holds that does not run any more. Its request id may be used again."""

    def learn(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take a completion of a prompt from elsewhere: of an earlier round, or admitted from the swarm."""
        return

    def policy_changed(self, version: int, weights: Mapping[str, Any] | None = None) -> None:
        """The policy has new weights: what was learned of it counts for less.

        weights: the policy's, for drafters that share some; good until they are next trained on.
        """
        return
