"""hivemind's DHT node, kept to what it may do: every call of its protocol passes a filter, both ways.

    DhtFilter   a node's place follows from its peer id; records pass `OwnedRecordValidator` one by one;
                stores come from the owner alone; requests and responses are small; bytes are counted
    Dht         join, store and lookup over the routing table of a hivemind `DHTNode`

hivemind lets a node choose its place in the DHT, so that five of them can take every replica of a key; a peer
whose place is not the hash of its peer id is not believed here. Its own `get` merges whole dictionaries and
leaves searches running when it is cancelled; the walk here is iterative Kademlia over its calls.
"""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgpack
from google.protobuf.message import DecodeError
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.timed_storage import ValueWithExpiration

from protocol.clock import Clock
from protocol.errors import IdentityError
from protocol.transport.base import ClockSkewed, PeerUnreachable, Record
from protocol.transport.hivemind_daemon import Daemon
from protocol.transport.hivemind_records import (
    MAX_CLOCK_SKEW_S,
    MAX_PACKED_BYTES,
    MAX_RECORDS_PER_KEY,
    BoundedStorage,
    OwnedRecordValidator,
    as_dictionary,
    dht_id_of_key,
    pack_record,
    unpack_records,
)
from protocol.transport.peer_id import node_id_of_peer_bytes

__all__ = ["Dht", "DhtFilter", "dht_id_of_peer"]

NUM_REPLICAS = 8  # nodes that are asked to hold a record: some remain where others have taken places next to its key
HOLDERS_S = 600.0  # for which those that hold a record are asked again without a new walk
NUM_NEIGHBOURS = 20  # nodes that a peer names as nearer to a key
NUM_NEAREST_ANSWERED = 8  # a walk ends when so many of the nearest nodes that live have answered
NUM_PARALLEL = 4  # calls of one walk
CALL_TIMEOUT_S = 3.0
MAX_CALLS_IN = 64  # peers' calls that are answered at one time
MAX_REQUEST_BYTES = 16_384
MAX_KEYS_PER_REQUEST = 4
MAX_DICTIONARY_BYTES = MAX_RECORDS_PER_KEY * (MAX_PACKED_BYTES + 96)
DHT_ID_BYTES = 20


def dht_id_of_peer(peer: bytes) -> DHTID:
    """Return the one place in the DHT that a peer may take."""
    return DHTID.from_bytes(hashlib.sha1(b"swarm-node/dht" + peer, usedforsecurity=False).digest())


