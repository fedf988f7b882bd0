"""Why a node refuses what a peer sent: every reason by name, whether it is held against the peer, and how often.

A *rejected* thing is one that no honest node of this protocol sends: whoever sent it, or signed it, loses
reputation. An *ignored* one may come from an honest node: late, twice, of another version, over a quota. Both
are dropped, and both are counted. Which of sender and author pays for what is `admission`'s to say; errors of the
connection are the transport's and have names of their own.
"""

from collections.abc import Mapping
from enum import StrEnum

from protocol.errors import ProtocolError
from protocol.limits import MAX_REFUSAL_DETAIL_CHARS

__all__ = ["Reason", "Refusal", "RefusalCounter"]


class Reason(StrEnum):
    """A reason's value is its name in counters, in statistics and in a transport's refusal code."""

    penalised: bool

    def __new__(cls, value: str, penalised: bool = False) -> "Reason":
        """Make a member of its name and of whether the peer is to blame."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.penalised = penalised
        return member

    # Rejected: no honest node sends it.
    OVERSIZE = "oversize", True  # something over a limit of `limits`
    BAD_SCHEMA = "bad_schema", True  # not canonical MessagePack, or not the fields that the record has
    BAD_COMPRESSION = "bad_compression", True  # not one zstd frame that holds what its header declares
    BAD_SIGNATURE = "bad_signature", True  # forged, altered, or signed for another swarm: they look alike
    WRONG_DIGEST = "wrong_digest", True  # frames that are not those announced
    WRONG_IDENTITY = "wrong_identity", True  # says hello with the record of a node that it is not
    UNASKED = "unasked", True  # a response that holds what was not asked for
    CONFLICT = "conflict", True  # a second, different batch under a sequence number that the author has used
    INVALID_TASK = "invalid_task", True  # a source known here, and an item or completions that it cannot have

    # Ignored: an honest node may send it.
    DUPLICATE = "duplicate", False  # known already
    OWN = "own", False  # this node's own, come back
    STALE = "stale", False  # older than the freshness window allows
    FUTURE = "future", False  # dated ahead of this node's clock: one of the two clocks is wrong
    REPLAYED = "replayed", False  # a sequence number below those that are still remembered
    QUOTA = "quota", False  # more than one author or one peer may send in its time
    BANNED = "banned", False  # from a node whose reputation is spent
    POOL_FULL = "pool_full", False  # no room, and no less useful group to give up for it
    UNKNOWN_TASK = "unknown_task", False  # a task source that this node does not have
    HELD_OUT = "held_out", False  # a question that this node keeps for evaluation
    UNENCODABLE = "unencodable", False  # text for which this node's tokenizer has no tokens
    TOO_LONG = "too_long", False  # completions longer than this node trains on
    UNINFORMATIVE = "uninformative", False  # all rewards equal: nothing to learn from
    UNKNOWN_MINOR = "unknown_minor", False  # uses what only a newer minor version explains
    OTHER_MAJOR = "other_major", False  # another major version: one of the two should upgrade
    OTHER_SWARM = "other_swarm", False  # says hello for another swarm
    OTHER_TRANSPORT = "other_transport", False  # a node that this one's transport cannot reach
    CLOCK_SKEW = "clock_skew", False  # says hello with a clock too far from this node's
    NOT_HELD = "not_held", False  # asked for a batch that this node does not hold
    NO_HELLO = "no_hello", False  # asked before the two have said hello
    FULL = "full", False  # asked to be a neighbour of a node that has enough of them
    BUSY = "busy", False  # asked while the node answers as many as it can


class Refusal(ProtocolError):
    """Something from a peer that is not taken. Data for whoever talks to the peer: counted, never left to rise."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        """`detail` says what was wrong, for people; what it quotes of the peer's is cut."""
        detail = detail[:MAX_REFUSAL_DETAIL_CHARS]
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason, self.detail = reason, detail


class RefusalCounter:
    """How often each reason has occurred. Exact: one call, one refusal."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        """Begin at zero, or at the counts that an earlier `as_dict` gave."""
        self._counts = {Reason(name): count for name, count in (counts or {}).items()}

    def count(self, reason: Reason, num: int = 1) -> None:
        """Count `num` refusals for one reason."""
        self._counts[reason] = self._counts.get(reason, 0) + num

    def __getitem__(self, reason: Reason) -> int:
        return self._counts.get(reason, 0)

    @property
    def num_rejected(self) -> int:
        """Refusals that were held against a peer."""
        return sum(count for reason, count in self._counts.items() if reason.penalised)

    @property
    def num_ignored(self) -> int:
        """Refusals that were not."""
        return sum(count for reason, count in self._counts.items() if not reason.penalised)

    def as_dict(self) -> dict[str, int]:
        """The reasons that have occurred, in the order of `Reason`, with their counts."""
        return {reason.value: self._counts[reason] for reason in Reason if reason in self._counts}
