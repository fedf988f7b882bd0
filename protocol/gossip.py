"""Tell few, tell what is good, and ask for what is missing: how announcements spread.

    publish    an own batch is announced to a few neighbours
    relay      a batch of which a group was admitted is announced to a few more; a node that scores nothing relays
               what is signed
    repair     a node that lacks groups, and knows of none, asks a neighbour for batches that it has not heard of:
               so a late joiner and a healed partition catch up

A neighbour that has enough says so in its response (`quiet_s`), and is left alone: how much is told follows how much
is used, and not how large the swarm is. An announcement without batches is a ping. What is pulled of what is heard
is `pulling`'s.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from protocol.admission import TELLERS_FAULT, Admission
from protocol.announcements import Announcements, LiveBatch
from protocol.bloom import in_bloom
from protocol.limits import (
    MAX_ANNOUNCE_REQUEST_BYTES,
    MAX_REPAIR_REQUEST_BYTES,
    MAX_SMALL_REQUEST_BYTES,
)
from protocol.local import Local
from protocol.neighbours import Neighbour, Neighbours
from protocol.quota import Quotas
from protocol.refusals import Reason, Refusal
from protocol.repairs import ask_repair
from protocol.requests import (
    AnnounceRequest,
    AnnounceResponse,
    Broadcast,
    Offer,
    RepairResponse,
    decode_announce_request,
    decode_announce_response,
    decode_broadcast,
    decode_repair_request,
    encode_announce_request,
    encode_announce_response,
    encode_broadcast,
    encode_repair_response,
    fitting_offers,
)
from protocol.store import FrameStore
from protocol.transport.base import Judgement, RequestRefused, TransportError

__all__ = ["Appetite", "Gossip"]

RELAY_DELAY_S = 0.1  # so that a few relays to one neighbour go in one request
TICK_S = 5.0
MAX_OUTBOX = 256  # batches that one neighbour is to be told of
MIN_OFFERS = 8  # asked for in one repair
_APPETITE_S = 60.0
_FRAMES_PER_FRAME = 1.5  # heard of, for each frame that is pulled: a choice, and some that fail
_MAX_COUNTED = 2  # frames of one batch that count as heard of: what is pulled is to come from many authors
_MAX_AUTHORS = 1024  # whose rates are remembered


@dataclass(slots=True)
class _Rates:
    """Frames of the last minute, older ones fading."""

    pulled: float = 0.0
    heard: float = 0.0
    at_s: float = 0.0  # unix seconds

    def fade(self, now_s: float) -> None:
        faded = 0.5 ** (max(0.0, now_s - self.at_s) / _APPETITE_S)
        self.pulled, self.heard, self.at_s = self.pulled * faded, self.heard * faded, max(now_s, self.at_s)


class Appetite:
    """How many announcements a node has use for: such that they tell of a few more frames than it pulls.

    An author from whom little is pulled counts little, however much it announces: it must not bring a node to hear
    nobody else. Times are unix seconds.
    """

    def __init__(self) -> None:
        self._all = _Rates()
        self._authors: OrderedDict[str, _Rates] = OrderedDict()  # those met last, last

    def pulled(self, author: str, num_frames: int, now_s: float) -> None:
        """Note frames that were pulled."""
        for rates in (self._all, self._author(author)):
            rates.fade(now_s)
            rates.pulled += num_frames

    def heard(self, author: str, num_frames: int, now_s: float) -> None:
        """Note a new announcement of so many frames."""
        own = self._author(author)
        own.fade(now_s)
        room = _MAX_COUNTED * (2 + _FRAMES_PER_FRAME * own.pulled) - own.heard
        num_counted = max(0.0, min(room, num_frames, _MAX_COUNTED))
        for rates in (self._all, own):
            rates.fade(now_s)
            rates.heard += num_counted

    def quiet_s(self, now_s: float) -> int:
        """For how long nothing needs to be heard, as things are; 0 if something does."""
        self._all.fade(now_s)
        wanted = max(_FRAMES_PER_FRAME * self._all.pulled, float(MIN_OFFERS))
        if self._all.heard <= wanted:
            return 0
        # By fading alone the surplus would be gone in half of this; but each neighbour hears of it on its own. And no
        # longer than what was heard and pulled counts: much may have changed by then.
        return int(min(_APPETITE_S, 2 * _APPETITE_S * math.log2(self._all.heard / wanted))) + 1

    def _author(self, author: str) -> _Rates:
        rates = self._authors.setdefault(author, _Rates())
        self._authors.move_to_end(author)
        if len(self._authors) > _MAX_AUTHORS:
            self._authors.popitem(last=False)
        return rates


class Gossip:
    """One node's part in spreading announcements."""

    def __init__(
        self,
        local: Local,
        announcements: Announcements,
        store: FrameStore,
        admission: Admission,
        neighbours: Neighbours,
        *,
        relays_unscored: bool,
    ) -> None:
        self._local, self._announcements, self._store = local, announcements, store
        self._admission, self._neighbours, self._relays_unscored = admission, neighbours, relays_unscored
        self.appetite = Appetite()
        self.num_unknown: Callable[[], int] = lambda: 0  # groups that are lacking, of which no frame is known
        self.num_lacking: Callable[[], int] = lambda: 0  # groups that are lacking, and not under way
        self.is_wanted: Callable[[str], bool] = lambda author: True  # whether its groups count as enough to hear
        self.on_offer: Callable[[LiveBatch, str, int], None] = lambda batch, teller, held: None  # heard, maybe again
        self.on_news: Callable[[], None] = lambda: None  # frames have become known
        self._repair_now = asyncio.Event()
        self._fresh_links: list[str] = []  # neighbours that were not asked yet
        self._repairs = Quotas(0.5, 16, 1024)
        neighbours.on_link.append(self._linked)
        local.transport.hear(self._judge)
        local.transport.handle("announce", self._handle_announce, max_request_bytes=MAX_ANNOUNCE_REQUEST_BYTES)
        local.transport.handle("repair", self._handle_repair, max_request_bytes=MAX_REPAIR_REQUEST_BYTES)

    def start(self) -> None:
        """Start the background work."""
        self._local.tasks.spawn(self._repair_loop(), "repair")
        self._local.tasks.spawn(self._ping_loop(), "ping")

    def announce(self, batch: LiveBatch) -> None:
        """Tell a few neighbours of a batch that comes from here; where all have enough, one of them nevertheless.

        Where the transport has broadcasts, everybody is told.
        """
        if self._local.transport.broadcasts:
            self._local.tasks.spawn(self._broadcast(batch), "broadcast")
            return
        now_s, config = self._local.clock(), self._local.config
        links = list(self._neighbours.ids.values())
        chosen = self._choose([link for link in links if link.quiet_until_s <= now_s], config.announce_fanout)
        for link in chosen or self._choose(links, 1):
            self._tell(link, batch, delay_s=0.0)

    def tell(self, node_id: str, batch: LiveBatch) -> None:
        """Tell one neighbour of a batch, be it once more: something of it can be had here now."""
        link = self._neighbours.ids.get(node_id)
        if link is not None:
            self._tell(link, batch, delay_s=0.0)

    def relay(self, batch: LiveBatch) -> None:
        """Tell a few neighbours of another author's batch, once, if they may not know it and want to hear."""
        if batch.relayed:
            return
        batch.relayed = True
        now_s = self._local.clock()
        links = [
            link
            for node_id, link in self._neighbours.ids.items()
            if node_id != batch.author
            and node_id != batch.teller
            and node_id not in batch.holders
            and link.quiet_until_s <= now_s
        ]
        chosen = self._choose(links, self._local.config.relay_fanout)
        self._local.counters.batches_relayed += bool(chosen)
        for link in chosen:
            self._tell(link, batch, delay_s=RELAY_DELAY_S)

    def _choose(self, links: list[Neighbour], num: int) -> list[Neighbour]:
        """Draw neighbours to tell: half of them at least are ones that this node has chosen itself.

        Whoever crowds the places of those that have chosen it must not be all that hears it.
        """
        rng = self._local.rng
        rng.shuffle(links)
        out = [link for link in links if link.direction == "out"][: -(-num // 2)]
        return out + rng.sample(rest := [link for link in links if link not in out], min(num - len(out), len(rest)))

    def _tell(self, link: Neighbour, batch: LiveBatch, *, delay_s: float) -> None:
        link.outbox[batch.root] = None
        if len(link.outbox) > MAX_OUTBOX:
            del link.outbox[next(iter(link.outbox))]
        if not link.sending:
            link.sending = True
            self._local.tasks.spawn(self._send(link, delay_s), "announce")

    async def _send(self, link: Neighbour, delay_s: float) -> None:
        """Empty one neighbour's outbox. Ends when it is empty, or the neighbour does not answer."""
        try:
            if delay_s:
                await asyncio.sleep(delay_s)
            while link.outbox and self._neighbours.ids.get(link.node_id) is link:
                roots = list(link.outbox)
                offers = fitting_offers(self._offers(roots))
                for root in roots[: max(1, len(offers))]:
                    link.outbox.pop(root, None)
                if offers and not await self._announce(link, offers):
                    link.outbox.clear()
        finally:
            link.sending = False

    async def _announce(self, link: Neighbour, offers: tuple[Offer, ...]) -> bool:
        """Tell one neighbour; return whether it has answered."""
        local = self._local
        try:
            data = await local.transport.request(
                link.node_id,
                "announce",
                encode_announce_request(AnnounceRequest(offers)),
                max_response_bytes=MAX_SMALL_REQUEST_BYTES,
                timeout_s=local.config.request_timeout_s,
            )
            quiet_s = decode_announce_response(data).quiet_s
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=link.node_id)
            return False
        except RequestRefused as refused:
            local.counters.requests_failed += 1
            if refused.code in (Reason.NO_HELLO, Reason.BANNED):
                self._neighbours.drop(link.node_id)  # it does not know this node (any more)
            return False
        except TransportError:
            local.counters.requests_failed += 1
            local.reputation.unresponsive(link.node_id, local.clock())
            self._neighbours.failed(link.node_id)
            return False
        self._neighbours.heard(link.node_id)
        link.quiet_until_s = local.clock() + quiet_s
        local.counters.announcements_sent += len(offers)
        return True

    async def _broadcast(self, batch: LiveBatch) -> None:
        """Tell everybody. Whom it does not reach asks for it (`_repair_loop`)."""
        message = encode_broadcast(Broadcast(batch.announcement.encoded, self._local.node_id))
        try:
            await self._local.transport.broadcast(message)
        except TransportError:
            self._local.counters.requests_failed += 1
        else:
            self._local.counters.announcements_sent += 1

    def _judge(self, teller: str, message: bytes) -> Judgement:
        """Take a batch that was broadcast: passed on if it is news, held against who told it if no honest node does."""
        local = self._local
        if local.reputation.is_banned(teller, local.clock()):
            local.refuse(Reason.BANNED)
            return Judgement.IGNORE
        try:
            broadcast = decode_broadcast(message)
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=teller)
            return Judgement.REJECT if refusal.reason.penalised else Judgement.IGNORE
        # What one neighbour may push is for announcements to it alone: everybody's come through few, and are scored.
        reason = self._take_one(broadcast.encoded, teller, broadcast.holder, -1, asked=True)
        if reason is None:
            self.on_news()
            return Judgement.ACCEPT
        return Judgement.REJECT if reason in TELLERS_FAULT else Judgement.IGNORE

    def _offers(self, roots: list[bytes]) -> list[Offer]:
        found = []
        for root in roots:
            batch = self._announcements.get(root)
            if batch is not None:
                found.append(Offer(batch.announcement.encoded, self._store.mask(root)))
        return found

    def _take(self, offers: tuple[Offer, ...], teller: str, *, asked: bool) -> int:
        """Take offers from a peer; return how many were new."""
        outcomes = [self._take_one(offer.encoded, teller, teller, offer.held, asked=asked) for offer in offers]
        self.on_news()
        return outcomes.count(None)

    def _take_one(self, encoded: bytes, teller: str, holder: str, held: int, *, asked: bool) -> Reason | None:
        """Take one announcement, and who holds which frames (a mask); return why it is no news, None if it is."""
        num_before = self._local.counters.batches_heard
        batch = self._admission.announcement(encoded, teller, asked=asked)
        if isinstance(batch, Reason):
            return batch
        held &= batch.all_frames if holder != self._local.node_id else 0  # nobody else knows what this node holds
        self._announcements.hold(batch, holder, held)
        self.on_offer(batch, holder, held)
        if self._local.counters.batches_heard == num_before:
            return Reason.DUPLICATE
        if self.is_wanted(batch.author):
            self.appetite.heard(batch.author, len(batch.announcement.frame_sizes), self._local.clock())
        if self._relays_unscored and self._local.config.relay_fanout and not self._local.transport.broadcasts:
            self.relay(batch)
        return None

    async def _handle_announce(self, asker: str, payload: bytes) -> bytes:
        """Hear what a neighbour has; strangers are not heard."""
        local, now_s = self._local, self._local.clock()
        if local.reputation.is_banned(asker, now_s):
            raise local.refuse_request(Reason.BANNED)
        if not self._neighbours.knows(asker):
            raise local.refuse_request(Reason.NO_HELLO, "say hello first, and ask for a link")
        try:
            request = decode_announce_request(payload)
        except Refusal as refusal:
            raise local.refuse_malformed(refusal, asker) from None
        self._neighbours.heard(asker)
        self._take(request.offers, asker, asked=False)
        quiet_s = 0 if self.num_lacking() else self.appetite.quiet_s(now_s)
        return encode_announce_response(AnnounceResponse(quiet_s))

    async def _handle_repair(self, asker: str, payload: bytes) -> bytes:
        """Tell a neighbour of batches that it does not know: a random choice of those held here."""
        local = self._local
        if local.reputation.is_banned(asker, local.clock()):
            raise local.refuse_request(Reason.BANNED)
        if not self._neighbours.knows(asker):
            raise local.refuse_request(Reason.NO_HELLO, "say hello first, and ask for a link")
        if not self._repairs.take(asker, local.clock()):
            raise local.refuse_request(Reason.QUOTA, "asked too often; ask again later")
        try:
            request = decode_repair_request(payload)
        except Refusal as refusal:
            raise local.refuse_malformed(refusal, asker) from None
        self._neighbours.heard(asker)
        roots = [root for root in self._store.roots() if not in_bloom(request, root)]
        chosen = local.rng.sample(roots, min(len(roots), request.max_offers, local.config.max_offers))
        local.counters.repairs_answered += 1
        return encode_repair_response(RepairResponse(fitting_offers(self._offers(chosen))))

    def _linked(self, link: Neighbour) -> None:
        self._fresh_links.append(link.node_id)
        del self._fresh_links[:-64]
        self._repair_now.set()

    async def _repair_loop(self) -> None:
        """Ask for what is missing. Waits for its turn or for a new neighbour; ends with the member."""
        config = self._local.config
        pause_s = config.repair_s
        while True:
            try:
                async with asyncio.timeout(pause_s * self._local.rng.uniform(0.8, 1.2)):
                    await self._repair_now.wait()
            except TimeoutError:
                pass
            self._repair_now.clear()
            num_unknown = self.num_unknown()
            if num_unknown <= 0 or not self._neighbours.ids:
                pause_s = config.repair_s
                self._fresh_links.clear()
                continue
            num_new, was_full = await self._repair(num_unknown)
            if self._fresh_links or was_full:
                self._repair_now.set()
            pause_s = config.repair_s if num_new else min(1.5 * pause_s, config.max_repair_s)

    async def _repair(self, num_unknown: int) -> tuple[int, bool]:
        """Ask one neighbour, a new one if there is one; return how much was new, and whether there may be more."""
        local = self._local
        fresh = [node_id for node_id in self._fresh_links if node_id in self._neighbours.ids]
        node_id = fresh[0] if fresh else local.rng.choice(list(self._neighbours.ids))
        self._fresh_links = fresh[1:]
        num_offers = min(local.config.max_offers, max(MIN_OFFERS, num_unknown))
        local.counters.repairs_asked += 1
        known = self._announcements.roots_not_wanted()
        offers = await ask_repair(local, self._neighbours, node_id, known, num_offers)
        if offers is None:
            return 0, False
        self._neighbours.heard(node_id)
        num_new = self._take(offers, node_id, asked=True)
        return num_new, bool(num_new) and len(offers) == num_offers

    async def _ping_loop(self) -> None:
        """Ask chosen neighbours that have been silent whether they are there. Ends with the member."""
        local = self._local
        while True:
            await asyncio.sleep(TICK_S * local.rng.uniform(0.8, 1.2))
            silent_before_s = local.clock() - local.config.ping_s
            for link in self._neighbours.outbound():
                if link.heard_at_s < silent_before_s and not link.sending:
                    local.tasks.spawn(self._ping(link), "ping one")

    async def _ping(self, link: Neighbour) -> None:
        """Say nothing, and hear whether the neighbour answers."""
        await self._announce(link, ())
