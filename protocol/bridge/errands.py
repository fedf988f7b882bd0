"""Have frames of the other side brought for whoever asks here, and answer soon, whatever authors over there do.

A body that is slow to come, or is never given, must cost nobody but who asks for it: a neighbour that waits long asks
others first for a minute, and a bridge has no other. So an asker waits for `SOON_S` at most and is then refused; what
comes after that is offered to it again, and it asks again. How many frames may be on their way is bounded, in all and
for one asker, and so are the bytes that it may have brought; a frame that does not come is dear.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.announcements import Announcements, LiveBatch
from protocol.bridge.channel import Channel
from protocol.bridge.fetching import BRING_S
from protocol.bridge.store import BridgeStore
from protocol.local import Local
from protocol.quota import Quotas
from protocol.refusals import Reason, Refusal
from protocol.requests import (
    PullRequest,
    check_pull,
    decode_pull_response,
    encode_pull_request,
    max_pull_response_bytes,
)
from protocol.transport.base import RequestRefused, TransportError

__all__ = ["Errands"]

SOON_S = 1.2  # below what a node takes for slow (`pulling`)
MAX_ERRANDS = 96  # requests to the other side under way: fewer than the channel has places
MAX_FRAMES = 192  # that are being brought, in all
MAX_FRAMES_PER_ASKER = 64  # one batch
_BURST_S = 8.0


@dataclass(eq=False, slots=True)
class _Errand:
    """Frames of one batch, on their way for one asker: the other side asks for each but once at one time."""

    asker: str
    numbers: list[int]
    is_late: bool = False  # it has been refused meanwhile
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Errands:
    """One side's requests to the other. `offer` tells a neighbour what is here now: (node id, batch)."""

    def __init__(
        self,
        local: Local,
        announcements: Announcements,
        store: BridgeStore,
        channel: Channel,
        offer: Callable[[str, LiveBatch], None],
    ) -> None:
        self._local, self._announcements, self._store = local, announcements, store
        self._channel, self._offer = channel, offer
        self._num_under_way = 0
        self._num_frames = Counter[str]()  # on their way, by asker
        rate = local.config.max_served_bytes_per_s
        self._quotas = Quotas(rate, rate * _BURST_S, 1024)  # bytes that a peer may have brought
        self.num_brought = self.num_bytes_brought = 0
        self.used_at_s: dict[str, float] = {}  # by asker: when it has asked for something of the other side last

    async def bring(self, asker: str, request: PullRequest) -> None:
        """Have in the store what a peer asks for and is not here, as far as it comes soon."""
        batch = self._announcements.get(request.root)
        if batch is None or not self._store.claimed(request.root):
            return
        self.used_at_s[asker] = self._local.clock()
        numbers = self._missing(batch, request.numbers)
        if not numbers:
            return
        errand = self._begin(asker, batch, numbers)
        try:
            async with asyncio.timeout(SOON_S):
                await errand.over.wait()
        except TimeoutError:
            errand.is_late = True

    def forget(self, horizon_s: float) -> None:
        """Forget who has asked for nothing since then."""
        self.used_at_s = {node_id: at_s for node_id, at_s in self.used_at_s.items() if at_s >= horizon_s}

    def _missing(self, batch: LiveBatch, numbers: Sequence[int]) -> list[int]:
        """Return the frames that are not here, as many as one request may ask for."""
        wanted = self._store.claimed(batch.root) & ~self._store.held(batch.root)
        missing, size = list[int](), 0
        for number in numbers:
            if wanted >> number & 1:
                size += batch.announcement.frame_sizes[number]
                if missing and size > self._local.config.max_pull_bytes:
                    break
                missing.append(number)
        return missing

    def _begin(self, asker: str, batch: LiveBatch, numbers: list[int]) -> _Errand:
        """Ask the other side. Raises RequestRefused for more than may be on its way, or than this peer may have."""
        is_busy = self._num_under_way >= MAX_ERRANDS or self._num_frames.total() + len(numbers) > MAX_FRAMES
        if is_busy or self._num_frames[asker] + len(numbers) > MAX_FRAMES_PER_ASKER:
            raise self._local.refuse_request(Reason.QUOTA, "too many frames are on their way; ask later")
        size = sum(batch.announcement.frame_sizes[number] for number in numbers)
        if not self._quotas.take(asker, self._local.clock(), min(size, self._local.config.max_pull_bytes)):
            raise self._local.refuse_request(Reason.QUOTA, "more frames than one peer may have fetched; ask later")
        errand = _Errand(asker, numbers)
        self._num_under_way += 1
        self._num_frames[asker] += len(numbers)
        self._local.tasks.spawn(self._run(errand, batch), "errand")
        return errand

    async def _run(self, errand: _Errand, batch: LiveBatch) -> None:
        """Fetch, and offer what has come to who was refused. Ends by an answer, or when the other side's time is up."""
        try:
            num = await self._fetch(batch, errand.numbers)
        finally:
            self._num_under_way -= 1
            self._num_frames[errand.asker] -= len(errand.numbers)
            if not self._num_frames[errand.asker]:
                del self._num_frames[errand.asker]
            errand.over.set()
        if num < len(errand.numbers):
            self._quotas.spend(errand.asker, self._local.clock(), self._local.config.max_pull_bytes)
        if num and errand.is_late:
            self._offer(errand.asker, batch)

    async def _fetch(self, batch: LiveBatch, numbers: list[int]) -> int:
        """Have the other side bring frames, and hold those that come; return how many."""
        try:
            data = await self._channel.request(
                "pull",
                encode_pull_request(PullRequest(batch.root, tuple(numbers))),
                max_response_bytes=max_pull_response_bytes(batch.announcement, numbers),
                timeout_s=BRING_S + 1,
            )
            response = decode_pull_response(data)
            frames = check_pull(batch.announcement, numbers, response)
        except RequestRefused as refused:
            if refused.code == Reason.NOT_HELD:
                self._store.give_up(batch.root)
            return 0
        except TransportError:
            self._local.counters.requests_failed += 1
            return 0
        except Refusal as refusal:
            self._local.refuse(refusal.reason)
            return 0
        expires_at_s = batch.created_at_s + self._local.config.freshness_s
        held = self._store.held(batch.root)  # another peer's errand may have brought the same meanwhile
        new = {number: frame for number, frame in frames.items() if not held >> number & 1}
        for number, frame in new.items():
            self._store.add(batch.root, response.leaves, number, frame, expires_at_s)
        self.num_brought += len(new)
        self.num_bytes_brought += sum(map(len, new.values()))
        return len(frames)
