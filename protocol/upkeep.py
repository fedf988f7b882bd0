"""Keep the directory true: renew the own record, ask who is there, forget what is old.

    renew      every `refresh_s` the node's record is signed anew and stored in its places (`shards`), which take
               turns: each is renewed before the record in it expires
    discover   neighbours are asked for records, and a shard is read: often while that tells of new nodes and few
               are known, or while there is no neighbour; seldom else
    peers      answered to anyone, within a quota

A read of a shard costs as much as a dozen groups, a renewal as much as one: neither is done more often than it is of
use. A DHT or a neighbour that does not answer is a fact of life: it is counted, and tried again in its turn.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from protocol.announcements import Announcements
from protocol.directory import MAX_TOLD_AGE_S, Directory
from protocol.limits import MAX_PEERS_RESPONSE_BYTES, MAX_SMALL_REQUEST_BYTES
from protocol.local import Local
from protocol.messages import NodeRecord
from protocol.neighbours import GREET_AGAIN_S, Neighbour, Neighbours
from protocol.own_record import OwnRecord
from protocol.pool import Pool
from protocol.quota import Quotas
from protocol.refusals import Reason, Refusal
from protocol.requests import (
    PeersRequest,
    PeersResponse,
    decode_peers_request,
    decode_peers_response,
    encode_peers_request,
    encode_peers_response,
)
from protocol.shards import NUM_SALTS, Shards
from protocol.signing import verify_node_record
from protocol.store import FrameStore
from protocol.transport.base import TransportError
from protocol.wire import decode_node_record

__all__ = ["Upkeep"]

FIRST_LINK_S = 25.0  # that a node that starts waits for somebody to store its record with
RENEW_AGAIN_S = 10.0  # after a renewal that failed, and at the soonest
FIRST_PLACE_AGAIN_S = 25.0  # nodes that start together find the same room, and look again at times of their own
PLACE_AGAIN_S = 7200.0  # how often a node looks whether its place in the DHT is still right: dear, and seldom news
FORGET_S = 10.0
MANY_NODES = 64  # known, beyond which there is no hurry to know more: a small swarm is known whole
MAX_PER_SOURCE = 16  # that count for this, of those that one source has told of first
_ASK_S = (5.0, 300.0)  # how often a neighbour is asked for records: while few nodes are known, and at most
FIRST_READ_S = 60.0  # by then those that started together have placed their records
READ_AGAIN_S = 15.0  # while reading tells of new nodes, or there is no neighbour
READ_SELDOM_S = 3600.0


class Upkeep:
    """One node's part in the directory."""

    def __init__(
        self,
        local: Local,
        directory: Directory,
        shards: Shards,
        neighbours: Neighbours,
        own_record: OwnRecord,
        announcements: Announcements,
        store: FrameStore,
        pool: Pool,
    ) -> None:
        self._local, self._directory, self._shards, self._neighbours = local, directory, shards, neighbours
        self._own_record, self._announcements, self._store, self._pool = own_record, announcements, store, pool
        self._answers = Quotas(0.5, 8, 1024)
        self._linked = asyncio.Event()  # there is, or was, a neighbour
        self._not_asked: list[str] = []  # neighbours that were not asked whom they know, since they became that
        neighbours.on_link.append(self._note_link)
        # Records of nodes beyond a bridge, at most so many, for who only looks.
        self.tell_beyond: Callable[[int], list[NodeRecord]] = lambda max_records: []
        self.num_holders = 0  # nodes that hold the own record, as the DHT says
        local.transport.handle("peers", self._handle_peers, max_request_bytes=MAX_SMALL_REQUEST_BYTES)

    def start(self) -> None:
        """Start the background work."""
        self._local.tasks.spawn(self._renew_loop(), "renew")
        self._local.tasks.spawn(self._discover_loop(), "discover")
        self._local.tasks.spawn(self._forget_loop(), "forget")

    async def _renew_loop(self) -> None:
        """Keep the own record in the DHT. Waits for its turn; ends with the member."""
        local = self._local
        place_at_s, place_pause_s, turn = 0.0, FIRST_PLACE_AGAIN_S * local.rng.uniform(0.5, 1.5), 0
        with contextlib.suppress(TimeoutError):  # some who give no place to a neighbour hold records all the same
            async with asyncio.timeout(FIRST_LINK_S):
                await self._linked.wait()
        while True:
            pause_s = local.config.refresh_s * local.rng.uniform(0.9, 1.1)
            try:
                salts: Sequence[int] = [turn % NUM_SALTS]
                if local.clock() >= place_at_s:
                    await self._shards.place(self._found)
                    place_at_s = local.clock() + place_pause_s
                    place_pause_s = PLACE_AGAIN_S * local.rng.uniform(0.5, 1.5)
                    salts = range(NUM_SALTS)
                self.num_holders = await self._shards.publish(self._own_record.renew(), salts)
                turn += 1
                self._neighbours.wake()
            except TransportError:
                local.counters.requests_failed += 1
                pause_s = 0.0
            except ValueError:  # the transport's clock is not this node's, and one of them is wrong: `clocks` says so
                local.refuse(Reason.CLOCK_SKEW)
            await asyncio.sleep(max(RENEW_AGAIN_S, min(pause_s, place_at_s - local.clock())))

    async def _discover_loop(self) -> None:
        """Learn of nodes. Waits longer while many are known; ends with the member."""
        local, rng = self._local, self._local.rng
        ask_s, turn, lonely_at_s = _ASK_S[0], 0, 0.0
        ask_at_s = local.clock() + rng.uniform(0, _ASK_S[0])
        read_at_s = local.clock() + FIRST_READ_S * rng.uniform(0.5, 1.5)
        while True:
            await asyncio.sleep(_ASK_S[0] * rng.uniform(0.8, 1.2))
            now_s, lonely = local.clock(), not self._neighbours.ids
            # Each is asked at least once: whoever has filled most places beside this node must not be all that is.
            self._not_asked = [node_id for node_id in self._not_asked if node_id in self._neighbours.ids]
            if self._not_asked or (now_s >= ask_at_s and not lonely):
                num_new = await self._ask(
                    self._not_asked.pop(0) if self._not_asked else rng.choice(list(self._neighbours.ids))
                )
                many = self._directory.num_known_widely(MAX_PER_SOURCE) >= MANY_NODES
                ask_s = _next_pause_s(ask_s, _ASK_S, often=num_new > 0 and not many, seldom=many)
                ask_at_s = now_s + ask_s * rng.uniform(0.5, 1.5)
            if now_s >= (lonely_at_s if lonely else read_at_s):
                num_new = await self._read(turn % NUM_SALTS)
                turn += 1
                few = len(self._directory) - len(self._neighbours.ids) < local.config.num_outbound
                lonely_at_s = now_s + READ_AGAIN_S * rng.uniform(0.5, 1.5)
                read_at_s = now_s + (READ_AGAIN_S if few and num_new else READ_SELDOM_S) * rng.uniform(0, 2)
            for link in self._neighbours.outbound():
                if now_s - link.greeted_at_s > GREET_AGAIN_S:
                    await self._neighbours.greet_again(link)

    def _note_link(self, link: Neighbour) -> None:
        self._linked.set()
        self._not_asked.append(link.node_id)

    async def _forget_loop(self) -> None:
        """Drop what is too old, so that memory stays flat. Ends with the member."""
        while True:
            await asyncio.sleep(FORGET_S * self._local.rng.uniform(0.8, 1.2))
            now_s = self._local.clock()
            self._directory.expire(now_s, keep=self._neighbours.ids)
            for root in self._announcements.expire(now_s):
                self._store.drop(root)
            self._store.expire(now_s)
            self._pool.expire(now_s)

    async def _read(self, salt: int) -> int:
        """Read a shard; return how many nodes of it were new."""
        num_before = len(self._directory)
        try:
            await self._shards.read(salt, self._found)
        except TransportError:
            self._local.counters.requests_failed += 1
        return len(self._directory) - num_before

    async def _ask(self, node_id: str) -> int:
        """Ask a neighbour whom it knows; return how many were new."""
        local, num_before = self._local, len(self._directory)
        try:
            data = await local.transport.request(
                node_id,
                "peers",
                encode_peers_request(PeersRequest(local.config.max_peers_told)),
                max_response_bytes=MAX_PEERS_RESPONSE_BYTES,
                timeout_s=local.config.request_timeout_s,
            )
            records = decode_peers_response(data).records
            if len(records) > local.config.max_peers_told:
                raise Refusal(Reason.UNASKED, "more records than asked for")
            for encoded in records:
                self._told(encoded, node_id)
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=node_id)
        except TransportError:
            local.counters.requests_failed += 1
        else:
            self._neighbours.heard(node_id)
        return len(self._directory) - num_before

    def _told(self, encoded: bytes, teller: str) -> None:
        """Take a record from a peer. Raises Refusal for one that no honest node tells."""
        local = self._local
        record = decode_node_record(encoded)
        known = self._directory.get(record.node_id)
        if known is not None and known.record.created_at_ms >= record.created_at_ms:
            return
        verify_node_record(local.config.swarm_id, record)
        age_s = local.clock() - record.created_at_ms / 1000
        if record.transport == local.transport.name and -MAX_TOLD_AGE_S < age_s < MAX_TOLD_AGE_S:
            self._directory.add(record, teller, local.clock())

    def _found(self, record: NodeRecord, salt: int) -> None:
        """Take a record from the DHT, which the transport's validator has believed."""
        if record.transport == self._local.transport.name:
            self._directory.add(record, f"dht/{salt}", self._local.clock())

    async def _handle_peers(self, asker: str, payload: bytes) -> bytes:
        """Tell anyone of some nodes."""
        local, now_s = self._local, self._local.clock()
        if local.reputation.is_banned(asker, now_s):
            raise local.refuse_request(Reason.BANNED)
        if not self._answers.take(asker, now_s):
            raise local.refuse_request(Reason.QUOTA, "asked too often; ask again later")
        try:
            request = decode_peers_request(payload)
        except Refusal as refusal:
            raise local.refuse_malformed(refusal, asker) from None
        records = self._directory.tell(request.max_records, now_s, exclude=asker, near=self._neighbours.ids)
        if asker not in self._neighbours.ids:  # who looks at the swarm; a neighbour looks for whom it can connect to
            beyond = self.tell_beyond(request.max_records // 2)
            records = [*records[: request.max_records - len(beyond)], *beyond]
        return encode_peers_response(PeersResponse(tuple(record.encoded for record in records)))


def _next_pause_s(pause_s: float, limits_s: tuple[float, float], *, often: bool, seldom: bool) -> float:
    """Return the next pause: the shortest, the longest, or twice the last one."""
    if often:
        return limits_s[0]
    return limits_s[1] if seldom else min(2 * pause_s, limits_s[1])
