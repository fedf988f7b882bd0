"""What one member has done, counted since it started. Refusals are counted in `refusals`, bytes by the transport."""

from collections import deque
from dataclasses import dataclass, field

__all__ = ["Counters", "Means"]

_MAX_RECENT = 256


@dataclass(slots=True)
class Means:
    """The mean and the largest of the last values of something."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))

    def add(self, value: float) -> None:
        """Take one value."""
        self.values.append(value)

    @property
    def mean(self) -> float | None:
        """Of the last values; None before the first."""
        return sum(self.values) / len(self.values) if self.values else None

    def quantile(self, share: float) -> float | None:
        """The value below which this share of the last values lies; None before the first."""
        ranked = sorted(self.values)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else None

    @property
    def largest(self) -> float | None:
        """Of the last values; None before the first."""
        return max(self.values, default=None)


@dataclass(slots=True)
class Counters:
    """Whole numbers since the start, and the last values of a few measures."""

    batches_published: int = 0
    groups_published: int = 0
    announcements_seen: int = 0  # offers of announcements, by push or repair, known or new
    announcements_sent: int = 0
    batches_heard: int = 0  # announcements that were new and good
    batches_admitted: int = 0  # of which a group was admitted
    batches_relayed: int = 0  # of others, announced to neighbours
    groups_admitted: int = 0
    groups_sampled: int = 0
    groups_missing: int = 0  # asked for, and not there
    frames_pulled: int = 0
    frames_failed: int = 0  # given up after several holders
    frames_served: int = 0
    pulls_from_neighbours: int = 0
    pulls_from_strangers: int = 0
    repairs_asked: int = 0
    repairs_answered: int = 0
    requests_failed: int = 0
    reward_of_admitted: Means = field(default_factory=Means)  # mean reward of a group, by this node's verifier
    latency_s: Means = field(default_factory=Means)  # from a batch's creation until a group of it is admitted
    authors_sampled: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_RECENT))  # of the last groups
    age_of_sampled_s: Means = field(default_factory=Means)  # staleness of a group when it is used
