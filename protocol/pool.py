"""Admitted groups of other authors, until they are used once, are too old, or must make room.

Sampling is SAPO's (Swarm sAmpling Policy Optimization, arXiv 2509.08721): groups without an advantage are discarded
first, then groups are drawn, uniformly or by weights that the caller gives. Two caps are added to it. While four or
more authors contribute, one of them gives at most a quarter of a batch; and while four or more have a record, all
others together give at most a quarter, however many names they have. What is missing then is the caller's to replace
by own groups.

Pure data: what may enter is `admission`'s.
"""

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from protocol.messages import SharedGroup

__all__ = ["MIN_AUTHORS_FOR_CAPS", "Pool", "PoolEntry", "Weight", "author_cap", "newcomer_cap"]

MIN_AUTHORS_FOR_CAPS = 4


@dataclass(frozen=True, slots=True)
class PoolEntry:
    """A group that was admitted, as this node scored it."""

    key: bytes  # digest of its frame
    author: str  # node id
    created_at_s: float  # unix seconds, by the author's clock
    group: SharedGroup
    frame: bytes  # what it was decoded from: saved with the state, and scored anew after a restart
    rewards: tuple[float, ...]  # of its first completions, by this node's verifier; of all, unless there are very many
    payload: object  # whatever the node wants back with it


Weight = Callable[[PoolEntry], float]  # how likely a group is to be drawn, relative to others; 0: after all others


def author_cap(num_groups: int, num_authors: int, max_share: float) -> int:
    """Return how many of `num_groups` one author may give; all, while too few contribute."""
    if num_authors < MIN_AUTHORS_FOR_CAPS:
        return num_groups
    # Four authors of one group each fill no batch of five: the share rises to what fills it.
    return max(1, math.floor(num_groups * max_share), math.ceil(num_groups / num_authors))


def newcomer_cap(num_groups: int, max_share: float, rng: random.Random) -> int:
    """Return how many of `num_groups` all newcomers together may give.

    A batch of fewer groups than can be shared out takes one of theirs now and then, so that they are heard at all.
    """
    exact = num_groups * max_share
    return math.floor(exact) if exact >= 1 else int(rng.random() < exact)


class Pool:
    """Unused groups, oldest first."""

    def __init__(
        self,
        *,
        max_groups: int,
        max_author_share: float,
        max_newcomer_share: float,
        freshness_s: float,
        rng: random.Random,
    ) -> None:
        self._max_groups, self._freshness_s, self._rng = max_groups, freshness_s, rng
        self._max_author_share, self._max_newcomer_share = max_author_share, max_newcomer_share
        self._entries: dict[bytes, PoolEntry] = {}
        self._num_by_author = Counter[str]()
        self.num_expired = 0  # left unused until too old, or pushed out by newer ones

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """What the frames of its groups take."""
        return sum(len(entry.frame) for entry in self._entries.values())

    def entries(self) -> list[PoolEntry]:
        """What is there."""
        return list(self._entries.values())

    def num_by_author(self) -> Counter[str]:
        """How many unused groups each author has."""
        return self._num_by_author.copy()

    def add(self, entry: PoolEntry) -> bool:
        """Take a group that can be learnt from. Returns False where all that are here are newer, and there is no room.

        The caller sees to it that no group enters twice.
        """
        self._entries[entry.key] = entry
        self._num_by_author[entry.author] += 1
        if len(self._entries) <= self._max_groups:
            return True
        oldest = min(self._entries.values(), key=lambda e: e.created_at_s)
        self._remove(oldest)
        if oldest is entry:
            return False
        self.num_expired += 1
        return True

    def expire(self, now_s: float) -> None:
        """Drop what is too old to learn from."""
        old = [entry for entry in self._entries.values() if now_s - entry.created_at_s > self._freshness_s]
        for entry in old:
            self._remove(entry)
        self.num_expired += len(old)

    def sample(
        self,
        num_groups: int,
        now_s: float,
        *,
        is_newcomer: Callable[[str], bool] | None = None,
        weight: Weight | None = None,
    ) -> list[PoolEntry]:
        """Draw at most `num_groups` groups under the caps, and forget them: each is used at most once.

        `is_newcomer` stands for the second cap; None while it is not in force. Without `weight` all are equally likely.
        """
        self.expire(now_s)
        entries = list(self._entries.values())
        self._rng.shuffle(entries)
        if weight is not None:
            entries = self._by_weight(entries, weight)
        per_author = author_cap(num_groups, len(self._num_by_author), self._max_author_share)
        newcomers_left = newcomer_cap(num_groups, self._max_newcomer_share, self._rng)
        taken = Counter[str]()
        drawn: list[PoolEntry] = []
        for entry in entries:
            if len(drawn) == num_groups:
                break
            if taken[entry.author] >= per_author:
                continue
            if is_newcomer is not None and is_newcomer(entry.author):
                if not newcomers_left:
                    continue
                newcomers_left -= 1
            taken[entry.author] += 1
            drawn.append(entry)
            self._remove(entry)
        return drawn

    def _by_weight(self, entries: list[PoolEntry], weight: Weight) -> list[PoolEntry]:
        """Return groups in an order in which each next one is drawn by weight from those that are left.

        Whose exponential waiting time ends first is next (Efraimidis and Spirakis, "Weighted random sampling with a
        reservoir", 2006).
        """
        waits: dict[bytes, float] = {}
        for entry in entries:
            chance, wait = weight(entry), self._rng.expovariate(1.0)
            if not 0 <= chance < math.inf:
                raise ValueError(f"a weight must be finite and not negative, not {chance}")
            waits[entry.key] = wait / chance if chance else math.inf
        return sorted(entries, key=lambda entry: waits[entry.key])

    def _remove(self, entry: PoolEntry) -> None:
        del self._entries[entry.key]
        self._num_by_author[entry.author] -= 1
        if not self._num_by_author[entry.author]:
            del self._num_by_author[entry.author]