class DhtFilter:
    """Stands between hivemind's DHT and the network."""

    def __init__(
        self, validator: OwnedRecordValidator, storage: BoundedStorage, is_refused: Callable[[str], bool]
    ) -> None:
        self._validator, self._storage, self._is_refused = validator, storage, is_refused
        self._num_calls_in = 0
        self.bytes_in = self.bytes_out = 0
        self.refusals: Counter[str] = Counter()  # by reason

    async def answer(self, name: str, request: Any, peer: bytes, call: Callable[[], Awaitable[Any]]) -> Any:
        """Answer a peer's call, or raise: then the peer is told no more than that it failed."""
        self.bytes_in += request.ByteSize()
        reason = self._why_refuse(name, request, peer)
        if reason is not None:
            self.refusals[reason] += 1
            raise PermissionError(reason)
        self._check_place(request, peer)
        self._num_calls_in += 1
        try:
            response = self._store(request, peer) if name.endswith(".rpc_store") else await call()
        finally:
            self._num_calls_in -= 1
        self.bytes_out += response.ByteSize()
        return response

    async def ask(self, name: str, request: Any, peer: bytes, call: Callable[[], Awaitable[Any]]) -> Any:
        """Make a call; return what of the response can be believed."""
        self.bytes_out += request.ByteSize()
        response = await call()
        self.bytes_in += response.ByteSize()
        self._check_place(response, peer)
        if isinstance(response, dht_pb2.FindResponse):
            if len(response.results) != len(request.keys):
                self.refusals["dht_bad_response"] += 1
                raise PermissionError("dht_bad_response")
            for key, result in zip(request.keys, response.results, strict=True):
                self._clean(key, result)
        return response

    def _why_refuse(self, name: str, request: Any, peer: bytes) -> str | None:
        try:
            if self._is_refused(node_id_of_peer_bytes(peer)):
                return "dht_disconnected_peer"
        except IdentityError:
            return "dht_foreign_peer"
        if self._num_calls_in >= MAX_CALLS_IN:
            return "dht_busy"
        if request.ByteSize() > MAX_REQUEST_BYTES:
            return "dht_oversize"
        keys = [] if isinstance(request, dht_pb2.PingRequest) else request.keys
        if len(keys) > MAX_KEYS_PER_REQUEST or any(len(key) != DHT_ID_BYTES for key in keys):
            return "dht_bad_request"
        if isinstance(request, dht_pb2.StoreRequest):
            lists = (request.subkeys, request.values, request.expiration_time, request.in_cache)
            if any(len(items) != len(keys) for items in lists):
                return "dht_bad_request"
        return None

    def _check_place(self, message: Any, peer: bytes) -> None:
        """Forget a place that is not the peer's: hivemind then does not take it into its routing table."""
        place = message.peer.node_id
        if place and place != dht_id_of_peer(peer).to_bytes():
            self.refusals["dht_bad_place"] += 1
            message.peer.ClearField("node_id")

    def _store(self, request: Any, peer: bytes) -> Any:
        response = dht_pb2.StoreResponse()
        asker = node_id_of_peer_bytes(peer)
        for key, subkey, value, expires_at in zip(
            request.keys, request.subkeys, request.values, request.expiration_time, strict=True
        ):
            owner = self._validator.owner_of(key, subkey, value, expires_at)
            held = owner == asker and self._storage.store_subkey(DHTID.from_bytes(key), owner, value, expires_at)
            if not held:
                self.refusals["dht_full" if owner == asker else "dht_bad_record"] += 1
            response.store_ok.append(held)
        return response

    def _clean(self, key: bytes, result: Any) -> None:
        """Leave in a result the good records and the neighbours at their places."""
        neighbours = [
            (place, peer)
            for place, peer in zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False)
            if place == dht_id_of_peer(peer).to_bytes() and _is_node(peer)
        ]
        if len(neighbours) != len(result.nearest_node_ids):
            self.refusals["dht_bad_place"] += 1
        del result.nearest_node_ids[:], result.nearest_peer_ids[:]
        for place, peer in neighbours[:NUM_NEIGHBOURS]:
            result.nearest_node_ids.append(place)
            result.nearest_peer_ids.append(peer)
        records = self._good_records(key, result)
        if records:
            value, result.expiration_time = as_dictionary(records)
            result.type, result.value = dht_pb2.FOUND_DICTIONARY, MSGPackSerializer.dumps(value)
        else:
            result.type, result.value = dht_pb2.NOT_FOUND, b""

    def _good_records(self, key: bytes, result: Any) -> dict[str, ValueWithExpiration]:
        if result.type == dht_pb2.NOT_FOUND:
            return {}
        records: dict[str, ValueWithExpiration] = {}
        num_bad = 0
        for subkey, value, expires_at in _entries(result):
            owner = self._validator.owner_of(key, msgpack.packb(subkey, use_bin_type=True), value, expires_at)
            if owner is None or len(records) >= MAX_RECORDS_PER_KEY:
                num_bad += 1
            else:
                records[owner] = ValueWithExpiration(value, expires_at)
        if num_bad or not records:
            self.refusals["dht_bad_record"] += max(1, num_bad)
        return records


def _entries(result: Any) -> list[tuple[str, bytes, float]]:
    """Return what a peer says is under a key, as far as it has the shape of records."""
    if result.type != dht_pb2.FOUND_DICTIONARY or len(result.value) > MAX_DICTIONARY_BYTES:
        return []
    try:
        extension = msgpack.unpackb(result.value, raw=False)
        _, _, items = msgpack.unpackb(extension.data, raw=False)
        return [
            (subkey, value, float(expires_at))
            for subkey, value, expires_at in items
            if isinstance(subkey, str) and isinstance(value, bytes) and isinstance(expires_at, float)
        ]
    except (ValueError, TypeError, AttributeError, RecursionError, msgpack.UnpackException):
        return []


