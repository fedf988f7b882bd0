"""One side of a bridge: a member of one network, and what passes between it and the member of the other network.

    offers    a batch that is heard here first is offered to the other side, as its author signed it, with the frames
              that somebody here offers; the other side checks it as it checks any, and tells its neighbours
    frames    nothing is fetched before a node over there asks for it (`fetching`); then it stays in the store
    appetite  this network is told that the bridge wants to hear more while a node over there does, which has fetched
              something lately or is new: what is told follows what is used, on both sides
    use       what nodes over there have learnt from makes a record of its author here, as in any node: authors without
              one share a quota, each with one has its own (`vouching`)
    records   of nodes over there, shown to who looks at the swarm (`swarm-node network`); no node dials them

A batch belongs to the side that has heard of it first, and crosses once: what a side was told by the other it does not
offer back, and what it knew it does not take. Both sides have one identity. Nothing is signed, scored or altered here:
a frame that is not its author's own, byte for byte, is no good to anybody.

What the channel carries are requests of the protocol (`announce`, `pull`), the records of a response to `peers`, and
public keys of authors (`useful`).
"""

import asyncio
import contextlib
import math
from collections.abc import Iterator
from typing import Any

from protocol.announcements import LiveBatch
from protocol.bridge.channel import Channel, ChannelBroken
from protocol.bridge.errands import Errands
from protocol.bridge.fetching import Fetching, Sources
from protocol.bridge.records import FarRecords
from protocol.bridge.store import BridgeStore
from protocol.bridge.vouching import MAX_AUTHORS_BYTES, Vouching, decode_authors, encode_authors
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
from protocol.refusals import Reason
from protocol.requests import (
    AnnounceRequest,
    AnnounceResponse,
    Offer,
    PullResponse,
    decode_announce_request,
    decode_announce_response,
    decode_pull_request,
    encode_announce_request,
    encode_announce_response,
    encode_pull_response,
    fitting_offers,
)
from protocol.tasks import first_of
from protocol.transport.base import RequestRefused, RequestTimedOut

__all__ = ["BridgeSide"]

TICK_S = 1.0  # how often the other side is asked what it wants, where there is nothing to tell
RECORDS_EVERY_TICKS = 5
USE_S = 60.0  # for which a neighbour that has fetched something is believed to want more
CATCH_UP_BATCHES = 32  # heard of here; as long as it is fewer, neighbours are asked for what was published before
ANSWER_WITHIN_S = 30.0  # of the other side, a process of this machine: one that takes longer is stuck
_AUTHOR_BURST_S = 64.0  # as of what a neighbour may tell
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
        self.errands = Errands(member.local, member.announcements, store, channel, member.gossip.tell)
        rate = member.config.max_announcements_per_s
        self._crossings = Quotas(rate, rate * _AUTHOR_BURST_S, 1024)  # batches of an author with a record
        self._vouching = Vouching(member.local, member.announcements, store, member.neighbours)
        self._num_offered = self._num_taken = self._num_known = 0
        member.gossip.on_offer = self._heard
        member.gossip.num_lacking = lambda: int(self._far_wants)
        member.gossip.num_unknown = self._num_to_catch_up
        member.pulling.bring = self.errands.bring
        member.upkeep.tell_beyond = self._records.some
        channel.handle("announce", self._handle_announce, max_request_bytes=MAX_ANNOUNCE_REQUEST_BYTES)
        channel.handle("pull", self._handle_pull, max_request_bytes=MAX_PULL_REQUEST_BYTES)
        channel.handle("useful", self._handle_useful, max_request_bytes=MAX_AUTHORS_BYTES)
        channel.handle("records", self._records.handle, max_request_bytes=MAX_PEERS_RESPONSE_BYTES)

    async def start(self) -> None:
        """Start the member, and let things cross; the channel was started. Raises what the member's start does."""
        await self.member.start()
        self._local.tasks.spawn(self._tell_loop(), "bridge")
        self._local.tasks.spawn(self._vouch_loop(), "vouch")

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
            "frames_brought": self.errands.num_brought,
            "bytes_brought": self.errands.num_bytes_brought,
            "batches_to_give": self._store.num_claims,
            "nodes_beyond": len(self._records),
            "is_wanted": self._far_wants,
            "authors_known": self._num_authors_known(),
        }
        return found

    @property
    def _far_wants(self) -> bool:
        """Whether a node over there wants to hear of more."""
        return self._local.clock() >= self._far_quiet_until_s

    def _num_authors_known(self) -> int:
        """Authors of live batches that have a record."""
        now_s, reputation = self._local.clock(), self._local.reputation
        return sum(reputation.is_established(author, now_s) for author in self.member.announcements.authors)

    def _num_to_catch_up(self) -> int:
        return max(0, CATCH_UP_BATCHES - len(self._sources)) if self._far_wants else 0

    # What is heard here, for the other side.

    def _heard(self, batch: LiveBatch, teller: str, held: int) -> None:
        """Note who offers what of a batch of this side; what nobody has offered before is offered to the other side."""
        if self._store.claimed(batch.root):
            return  # it comes from the other side
        is_here = batch.author == teller or batch.author in self.member.directory
        frames = batch.all_frames if is_here else held
        sources = self._sources.get(batch.root)
        if sources is None:
            if not self._may_cross(batch.author):
                self._local.refuse(Reason.QUOTA)
                return
            sources = self._sources[batch.root] = Sources()
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

    def _may_cross(self, author: str) -> bool:
        """Whether one more batch may cross; those of authors without a record were counted as they were heard."""
        now_s = self._local.clock()
        return not self._local.reputation.is_established(author, now_s) or self._crossings.take(author, now_s)

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

    async def _vouch_loop(self) -> None:
        """Tell the other side whose groups are of use here. Waits for its turn; ends with the member."""
        while True:
            await asyncio.sleep(self._local.config.repair_s * self._local.rng.uniform(0.8, 1.2))
            if authors := await self._vouching.ask():
                await self._say("useful", encode_authors(authors))

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

    async def _handle_useful(self, asker: str, payload: bytes) -> bytes:
        """Make a record of authors of this side that nodes over there have learnt from."""
        for author in decode_authors(payload):
            self._local.reputation.useful(author, self._local.clock())
        return b""

    def _quiet_s(self) -> int:
        """For how long none of those neighbours that use what crosses wants to hear of more."""
        now_s = self._local.clock()
        waits = [link.quiet_until_s - now_s for link in self.member.neighbours.ids.values() if self._uses(link, now_s)]
        return max(0, min(MAX_QUIET_S, math.ceil(min(waits, default=TICK_S))))

    def _uses(self, link: Neighbour, now_s: float) -> bool:
        return now_s - max(link.since_s, self.errands.used_at_s.get(link.node_id, 0.0)) <= USE_S

    def _forget(self) -> None:
        """Keep no more than there are live batches and neighbours."""
        live = self.member.announcements
        if len(self._sources) > len(live):
            self._sources = {root: one for root, one in self._sources.items() if live.get(root) is not None}
        self.errands.forget(self._local.clock() - USE_S)
