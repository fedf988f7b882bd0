"""One side of a bridge: a member of one network, and what passes between it and the member of the other network.

    offers    a batch that is heard here first is offered to the other side, as its author signed it, with the frames
              that somebody here offers; the other side checks it as it checks any, and tells its neighbours
    frames    nothing is fetched before a node over there asks for it (`fetching`); then it stays in the store
    appetite  this network is told that the bridge wants to hear more while a node over there does, which has fetched
              something lately or is new: what is told follows what is used, on both sides
    records   of nodes over there, shown to who looks at the swarm (`swarm-node network`); no node dials them

A batch belongs to the side that has heard of it first, and crosses once: what a side was told by the other it does not
offer back, and what it knew it does not take. Both sides have one identity. Nothing is signed, scored or altered here:
a frame that is not its author's own, byte for byte, is no good to anybody.

What the channel carries are requests of the protocol (`announce`, `pull`) and the records of a response to `peers`.
"""

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any

from protocol.announcements import LiveBatch
from protocol.bridge.channel import Channel, ChannelBroken
from protocol.bridge.fetching import BRING_S, Fetching, Sources
from protocol.bridge.records import FarRecords
from protocol.bridge.store import BridgeStore
from protocol.limits import (
    MAX_ANNOUNCE_REQUEST_BYTES,
    MAX_PEERS_RESPONSE_BYTES,
    MAX_PULL_REQUEST_BYTES,
    MAX_QUIET_S,
    MAX_SMALL_REQUEST_BYTES,
)
from protocol.member import Member
from protocol.neighbours import Neighbour
from protocol.quota import Quotas
from protocol.refusals import Reason, Refusal
from protocol.requests import (
    AnnounceRequest,
    AnnounceResponse,
    Offer,
    PullRequest,
    PullResponse,
    check_pull,
    decode_announce_request,
    decode_announce_response,
    decode_pull_request,
    decode_pull_response,
    encode_announce_request,
    encode_announce_response,
    encode_pull_request,
    encode_pull_response,
    fitting_offers,
    max_pull_response_bytes,
)
from protocol.tasks import first_of
from protocol.transport.base import RequestRefused, RequestTimedOut, TransportError

__all__ = ["BridgeSide"]

TICK_S = 1.0  # how often the other side is asked what it wants, where there is nothing to tell
RECORDS_EVERY_TICKS = 5
USE_S = 60.0  # for which a neighbour that has fetched something is believed to want more
CATCH_UP_BATCHES = 32  # heard of here; as long as it is fewer, neighbours are asked for what was published before
ANSWER_WITHIN_S = 30.0  # of the other side, a process of this machine: one that takes longer is stuck
_BURST_S = 8.0
_NOT_HERE = "not_here"  # nobody gives it just now: another time, perhaps


