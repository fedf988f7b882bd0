"""What may enter: the checks on announcements and on groups, in the order of their cost, each refusal counted.

    announcement   size, schema → duplicate → the author's quota of signatures → signature → age and replay
    frame          digest (`pulling`) → duplicate → size, schema → re-scoring by the node: task, reward, length

Who pays: for bytes that no honest node relays (schema, signature of an announcement), whoever told; for what the
author has signed (a malformed group, a second batch under one number), the author. What an honest node may send
costs nobody anything. Nothing in a group is ever executed here; what the node's verifier does with its text is its own.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from protocol.announcements import Announcements, LiveBatch
from protocol.limits import MAX_FUTURE_SKEW_S
from protocol.local import Local
from protocol.messages import SharedGroup
from protocol.pool import PoolEntry
from protocol.quota import Quota, Quotas
from protocol.refusals import Reason, Refusal
from protocol.signing import verify_announcement
from protocol.wire import decode_announcement, decode_frame

__all__ = ["TELLERS_FAULT", "Admission", "Rescore", "Rescored", "Verdict", "content_digest"]

Verdict = Literal["scored", "unknown_task", "held_out", "unencodable", "too_long", "invalid"]

# Why an announcement is refused that no honest node passes on: what its author has signed is the author's fault.
TELLERS_FAULT = frozenset(reason for reason in Reason if reason.penalised and reason is not Reason.CONFLICT)

_REASONS: dict[str, Reason] = {
    "unknown_task": Reason.UNKNOWN_TASK,
    "held_out": Reason.HELD_OUT,
    "unencodable": Reason.UNENCODABLE,
    "too_long": Reason.TOO_LONG,
    "invalid": Reason.INVALID_TASK,
}
_MAX_SEEN = 8192  # groups whose content is remembered, so that none is used twice
_SEEN_FOR_S = 1800.0  # for how long: three times as long as a batch is live
_NEWCOMER_BURST_S = 30.0  # a late joiner hears many new authors at once
_TELLER_BURST_S = 64.0


@dataclass(frozen=True, slots=True)
class Rescored:
    """What the node's own verifier says of a group."""

    verdict: Verdict
    rewards: tuple[float, ...] = ()  # where the verdict is "scored": of as many of the first completions as it takes
    informative: bool = False  # whether its advantages are not all zero
    payload: object = None  # whatever the node wants back when the group is sampled


Rescore = Callable[[SharedGroup], Awaitable[Rescored]]


def content_digest(group: SharedGroup) -> bytes:
    """Return 16 bytes that name a group by its task and texts, however it was packed and whoever signed it."""
    found = hashlib.blake2b(digest_size=16)
    task = group.task
    for part in (task.source, task.digest, str(task.seed), str(task.index), *(c.text for c in group.completions)):
        data = part.encode()
        found.update(len(data).to_bytes(8))
        found.update(data)
    return found.digest()


