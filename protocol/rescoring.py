"""Pulled groups that wait for the node's verifier: a bounded queue that is fair by the time that authors take.

The author whose groups have taken least time lately is served first, so that slow groups delay their own author's,
and floods nobody else's. Pure, but for the clock that is passed in.
"""

from collections import deque
from dataclasses import dataclass

from protocol.announcements import LiveBatch

__all__ = ["RescoreJob", "RescoreQueue"]

_HALF_LIFE_S = 60.0
_MAX_AUTHORS = 1024


@dataclass(frozen=True, slots=True)
class RescoreJob:
    """One frame that was pulled, and is the one announced."""

    author: str  # node id
    created_at_s: float  # unix seconds, by the author's clock
    frame: bytes
    key: bytes  # its digest
    batch: LiveBatch | None = None  # what it was pulled from; None for one of the saved pool
    number: int = 0  # in the batch
    leaves: tuple[bytes, ...] = ()  # of the whole batch


class RescoreQueue:
    """Jobs by author. Times are seconds."""

    def __init__(self, max_jobs: int, max_author_share: float) -> None:
        self._max_jobs, self._max_per_author = max_jobs, max(1, int(max_jobs * max_author_share))
        self._waiting: dict[str, deque[RescoreJob]] = {}
        self._spent: dict[str, tuple[float, float]] = {}  # author -> (time taken, as it was at this time)
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    def num_by_author(self) -> dict[str, int]:
        """How many groups of each author wait."""
        return {author: len(jobs) for author, jobs in self._waiting.items()}

    def put(self, job: RescoreJob) -> bool:
        """Take a job; returns False where the queue, or its author's part of it, is full."""
        jobs = self._waiting.get(job.author)
        if self._num_jobs >= self._max_jobs or (jobs is not None and len(jobs) >= self._max_per_author):
            return False
        self._waiting.setdefault(job.author, deque()).append(job)
        self._num_jobs += 1
        return True

    def get(self, now_s: float) -> RescoreJob | None:
        """Return the next job, of the author that has taken least time."""
        if not self._waiting:
            return None
        author = min(self._waiting, key=lambda name: self._spent_s(name, now_s))
        jobs = self._waiting[author]
        job = jobs.popleft()
        if not jobs:
            del self._waiting[author]
        self._num_jobs -= 1
        return job

    def spent(self, author: str, seconds: float, now_s: float) -> None:
        """Book the time that a group has taken."""
        self._spent[author] = (self._spent_s(author, now_s) + seconds, now_s)
        if len(self._spent) > _MAX_AUTHORS:
            del self._spent[min(self._spent, key=lambda name: self._spent_s(name, now_s))]

    def _spent_s(self, author: str, now_s: float) -> float:
        spent_s, at_s = self._spent.get(author, (0.0, now_s))
        return float(spent_s * 0.5 ** (max(0.0, now_s - at_s) / _HALF_LIFE_S))
