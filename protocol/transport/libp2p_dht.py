"""The DHT of the transport `libp2p`: Kademlia over the nodes' own request streams.

    libp2p_routing    whom a node knows               libp2p_dht_messages   what is asked, as bytes
    records           what it stores and believes     libp2p_walk            whom to ask next
    here              answering, storing, looking up

py-libp2p's own `kad_dht` holds one value under a key where a shard of the directory has one of each owner, believes
addresses that anybody tells of anybody for an hour, and takes answers of 4 MiB. Here a node is taken into the routing
table when it has been met, which proves its id; a record comes from its owner alone, and is believed by its signature.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

from protocol.clock import Clock
from protocol.errors import IdentityError
from protocol.transport.base import (
    ClockSkewed,
    PeerUnreachable,
    Record,
    RequestRefused,
    TransportDown,
    TransportError,
)
from protocol.transport.libp2p_dht_messages import (
    FIND,
    MAX_FIND_RESPONSE_BYTES,
    MAX_MEET_BYTES,
    MAX_STORE_RESPONSE_BYTES,
    MEET,
    STORE,
    DhtRefused,
    Find,
    Found,
    Meet,
    Store,
)
from protocol.transport.libp2p_routing import RoutingTable, place_of_key, place_of_node
from protocol.transport.libp2p_walk import Walk
from protocol.transport.peer_id import node_id_of_peer_bytes
from protocol.transport.records import MAX_CLOCK_SKEW_S, MAX_KEY_BYTES, RecordRules, RecordStore

__all__ = ["Dht"]

NUM_REPLICAS: Final = 8  # nodes that are asked to hold a record
CALL_TIMEOUT_S: Final = 3.0
SILENT_FOR_S: Final = 30.0  # for which a node that did not answer is not asked
DOUBT_S: Final = 600.0  # for which who has named nodes that are not there is not believed about others
MAX_SILENT: Final = 1024
HOLDERS_S: Final = 600.0  # for which those that hold a record are asked again without a new walk

Ask = Callable[[str, str, bytes, int], Awaitable[bytes]]  # (node id, name, payload, most bytes of the answer)
Reach = Callable[[str, tuple[str, ...]], Awaitable[None]]  # connect to a node at one of these addresses, and meet it
_T = TypeVar("_T")
Note = Callable[[str, tuple[str, ...]], None]


class Dht:
    """One node's part in the DHT; it outlives what carries the bytes."""

    def __init__(
        self,
        own: str,
        rules: RecordRules,
        clock: Clock,
        ask: Ask,
        reach: Reach,
        own_addresses: Callable[[], tuple[str, ...]],
        note: Note,
    ) -> None:
        """`note` is told of every node that was met, with the addresses that it gave."""
        self._own, self._place = own, place_of_node(own)
        self._rules, self._clock, self._ask, self._reach = rules, clock, ask, reach
        self._own_addresses, self._note = own_addresses, note
        self._table = RoutingTable(own)
        self._held = RecordStore(clock)
        self._silent: dict[str, float] = {}  # by node id, until when (loop time)
        self._misled_until: dict[str, float] = {}  # the same, of who names nodes that are not there
        self._holders: dict[bytes, tuple[tuple[str, ...], float]] = {}  # by key: who holds the own record, until when
        self.refusals = Counter[str]()  # what peers said that was not believed, by reason

    def peers(self) -> list[str]:
        """Return the node ids in the routing table."""
        return self._table.ids()

    # answering

    async def handle_meet(self, asker: str, payload: bytes) -> bytes:
        """Say who is here, and take the asker into the routing table if its clock is right."""
        meet = self._decode(Meet.decode, payload)
        if abs(meet.now_ms / 1000 - self._clock()) <= MAX_CLOCK_SKEW_S:
            self._met(asker, meet.addresses)
        return Meet(int(self._clock() * 1000), self._own_addresses()).encode()

    async def handle_find(self, asker: str, payload: bytes) -> bytes:
        """Say who is near, and what is held."""
        find = self._decode(Find.decode, payload)
        nodes = [(node_id, told) for node_id, told in self._table.nearest(find.place) if node_id != asker]
        return Found(nodes, self._records(find.key) if find.key else []).encode()

    async def handle_store(self, asker: str, payload: bytes) -> bytes:
        """Hold a record of the asker's, if it is good and there is room."""
        store = self._decode(Store.decode, payload)
        if not self._rules.is_good(store.key, asker, store.value, store.expires_at):
            self.refusals["dht_bad_record"] += 1
            return Store.encode_answer(False)
        held = self._held.put(store.key, asker, store.value, store.expires_at)
        self.refusals["dht_full"] += not held
        return Store.encode_answer(held)

    def _decode(self, decode: Callable[[bytes], _T], payload: bytes) -> _T:
        try:
            return decode(payload)
        except DhtRefused as error:
            self.refusals["dht_bad_request"] += 1
            raise RequestRefused("dht_bad_request", str(error)) from None

    def _records(self, key: bytes) -> list[Record]:
        return [Record(owner, held.value, held.expires_at) for owner, held in self._held.get(key).items()]

    def _met(self, node_id: str, addresses: tuple[str, ...]) -> None:
        self._silent.pop(node_id, None)
        self._table.add(node_id, addresses)
        self._note(node_id, addresses)

    # meeting

    async def meet(self, peer: bytes) -> None:
        """Get to know a peer that is connected. Raises PeerUnreachable, ClockSkewed."""
        try:
            node_id = node_id_of_peer_bytes(peer)
        except IdentityError as error:
            raise PeerUnreachable(str(error)) from error
        asked_at = self._clock()
        payload = Meet(int(asked_at * 1000), self._own_addresses()).encode()
        try:
            meet = Meet.decode(await self._ask(node_id, MEET, payload, MAX_MEET_BYTES))
        except (RequestRefused, DhtRefused) as error:
            raise PeerUnreachable(f"the peer does not speak this protocol: {error}") from error
        peers_at = meet.now_ms / 1000
        skew_s = max(asked_at - peers_at, peers_at - self._clock())
        if skew_s > MAX_CLOCK_SKEW_S:
            side = "behind" if peers_at < asked_at else "ahead of"
            fix = "set the one that is wrong (NTP keeps a clock right)"
            raise ClockSkewed(f"the peer's clock is {skew_s:.0f} s {side} this node's: {fix}")
        self._met(node_id, meet.addresses)

    async def fill_routing_table(self) -> None:
        """Learn who is near, so that they learn of this node too."""
        await self._walk(self._place, b"", lambda record: None)

    async def find(self, node_id: str) -> tuple[str, ...]:
        """Return where a node can be reached, as far as those near to it say; nothing where nobody knows it."""
        try:
            place = place_of_node(node_id)
        except IdentityError:
            return ()
        known = self._table.addresses(node_id)
        if known:
            return known
        _, told = await self._walk(place, b"", lambda record: None)
        return told.get(node_id, ())

    # records

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Store the node's own record with the nodes nearest to its key; return how many hold it."""
        if not 1 <= len(key) <= MAX_KEY_BYTES:
            raise ValueError(f"a key has 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")
        if not self._rules.is_good(key, self._own, value, expires_at):
            raise ValueError("the node's own validator refuses this record, or it expires too late")
        payload, place = Store(key, value, expires_at).encode(), place_of_key(key)
        held = list[str]()
        holders, until_s = self._holders.pop(key, ((), 0.0))
        if self._clock() < until_s:
            held = await self._store_at(holders, key, payload)
            if len(held) >= NUM_REPLICAS:
                self._holders[key] = (tuple(held), until_s)
                return len(held)
        answered, _ = await self._walk(place, b"", lambda record: None)
        nearest = sorted({*answered, self._own}, key=lambda node_id: place_of_node(node_id) ^ place)
        targets = [node_id for node_id in nearest[: NUM_REPLICAS + 3] if node_id not in held]  # some to spare
        while targets and (num_missing := NUM_REPLICAS - len(held)) > 0:
            held += await self._store_at(targets[:num_missing], key, payload)
            targets = targets[num_missing:]
        self._holders[key] = (tuple(held), self._clock() + HOLDERS_S)
        return len(held)

    async def _store_at(self, nodes: Iterable[str], key: bytes, payload: bytes) -> list[str]:
        """Ask some nodes to hold the node's own record; return those that do."""

        async def ask(node_id: str) -> bool:
            if node_id == self._own:
                store = Store.decode(payload)
                return self._held.put(key, self._own, store.value, store.expires_at)
            answer = await self._call(node_id, STORE, payload, MAX_STORE_RESPONSE_BYTES)
            try:
                return answer is not None and Store.decode_answer(answer)
            except DhtRefused:
                self.refusals["dht_bad_response"] += 1
                return False

        async with asyncio.TaskGroup() as group:
            calls = {node_id: group.create_task(ask(node_id)) for node_id in nodes}
        return [node_id for node_id, call in calls.items() if call.result()]

    async def lookup(self, key: bytes, timeout_s: float) -> Sequence[Record]:
        """Return the good records under a key that come in time: of each owner the one that expires last."""
        found: dict[str, Record] = {}

        def collect(record: Record) -> None:
            earlier = found.get(record.owner)
            if earlier is None or earlier.expires_at < record.expires_at:
                found[record.owner] = record

        for record in self._records(key):
            collect(record)
        with contextlib.suppress(TimeoutError):  # what has been found until then counts
            async with asyncio.timeout(timeout_s):
                await self._walk(place_of_key(key), key, collect)
        return [
            record
            for record in found.values()
            if self._rules.is_good(key, record.owner, record.value, record.expires_at)
        ]

    # walking

    async def _walk(
        self, target: int, key: bytes, collect: Callable[[Record], None]
    ) -> tuple[set[str], dict[str, tuple[str, ...]]]:
        """Ask ever nearer nodes; return those that answered, and all that are known now, with addresses."""
        walk = Walk(self._own, target, dict(self._table.nearest(target)), self._doubted(), self._is_silent)
        payload = Find(target, key).encode()
        calls: dict[asyncio.Task[Found | None], str] = {}
        try:
            while True:
                for node_id in walk.next():
                    calls[asyncio.create_task(self._find_at(node_id, walk.known[node_id], payload))] = node_id
                if not calls:
                    break
                done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
                for call in done:
                    node_id, found = calls.pop(call), call.result()
                    if found is None:
                        walk.fails(node_id)
                        continue
                    walk.answers(node_id, found.nodes)
                    for record in found.records if key else ():
                        collect(record)
        finally:
            for call in calls:
                call.cancel()
            for namer in walk.misled_by:
                self.refusals["dht_misled"] += namer not in self._misled_until
                self._misled_until[namer] = self._now_s() + DOUBT_S
                if len(self._misled_until) > MAX_SILENT:
                    del self._misled_until[next(iter(self._misled_until))]
        return walk.answered, walk.known

    def _doubted(self) -> set[str]:
        """Whose word on other nodes counts for nothing now."""
        now_s = self._now_s()
        self._misled_until = {namer: until_s for namer, until_s in self._misled_until.items() if until_s > now_s}
        return set(self._misled_until)

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()

    async def _find_at(self, node_id: str, addresses: tuple[str, ...], payload: bytes) -> Found | None:
        """Ask one node; None where it does not answer."""
        if addresses and not self._table.addresses(node_id):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await self._reach(node_id, addresses)
            except TransportDown:
                raise
            except (TransportError, TimeoutError, ValueError):
                self._fell_silent(node_id)
                return None
        answer = await self._call(node_id, FIND, payload, MAX_FIND_RESPONSE_BYTES)
        if answer is None:
            return None
        try:
            return Found.decode(answer)
        except DhtRefused:
            self.refusals["dht_bad_response"] += 1
            return None

    async def _call(self, node_id: str, name: str, payload: bytes, max_bytes: int) -> bytes | None:
        """Ask one node; None where it does not answer. Raises TransportDown."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await self._ask(node_id, name, payload, max_bytes)
        except TransportDown:
            raise
        except RequestRefused:
            return None
        except (TransportError, TimeoutError):
            self._fell_silent(node_id)
            return None

    def _fell_silent(self, node_id: str) -> None:
        self._table.drop(node_id)
        self._silent[node_id] = self._now_s() + SILENT_FOR_S
        if len(self._silent) > MAX_SILENT:
            del self._silent[next(iter(self._silent))]

    def _is_silent(self, node_id: str) -> bool:
        return self._silent.get(node_id, 0.0) > self._now_s()