class Admission:
    """The checks of one node."""

    def __init__(self, local: Local, announcements: Announcements, rescore: Rescore | None) -> None:
        self._local, self._announcements, self._rescore = local, announcements, rescore
        config, now_s = local.config, local.clock()
        self._newcomers = Quota(config.max_newcomers_per_s, config.max_newcomers_per_s * _NEWCOMER_BURST_S, now_s)
        self._tellers = Quotas(config.max_announcements_per_s, config.max_announcements_per_s * _TELLER_BURST_S, 1024)
        self._seen: OrderedDict[bytes, float] = OrderedDict()  # content -> when, unix seconds
        self._unknown_in_a_row: OrderedDict[str, int] = OrderedDict()  # by author: groups of sources not known here

    def announcement(self, encoded: bytes, teller: str, *, asked: bool, is_counted: bool = False) -> LiveBatch | Reason:
        """Check one announcement; return its batch, be it new or known, or why it is refused.

        `asked` says that this node asked for it, so that it does not count against what the teller may push;
        `is_counted` that it has been counted against what newcomers may, on the other side of a bridge.
        """
        local, now_s = self._local, self._local.clock()
        local.counters.announcements_seen += 1
        try:
            announcement = decode_announcement(encoded)
            if announcement.author == local.node_id:
                raise Refusal(Reason.OWN)
            known = self._announcements.get(announcement.root)
            if known is not None and known.announcement.encoded == encoded:
                local.refuse(Reason.DUPLICATE)
                return known
            if local.reputation.is_banned(announcement.author, now_s):
                raise Refusal(Reason.BANNED)
            if not asked and not self._tellers.take(teller, now_s):
                raise Refusal(Reason.QUOTA)
            is_newcomer = not is_counted and not local.reputation.is_established(announcement.author, now_s)
            if is_newcomer and not self._newcomers.take(now_s):
                raise Refusal(Reason.QUOTA)
            verify_announcement(local.config.swarm_id, announcement)
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=teller)
            return refusal.reason
        created_at_s = announcement.created_at_ms / 1000
        reason = self._announcements.check(announcement)
        if reason is None and created_at_s > now_s + MAX_FUTURE_SKEW_S:
            reason = Reason.FUTURE
        if reason is None and created_at_s < now_s - local.config.freshness_s:
            reason = Reason.STALE
        if reason is not None:
            local.refuse(reason, blame=announcement.author)
            return reason
        local.counters.batches_heard += 1
        return self._announcements.add(announcement, teller, now_s)

    async def frame(self, author: str, created_at_s: float, frame: bytes, key: bytes) -> PoolEntry | None:
        """Check one frame that its author has signed; return its group, scored, or None where it is refused.

        Takes as long as the node's verifier does. What escapes the verifier is a bug, and rises.
        """
        if self._rescore is None:
            raise RuntimeError("a node that scores nothing pulls nothing")
        local = self._local
        try:
            group = decode_frame(frame)
            content = content_digest(group)
            if content in self._seen:
                raise Refusal(Reason.DUPLICATE)
            self._note_seen(content)
            if local.clock() - created_at_s > local.config.freshness_s:
                raise Refusal(Reason.STALE)
            rescored = await self._rescore(group)
            if rescored.verdict != "scored":
                raise Refusal(_REASONS[rescored.verdict])
            if not 0 < len(rescored.rewards) <= len(group.completions):
                raise ValueError(f"{len(rescored.rewards)} rewards for {len(group.completions)} completions")
            self._unknown_in_a_row.pop(author, None)
            if not rescored.informative:
                raise Refusal(Reason.UNINFORMATIVE)
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=author)
            if refusal.reason is Reason.UNKNOWN_TASK:
                self._note_unknown(author)
            return None
        return PoolEntry(key, author, created_at_s, group, frame, rescored.rewards, rescored.payload)

    def is_well_formed(self, author: str, frame: bytes) -> bool:
        """Whether a frame that its author has signed may be passed on by who does not score it; counted if not."""
        try:
            decode_frame(frame)
        except Refusal as refusal:
            if not refusal.reason.penalised:
                return True  # a newer minor version: others may know it
            self._local.refuse(refusal.reason, blame=author)
            return False
        return True

    def is_deferred(self, author: str) -> bool:
        """Whether an author's groups have lately all been of task sources that this node does not have."""
        return self._unknown_in_a_row.get(author, 0) >= 3

    def seen(self) -> list[bytes]:
        """The groups that must not be used (again), oldest first: plain data for the saved state."""
        return list(self._seen)

    def restore_seen(self, seen: list[bytes]) -> None:
        """Go on from what `seen` gave."""
        self._seen = OrderedDict.fromkeys(seen[-_MAX_SEEN:], self._local.clock())

    def allow_again(self, frame: bytes) -> None:
        """Let a group be admitted that was, and was not used: one of the saved pool."""
        self._seen.pop(content_digest(decode_frame(frame)), None)

    def note_own(self, group: SharedGroup) -> None:
        """Never admit this node's own group under another's name."""
        self._note_seen(content_digest(group))

    def _note_seen(self, content: bytes) -> None:
        now_s = self._local.clock()
        self._seen[content] = now_s
        while len(self._seen) > _MAX_SEEN or next(iter(self._seen.values())) < now_s - _SEEN_FOR_S:
            self._seen.popitem(last=False)

    def _note_unknown(self, author: str) -> None:
        self._unknown_in_a_row[author] = self._unknown_in_a_row.pop(author, 0) + 1
        if len(self._unknown_in_a_row) > 1024:
            self._unknown_in_a_row.popitem(last=False)
