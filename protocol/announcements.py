"""What this node knows of live batches: who announced them, who holds which frames, what is still worth pulling.

Only announcements whose signature was verified are here. Everything is bounded: batches in all (the source that told
of most gives way first, so that a flood crowds out itself), batches of one author (the newest), holders of a batch.

A frame is worth pulling once: `taken` marks those that are pulled, under way, refused or given up.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from protocol.messages import Announcement
from protocol.refusals import Reason

__all__ = ["MAX_HOLDERS", "Announcements", "LiveBatch"]

MAX_FAILURES = 12  # pulls of one batch that may bring nothing, before offers of it count no more
MAX_HOLDERS = 8  # of one batch that are remembered, beside its author
_MAX_AUTHORS_FACTOR = 4  # authors whose sequence numbers are remembered, for every live batch that may be


@dataclass(slots=True)
class LiveBatch:
    """One announced batch."""

    announcement: Announcement
    teller: str  # node id of who told of it first
    heard_at_s: float  # unix seconds, by this node's clock
    taken: int = 0  # bit mask: frames that are not to be pulled (any more)
    holders: dict[str, int] = field(default_factory=dict)  # node id -> bit mask of frames
    given_up: int = 0  # bit mask: of those taken, frames that nobody gave; whoever offers them is asked once more
    num_failures: int = 0  # pulls that brought nothing, over all holders
    relayed: bool = False  # announced to neighbours by this node

    @property
    def root(self) -> bytes:
        """What names the batch."""
        return self.announcement.root

    @property
    def author(self) -> str:
        """Its author's node id."""
        return self.announcement.author

    @property
    def created_at_s(self) -> float:
        """Unix seconds by the author's clock."""
        return self.announcement.created_at_ms / 1000

    @property
    def all_frames(self) -> int:
        """A bit for every frame."""
        return (1 << len(self.announcement.frame_sizes)) - 1

    @property
    def open(self) -> int:
        """The frames worth pulling, as bits."""
        return self.all_frames & ~self.taken


@dataclass(slots=True)
class _Author:
    """The newest sequence numbers of one author."""

    roots: dict[int, bytes] = field(default_factory=dict)  # by sequence number
    floor: int = -1  # this one and those below it are no longer told apart
    newest_s: float = 0.0  # when its newest batch was created or heard, whichever is later


