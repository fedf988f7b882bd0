"""The contract of a drafter: tokens that a running sequence may write next.

The engine verifies them and keeps those that the policy draws itself, so a draft changes how fast a completion is
written, and nothing else. A drafter knows no engine and no model: it sees tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

__all__ = ["HASH_BASE", "HASH_MASK", "Drafter", "SequenceState", "extend_hashes"]

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


class SequenceState:
    """One running sequence, as drafters see it. Who runs it appends its tokens."""

    __slots__ = ("_hashes", "prompt_ids", "request_id", "room", "tokens")

    def __init__(self, request_id: int, prompt_ids: Sequence[int]) -> None:
        self.request_id = request_id
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

    @abstractmethod
    def propose(self, states: Sequence[SequenceState], depth: int, budget: int) -> list[list[int]]:
        """Return a draft, maybe empty, for each sequence.

        None is longer than `depth` or the sequence's `room`; all of them together are `budget` tokens at most.
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

    def policy_changed(self, version: int) -> None:
        """The policy has new weights: what was learned of it counts for less."""
        return