class BridgeSide:
    """What makes a member a side of a bridge. `member` scores nothing, and gives from `store`."""

    def __init__(self, member: Member, store: BridgeStore, channel: Channel) -> None:
        self.member, self._local, self._store, self._channel = member, member.local, store, channel
        self.fetching = Fetching(member.local, store, member.admission, member.pulling, member.neighbours)
        self._records = FarRecords(member.local, member.directory)
        self._sources: dict[bytes, Sources] = {}  # by root: of batches that were heard of here first
        self._unsaid: dict[bytes, None] = {}  # of these, those that the other side is to be told of
        self._news = asyncio.Event()
        self._far_quiet_until_s = 0.0  # unix seconds
        self._used_at_s: dict[str, float] = {}  # by neighbour: when it has fetched a batch of the other side last
        rate = member.config.max_served_bytes_per_s
        self._errands = Quotas(rate, rate * _BURST_S, 1024)  # bytes that a peer may have fetched
        self._num_offered = self._num_taken = self._num_known = self._num_brought = self._num_bytes_brought = 0
        member.gossip.on_offer = self._heard
        member.gossip.num_lacking = lambda: int(self._far_wants)
        member.gossip.num_unknown = self._num_to_catch_up
        member.pulling.bring = self._bring
        member.upkeep.tell_beyond = self._records.some
        channel.handle("announce", self._handle_announce, max_request_bytes=MAX_ANNOUNCE_REQUEST_BYTES)
        channel.handle("pull", self._handle_pull, max_request_bytes=MAX_PULL_REQUEST_BYTES)
        channel.handle("records", self._records.handle, max_request_bytes=MAX_PEERS_RESPONSE_BYTES)

    async def start(self) -> None:
        """Start the member, and let things cross; the channel was started. Raises what the member's start does."""
        await self.member.start()
        self._local.tasks.spawn(self._tell_loop(), "bridge")

    async def close(self) -> None:
        """Leave the network, with the member's state saved, and hang up."""
        try:
            await self.member.close()
        finally:
            await self._channel.close()

    async def wait_failed(self) -> None:
        """Return never; raise what has killed the member, the channel, or the other side."""
        await first_of(self.member.wait_failed(), self._channel.wait_failed())

    def status(self) -> dict[str, Any]:
        """The member's status, with what has crossed: plain data."""
        found = self.member.status()
        found["bridge"] = {
            "batches_offered": self._num_offered,
            "batches_taken": self._num_taken,
            "batches_known": self._num_known,
            "frames_fetched": self.fetching.num_fetched,
            "frames_missed": self.fetching.num_missed,
            "frames_brought": self._num_brought,
            "bytes_brought": self._num_bytes_brought,
            "batches_to_give": self._store.num_claims,
            "nodes_beyond": len(self._records),
            "is_wanted": self._far_wants,
        }
        return found

    @property
    def _far_wants(self) -> bool:
        """Whether a node over there wants to hear of more."""
        return self._local.clock() >= self._far_quiet_until_s

    def _num_to_catch_up(self) -> int:
        return max(0, CATCH_UP_BATCHES - len(self._sources)) if self._far_wants else 0

    # What is heard here, for the other side.

    def _heard(self, batch: LiveBatch, teller: str, held: int) -> None:
        """Note who offers what of a batch of this side; what nobody has offered before is offered to the other side."""
        if self._store.claimed(batch.root):
            return  # it comes from the other side
        is_here = batch.author == teller or batch.author in self.member.directory
        frames = batch.all_frames if is_here else held
        sources = self._sources.setdefault(batch.root, Sources())
        new = frames & ~sources.offered
        if not new:
            return
        holder = batch.author if is_here else teller
        sources.holders[holder] = sources.holders.get(holder, 0) | new
        if is_here and held:
            sources.holders[teller] = sources.holders.get(teller, 0) | held & new
        sources.offered |= new
        self._unsaid[batch.root] = None
        self._news.set()

    async def _tell_loop(self) -> None:
        """Tell the other side, and hear what it wants. Waits for news, or its turn; ends with the member."""
        tick = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._news.wait()
            self._news.clear()
            more = True
            while more:
                more = await self._tell()
            if tick % RECORDS_EVERY_TICKS == 0:
                for payload in self._records.news():
                    await self._say("records", payload)
            tick += 1
            self._forget()

    async def _tell(self) -> bool:
        """Tell the other side of some batches; return whether there are more."""
        roots = list(self._unsaid)
        offers = fitting_offers(list(self._offers(roots)))
        told = {offer.encoded for offer in offers}
        for root in roots:
            batch = self.member.announcements.get(root)
            if batch is None or batch.announcement.encoded in told:
                del self._unsaid[root]
        request = encode_announce_request(AnnounceRequest(offers))
        data = await self._say("announce", request)
        self._num_offered += len(offers)
        self._far_quiet_until_s = self._local.clock() + decode_announce_response(data).quiet_s
        return bool(self._unsaid)

    async def _say(self, name: str, payload: bytes) -> bytes:
        """Tell the other side something; return its answer. Raises ChannelBroken where it is stuck, or gone."""
        try:
            return await self._channel.request(
                name, payload, max_response_bytes=MAX_SMALL_REQUEST_BYTES, timeout_s=ANSWER_WITHIN_S
            )
        except RequestTimedOut:
            raise ChannelBroken(f"the other side has not answered for {ANSWER_WITHIN_S:g} s") from None

    def _offers(self, roots: list[bytes]) -> Iterator[Offer]:
        for root in roots:
            batch = self.member.announcements.get(root)
            if batch is not None:
                yield Offer(batch.announcement.encoded, self._sources[root].offered)

    async def _handle_pull(self, asker: str, payload: bytes) -> bytes:
        """Have frames of this side brought, and give them to the other side."""
        request = decode_pull_request(payload)
        batch, sources = self.member.announcements.get(request.root), self._sources.get(request.root)
        if batch is None or sources is None:
            raise RequestRefused(Reason.NOT_HELD)
        await self.fetching.bring(batch, sources, request.numbers)
        held = self._store.get(request.root)
        if held is None:
            raise RequestRefused(_NOT_HERE)
        frames = {number: held.frames[number] for number in request.numbers if number in held.frames}
        return encode_pull_response(PullResponse(held.digests, frames))

    # What the other side has heard, for this one.

    async def _handle_announce(self, asker: str, payload: bytes) -> bytes:
        """Take what the other side offers, tell a few neighbours, and say how much they want."""
        for offer in decode_announce_request(payload).offers:
            self._take(offer)
        return encode_announce_response(AnnounceResponse(self._quiet_s()))

    def _take(self, offer: Offer) -> None:
        member, local = self.member, self._local
        num_before = local.counters.batches_heard
        batch = member.admission.announcement(offer.encoded, local.node_id, asked=True, is_counted=True)
        if isinstance(batch, Reason):
            return
        is_new = local.counters.batches_heard > num_before
        if not is_new and not self._store.claimed(batch.root):
            self._num_known += 1  # it was heard of here as well
            return
        expires_at_s = batch.created_at_s + local.config.freshness_s
        self._store.claim(batch.root, offer.held & batch.all_frames, expires_at_s)
        if is_new:
            self._num_taken += 1
            member.gossip.announce(batch)

    def _quiet_s(self) -> int:
        """For how long none of those neighbours that use what crosses wants to hear of more."""
        now_s = self._local.clock()
        waits = [link.quiet_until_s - now_s for link in self.member.neighbours.ids.values() if self._uses(link, now_s)]
        return max(0, min(MAX_QUIET_S, math.ceil(min(waits, default=TICK_S))))

    def _uses(self, link: Neighbour, now_s: float) -> bool:
        return now_s - max(link.since_s, self._used_at_s.get(link.node_id, 0.0)) <= USE_S

    async def _bring(self, asker: str, request: PullRequest) -> None:
        """Fetch what a peer asks for and is not here from the other side."""
        store, now_s = self._store, self._local.clock()
        batch, claimed = self.member.announcements.get(request.root), store.claimed(request.root)
        if batch is None or not claimed:
            return
        self._used_at_s[asker] = now_s
        missing, size = list[int](), 0
        for number in request.numbers:
            if claimed >> number & 1 and not store.held(request.root) >> number & 1:
                size += batch.announcement.frame_sizes[number]
                if size <= self._local.config.max_pull_bytes or not missing:
                    missing.append(number)
        if not missing:
            return
        if not self._errands.take(asker, now_s, min(size, self._local.config.max_pull_bytes)):
            raise self._local.refuse_request(Reason.QUOTA, "more frames than one peer may have fetched; ask later")
        await self._fetch(batch, missing)

    async def _fetch(self, batch: LiveBatch, numbers: list[int]) -> None:
        """Have the other side bring frames, and hold those that come."""
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
            return
        except TransportError:
            self._local.counters.requests_failed += 1
            return
        except Refusal as refusal:
            self._local.refuse(refusal.reason)
            return
        expires_at_s = batch.created_at_s + self._local.config.freshness_s
        held = self._store.held(batch.root)  # another peer's request may have brought the same meanwhile
        new = {number: frame for number, frame in frames.items() if not held >> number & 1}
        for number, frame in new.items():
            self._store.add(batch.root, response.leaves, number, frame, expires_at_s)
        self._num_brought += len(new)
        self._num_bytes_brought += sum(map(len, new.values()))

    def _forget(self) -> None:
        """Keep no more than there are live batches and neighbours."""
        live = self.member.announcements
        if len(self._sources) > len(live):
            self._sources = {root: one for root, one in self._sources.items() if live.get(root) is not None}
        horizon_s = self._local.clock() - USE_S
        self._used_at_s = {node_id: at_s for node_id, at_s in self._used_at_s.items() if at_s >= horizon_s}