class Announcements:
    """Live batches by root, in the order in which they were heard."""

    def __init__(self, *, max_batches: int, max_batches_per_author: int, freshness_s: float) -> None:
        self._max_batches, self._max_per_author, self._freshness_s = max_batches, max_batches_per_author, freshness_s
        self._batches: dict[bytes, LiveBatch] = {}
        self._open: dict[bytes, LiveBatch] = {}  # of these, those with frames worth pulling
        self._num_by_teller = Counter[str]()
        self._num_by_author = Counter[str]()
        self._authors: dict[str, _Author] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, root: bytes) -> LiveBatch | None:
        """Return a live batch."""
        return self._batches.get(root)

    def roots(self) -> list[bytes]:
        """Every live batch, in the order in which they were heard."""
        return list(self._batches)

    @property
    def authors(self) -> Collection[str]:
        """Authors of live batches."""
        return self._num_by_author.keys()

    @property
    def num_authors_remembered(self) -> int:
        """Authors whose sequence numbers are remembered."""
        return len(self._authors)

    def roots_not_wanted(self) -> list[bytes]:
        """The batches of which nobody needs to tell: all but those of which frames were given up."""
        return [root for root, batch in self._batches.items() if not batch.given_up]

    def newest_open(self) -> Iterator[LiveBatch]:
        """Batches with frames worth pulling, those heard last first. Not to be changed meanwhile."""
        return reversed(self._open.values())

    def check(self, announcement: Announcement) -> Reason | None:
        """Return why an announcement tells nothing new, as far as its sequence number shows; None if it does."""
        if announcement.root in self._batches:
            return Reason.DUPLICATE
        author = self._authors.get(announcement.author)
        if author is None:
            return None
        known = author.roots.get(announcement.sequence)
        if known is not None:
            return Reason.DUPLICATE if known == announcement.root else Reason.CONFLICT
        return Reason.REPLAYED if announcement.sequence <= author.floor else None

    def add(self, announcement: Announcement, teller: str, now_s: float) -> LiveBatch:
        """Take an announcement that `check` has nothing against, and whose signature is good."""
        batch = LiveBatch(announcement, teller, now_s)
        self._remember(announcement, now_s)
        if len(self._batches) >= self._max_batches:
            self._make_room()
        self._batches[batch.root] = self._open[batch.root] = batch
        self._num_by_teller[teller] += 1
        self._num_by_author[batch.author] += 1
        return batch

    def hold(self, batch: LiveBatch, holder: str, frames: int) -> None:
        """Note that a peer says it holds these frames."""
        frames &= batch.all_frames
        if holder in batch.holders:
            batch.holders[holder] |= frames
        elif frames and len(batch.holders) < MAX_HOLDERS:
            batch.holders[holder] = frames
        again = frames & batch.given_up
        if again and batch.num_failures < MAX_FAILURES:
            batch.given_up &= ~again
            self.give_back(batch, again)

    def take(self, batch: LiveBatch, frames: int) -> None:
        """Mark frames as not to be pulled."""
        batch.taken |= frames
        if not batch.open:
            self._open.pop(batch.root, None)

    def give_back(self, batch: LiveBatch, frames: int) -> None:
        """Let frames be pulled again, last in turn."""
        batch.taken &= ~frames
        if batch.open and batch.root in self._batches:
            self._open.setdefault(batch.root, batch)

    def forget_author(self, author: str) -> None:
        """Drop the live batches of an author; its sequence numbers stay known."""
        for batch in [batch for batch in self._batches.values() if batch.author == author]:
            self._drop(batch)

    def expire(self, now_s: float) -> list[bytes]:
        """Drop what is too old to be used; return the roots."""
        horizon_s = now_s - self._freshness_s
        old = [batch for batch in self._batches.values() if batch.created_at_s < horizon_s]
        for batch in old:
            self._drop(batch)
        # Whatever an author signed before this is refused by its age: its numbers need not be known.
        for name in [name for name, author in self._authors.items() if author.newest_s < horizon_s]:
            del self._authors[name]
        return [batch.root for batch in old]

    def state(self) -> list[Any]:
        """The sequence numbers as plain data that `restore` takes: after a restart a replay is still one."""
        return [[name, a.floor, a.newest_s, [[s, r] for s, r in a.roots.items()]] for name, a in self._authors.items()]

    def restore(self, state: list[Any]) -> None:
        """Go on from what `state` gave."""
        for name, floor, newest_s, roots in state:
            self._authors[name] = _Author(dict(roots), floor, newest_s)

    def _remember(self, announcement: Announcement, now_s: float) -> None:
        author = self._authors.pop(announcement.author, None) or _Author()
        self._authors[announcement.author] = author  # last: the first ones are those not heard for longest
        author.roots[announcement.sequence] = announcement.root
        author.newest_s = max(author.newest_s, now_s, announcement.created_at_ms / 1000)
        if len(author.roots) > self._max_per_author:
            author.floor = min(author.roots)
            stale = self._batches.get(author.roots.pop(author.floor))
            if stale is not None:
                self._drop(stale)
        if len(self._authors) > _MAX_AUTHORS_FACTOR * self._max_batches:
            del self._authors[next(iter(self._authors))]

    def _make_room(self) -> None:
        """Drop an eighth of what the source that told of most has told: the oldest of it."""
        teller, num_told = self._num_by_teller.most_common(1)[0]
        told = (batch for batch in self._batches.values() if batch.teller == teller)
        for batch, _ in list(zip(told, range(max(1, num_told // 8)), strict=False)):
            self._drop(batch)

    def _drop(self, batch: LiveBatch) -> None:
        if self._batches.pop(batch.root, None) is None:
            return
        self._open.pop(batch.root, None)
        for counts, name in ((self._num_by_teller, batch.teller), (self._num_by_author, batch.author)):
            counts[name] -= 1
            if not counts[name]:
                del counts[name]