def _is_node(peer: bytes) -> bool:
    try:
        node_id_of_peer_bytes(peer)
    except IdentityError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Holders:
    """Who holds the node's own record under one key."""

    peers: tuple[PeerID, ...]
    is_held_here: bool
    until_s: float  # unix seconds: others may be nearer to the key by then


class Dht:
    """One node's part in the DHT, while one p2pd lives."""

    def __init__(
        self, node: DHTNode, daemon: Daemon, owner: str, validator: OwnedRecordValidator, clock: Clock
    ) -> None:
        self._node, self._daemon, self._owner, self._validator, self._clock = node, daemon, owner, validator, clock
        self._place = dht_id_of_peer(daemon.peer_id.to_bytes())
        self._holders: dict[DHTID, _Holders] = {}  # by key; of as many keys as this node writes to

    @classmethod
    async def start(
        cls, daemon: Daemon, owner: str, validator: OwnedRecordValidator, storage: BoundedStorage, clock: Clock
    ) -> "Dht":
        """Answer the DHT's calls."""
        node = await DHTNode.create(
            p2p=daemon,
            node_id=dht_id_of_peer(daemon.peer_id.to_bytes()),
            bucket_size=NUM_NEIGHBOURS,
            num_replicas=NUM_REPLICAS,
            wait_timeout=CALL_TIMEOUT_S,
            record_validator=validator,
            cache_locally=False,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
        )
        node.protocol.storage = storage
        return cls(node, daemon, owner, validator, clock)

    async def meet(self, peer: bytes) -> None:
        """Get to know a peer that is connected. Raises PeerUnreachable, ClockSkewed."""
        asked_at = self._clock()
        response = await self._ping(peer, dht_pb2.NodeInfo())  # without naming itself, until the clocks are compared
        answered_at = self._clock()
        early_s, late_s = asked_at - response.dht_time, response.dht_time - answered_at
        skew_s = max(early_s, late_s)
        if skew_s > MAX_CLOCK_SKEW_S:
            side = "behind" if early_s > 0 else "ahead of"
            fix = "set the one that is wrong (NTP keeps a clock right)"
            raise ClockSkewed(f"the peer's clock is {skew_s:.0f} s {side} this node's: {fix}")
        response = await self._ping(peer, self._node.protocol.node_info)
        if response.peer.node_id:
            place = DHTID.from_bytes(response.peer.node_id)
            await self._node.protocol.update_routing_table(place, PeerID(peer), responded=True)

    async def _ping(self, peer: bytes, own: Any) -> Any:
        stub = self._node.protocol.get_stub(PeerID(peer))
        try:
            return await stub.rpc_ping(dht_pb2.PingRequest(peer=own, validate=False), timeout=CALL_TIMEOUT_S)
        except (P2PDaemonError, P2PHandlerError, DecodeError, TimeoutError) as error:
            raise PeerUnreachable(f"the peer does not speak this protocol: {type(error).__name__}") from error

    async def fill_routing_table(self) -> None:
        """Learn who is near, so that they learn of this node too."""
        await self._walk(self._place, None)

    def peers(self) -> list[str]:
        """Return the node ids in the routing table."""
        return [node_id_of_peer_bytes(peer.to_bytes()) for peer in self._node.protocol.routing_table.peer_id_to_uid]

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Store the node's own record with the nodes nearest to its key; return how many hold it."""
        place, packed = dht_id_of_key(key), pack_record(key, value)
        subkey: bytes = msgpack.packb(self._owner, use_bin_type=True)
        if self._validator.owner_of(place.to_bytes(), subkey, packed, expires_at) is None:
            raise ValueError("the node's own validator refuses this record, or it expires too late")
        holders = self._holders.pop(place, None)
        if holders is not None and self._clock() < holders.until_s:
            num_held = self._store_here(place, packed, expires_at) if holders.is_held_here else 0
            num_held += len(await self._store_at(holders.peers, place, packed, expires_at))
            if num_held >= NUM_REPLICAS:
                self._holders[place] = holders
                return num_held
        # Next to the key, so that the same nodes are found, and nobody sends the records that stand under it.
        nearest = await self._walk(DHTID(int(place) ^ 1), None)
        own = place.xor_distance(self._place)
        is_near = sum(place.xor_distance(other) < own for other, _ in nearest[:NUM_REPLICAS]) < NUM_REPLICAS
        is_held_here = is_near and self._store_here(place, packed, expires_at)
        targets = [peer for _, peer in nearest[: NUM_REPLICAS + 3]]  # some to spare, for those that are full
        held: list[PeerID] = []
        while targets and (num_missing := NUM_REPLICAS - is_held_here - len(held)) > 0:
            held += await self._store_at(tuple(targets[:num_missing]), place, packed, expires_at)
            targets = targets[num_missing:]
        self._holders[place] = _Holders(tuple(held), is_held_here, self._clock() + HOLDERS_S)
        return is_held_here + len(held)

    def _store_here(self, place: DHTID, packed: bytes, expires_at: float) -> bool:
        return bool(self._node.protocol.storage.store_subkey(place, self._owner, packed, expires_at))

    async def _store_at(
        self, peers: tuple[PeerID, ...], place: DHTID, packed: bytes, expires_at: float
    ) -> list[PeerID]:
        """Ask some peers to hold the node's own record; return those that do."""

        async def ask(peer: PeerID) -> bool:
            answer = await self._node.protocol.call_store(peer, [place], [packed], [expires_at], [self._owner])
            return bool(answer and answer[0])

        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(ask(peer)) for peer in peers]
        return [peer for peer, call in zip(peers, calls, strict=True) if call.result()]

    async def lookup(self, key: bytes, timeout_s: float) -> list[Record]:
        """Return the good records under a key that come in time: of each owner the one that expires last."""
        place = dht_id_of_key(key)
        found: dict[str, Record] = {}

        def collect(dictionary: DictionaryDHTValue) -> None:
            for record in unpack_records(dictionary):
                if record.owner not in found or found[record.owner].expires_at < record.expires_at:
                    found[record.owner] = record

        own = self._node.protocol.storage.get(place)
        if own is not None:
            collect(own.value)
        with contextlib.suppress(TimeoutError):  # what has been found until then counts
            async with asyncio.timeout(timeout_s):
                await self._walk(place, collect)
        now = self._clock()
        return [record for record in found.values() if record.expires_at > now]

    async def _walk(
        self, target: DHTID, collect: Callable[[DictionaryDHTValue], None] | None
    ) -> list[tuple[DHTID, PeerID]]:
        """Ask ever nearer nodes for a key; return those that answered, nearest first."""
        neighbours = self._node.protocol.routing_table.get_nearest_neighbors(target, NUM_NEIGHBOURS)
        known: dict[DHTID, PeerID] = dict(neighbours)
        asked: set[DHTID] = {self._place}
        answered: set[DHTID] = set()
        blacklist = self._node.blacklist  # of peers that did not answer lately, for seconds that double
        calls: dict[asyncio.Task[Any], DHTID] = {}
        try:
            while True:
                live = (place for place, peer in known.items() if place in answered or peer not in blacklist)
                nearest = sorted(live, key=target.xor_distance)[:NUM_NEAREST_ANSWERED]
                for place in [p for p in nearest if p not in asked][: NUM_PARALLEL - len(calls)]:
                    asked.add(place)
                    calls[asyncio.create_task(self._node.protocol.call_find(known[place], [target]))] = place
                if not calls or all(place in answered for place in nearest):
                    break
                done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    place, response = calls.pop(call), call.result()
                    if response is None:
                        blacklist.register_failure(known[place])
                        continue
                    blacklist.register_success(known[place])
                    answered.add(place)
                    value, named = response[target]
                    known.update({p: peer for p, peer in named.items() if p != self._place})
                    if value is not None and collect is not None:
                        collect(value.value)
        finally:
            for call in calls:
                call.cancel()
        return sorted(((p, known[p]) for p in answered), key=lambda item: target.xor_distance(item[0]))
