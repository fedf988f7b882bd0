"""Any number of nodes in one process: for tests, simulations and benchmarks.

    network     carries requests between its transports with seeded faults, and places the DHT's records
    transport   one node's part of it, by the contract of `base`

Everything is a function of the seed and of the order of calls, on a virtual clock (`virtual_time`) exactly so.
On a real event loop the latencies are real. Faults, partitions and deaths may change at any time.

Departures from a real network: a peer needs no connection to be asked; the DHT routes in one hop, each key
having `NUM_REPLICAS` successors on a ring of hashed node ids, and its replicas store what they are given: the
validator is asked by the owner and by those who look up.
"""

import asyncio
import hashlib
import random
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.clock import Clock, system_clock
from protocol.errors import IdentityError
from protocol.transport.base import (
    MAX_FRAME_BYTES,
    MAX_RECORD_VALUE_BYTES,
    Handler,
    PeerUnreachable,
    Record,
    RecordValidator,
    RequestRefused,
    RequestTimedOut,
    ResponseTooLarge,
    Traffic,
    Transport,
    TransportDown,
)
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER, TOO_LARGE, Dispatcher, check_name
from protocol.transport.peer_id import node_id_of_peer, peer_id_of

__all__ = ["Faults", "MemoryNetwork", "MemoryTransport"]

NUM_REPLICAS = 5  # nodes that hold one record
HEADER_BYTES = 5  # of a request, beside its name, and of a response: what `hivemind` needs on a stream
RECORD_OVERHEAD_BYTES = 80  # of a record in the DHT beside key and value: owner, expiration, framing
_ADDRESS = re.compile(r"/memory/p2p/([1-9A-HJ-NP-Za-km-z]{1,128})\Z")


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network does to every message. A request and its response are two messages."""

    latency_s: tuple[float, float] = (0.01, 0.05)  # uniform, each message anew, so that messages overtake
    bandwidth_bytes_per_s: float | None = None  # of a node's uplink, which its messages share one after the other
    loss: float = 0.0  # probability that a message vanishes
    duplication: float = 0.0  # probability that a request arrives twice
    corruption: float = 0.0  # probability that one byte of the payload changes
    reordering: float = 0.0  # probability that a message waits for another `reordering_s`
    reordering_s: float = 1.0


class MemoryNetwork:
    """The network of one simulation."""

    def __init__(self, rng: random.Random, faults: Faults | None = None, clock: Clock = system_clock) -> None:
        self.rng, self.clock = rng, clock
        self.faults = faults or Faults()  # may be replaced at any time
        self._nodes: dict[str, MemoryTransport] = {}  # by node id, from `start` to `close`
        self._ring: list[tuple[bytes, str]] = []  # (hash, node id) of the same, sorted
        self._dead: set[str] = set()
        self._sides: dict[str, int] = {}  # by node id while there is a partition; others are on side 0

    def partition(self, *sides: Iterable[str]) -> None:
        """Let messages pass only within a side, from now on; nodes that are not named are with the first."""
        self._sides = {node_id: number for number, side in enumerate(sides) for node_id in side}

    def heal(self) -> None:
        """End the partition."""
        self._sides = {}

    def kill(self, node_id: str) -> None:
        """Take a node's transport down: its requests raise TransportDown, requests to it PeerUnreachable."""
        self._dead.add(node_id)
        node = self._nodes.get(node_id)
        if node is not None:
            node._go_down(TransportDown("the node's transport was killed"))

    def revive(self, node_id: str) -> None:
        """Bring it back: counted as a restart. Records that others had stored with it are gone."""
        self._dead.discard(node_id)
        node = self._nodes.get(node_id)
        if node is not None:
            node._come_back()

    def reaches(self, source: str, target: str) -> bool:
        """Whether a message from one node to another could arrive just now."""
        alive = target in self._nodes and target not in self._dead and source not in self._dead
        return alive and not self._parted(source, target)

    def _parted(self, source: str, target: str) -> bool:
        return bool(self._sides) and self._sides.get(source, 0) != self._sides.get(target, 0)

    def _join(self, node: "MemoryTransport") -> None:
        old = self._nodes.get(node.node_id)
        if old is not None:
            raise ValueError(f"{node.node_id} is in this network already: close its transport first")
        self._nodes[node.node_id] = node
        insort(self._ring, (_place(node.node_id.encode()), node.node_id))

    def _leave(self, node: "MemoryTransport") -> None:
        del self._nodes[node.node_id]
        del self._ring[bisect_left(self._ring, (_place(node.node_id.encode()), node.node_id))]

    def _delay_s(self) -> float:
        faults, rng = self.faults, self.rng
        low, high = faults.latency_s
        delay_s = low + (high - low) * rng.random()
        if faults.reordering and rng.random() < faults.reordering:
            delay_s += faults.reordering_s
        return delay_s

    def _replicas(self, asker: str, key: bytes) -> "list[MemoryTransport]":
        """Return the nodes that hold a key, as far as the asker reaches them."""
        found: list[MemoryTransport] = []
        start, num_nodes = bisect_left(self._ring, (_place(key), "")), len(self._ring)
        for step in range(num_nodes):
            node_id = self._ring[(start + step) % num_nodes][1]
            if self.reaches(asker, node_id):
                found.append(self._nodes[node_id])
                if len(found) == NUM_REPLICAS:
                    break
        return found


class MemoryTransport(Transport):
    """One node of a `MemoryNetwork`."""

    name = "memory"

    def __init__(
        self,
        network: MemoryNetwork,
        node_id: str,
        validator: RecordValidator,
        *,
        max_requests: int = MAX_REQUESTS,
        max_requests_per_asker: int = MAX_REQUESTS_PER_ASKER,
    ) -> None:
        self._network, self._node_id, self._validator = network, node_id, validator
        self._address = f"/memory/p2p/{peer_id_of(node_id)}"
        self._dispatcher = Dispatcher(max_requests=max_requests, max_requests_per_asker=max_requests_per_asker)
        self._state: str = "new"
        self._refused: set[str] = set()  # peers that were disconnected from here
        self._waiting: set[asyncio.Future[Any]] = set()  # responses that this node waits for
        self._answering: set[asyncio.Task[None]] = set()
        self._records: dict[bytes, dict[str, Record]] = {}  # that it holds for the DHT
        self._uplink_free_at_s = 0.0  # loop time
        self._bytes_in = self._bytes_out = self._num_in = self._num_out = self._num_restarts = 0

    @property
    def node_id(self) -> str:
        """The node's own id."""
        return self._node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """The one address under which others in the same network reach this node."""
        return (self._address,)

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        return Traffic(self._bytes_in, self._bytes_out, self._num_in, self._num_out, self._num_restarts)

    def handle(self, name: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer requests of this name."""
        if self._state != "new":
            raise RuntimeError("handlers are named before the transport starts")
        self._dispatcher.handle(name, handler, max_request_bytes)

    async def start(self) -> None:
        """Join the network."""
        if self._state != "new":
            raise RuntimeError("a transport starts once")
        self._loop = asyncio.get_running_loop()
        self._network._join(self)
        self._state = "up"

    async def close(self) -> None:
        """Leave the network."""
        if self._state == "up":
            self._network._leave(self)
            self._go_down(TransportDown("the transport was closed"))
        self._state = "closed"

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug."""
        await self._dispatcher.wait_failed()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Reach the node behind an address of this network; both may ask each other from then on."""
        match = _ADDRESS.match(address)
        try:
            peer = node_id_of_peer(match[1]) if match else None
        except IdentityError:
            peer = None
        if peer is None:
            raise ValueError(f"not an address of this transport: {address[:200]!r}; it looks like {self._address}")
        if peer == self._node_id:
            raise ValueError("this is the node's own address: name another node's")
        self._check_up()
        was_refused = peer in self._refused
        self._refused.discard(peer)
        try:
            await self._call(_Call(self, peer, None, b"", 0), timeout_s)
        except BaseException:
            if was_refused:
                self._refused.add(peer)
            raise
        return peer

    async def disconnect(self, node_id: str) -> None:
        """Refuse a peer until it is connected to again from here."""
        self._refused.add(node_id)
        for task in [task for task in self._answering if task.get_name() == node_id]:
            task.cancel()

    async def request(
        self, node_id: str, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float
    ) -> bytes:
        """Ask a peer; return its response."""
        self._check_up()
        check_name(name)
        if len(payload) > MAX_FRAME_BYTES:
            raise RequestRefused(TOO_LARGE, f"a request has at most {MAX_FRAME_BYTES} bytes")
        self._num_out += 1
        return await self._call(_Call(self, node_id, name, payload, max_response_bytes), timeout_s)

    async def _call(self, call: "_Call", timeout_s: float) -> bytes:
        self._check_up()
        if call.peer in self._refused:
            raise PeerUnreachable(f"{call.peer} was disconnected from here")
        future = call.future
        timer = self._loop.call_later(timeout_s, _fail, future, RequestTimedOut(f"no response within {timeout_s:g} s"))
        self._waiting.add(future)
        try:
            call.send()
            return await future
        finally:
            timer.cancel()
            self._waiting.discard(future)
            call.give_up()

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Put the node's own record under a key."""
        self._check_up()
        if len(value) > MAX_RECORD_VALUE_BYTES:
            raise ValueError(f"a record has at most {MAX_RECORD_VALUE_BYTES} bytes, not {len(value)}")
        if not self._validator(key, self._node_id, value, expires_at, self._network.clock()):
            raise ValueError("the node's own validator refuses this record")
        record = Record(self._node_id, value, expires_at)
        await self._round_trip()
        replicas = self._network._replicas(self._node_id, key)
        for replica in replicas:
            held = replica._records.setdefault(key, {})
            if self._node_id not in held or held[self._node_id].expires_at <= expires_at:
                held[self._node_id] = record
            self._carry_record(replica, len(key) + len(value) + RECORD_OVERHEAD_BYTES)
        return len(replicas)

    async def lookup(self, key: bytes, *, timeout_s: float) -> Sequence[Record]:
        """Return the records under a key that pass the validator."""
        self._check_up()
        try:
            async with asyncio.timeout(timeout_s):
                await self._round_trip()
        except TimeoutError:
            return []
        now, best = self._network.clock(), dict[str, Record]()
        for replica in self._network._replicas(self._node_id, key):
            held = replica._records.get(key, {})
            for owner in [owner for owner, record in held.items() if record.expires_at <= now]:
                del held[owner]
            self._carry_record(replica, len(key) + RECORD_OVERHEAD_BYTES)
            for owner, record in held.items():
                replica._carry_record(self, len(record.value) + RECORD_OVERHEAD_BYTES)
                if owner not in best or best[owner].expires_at < record.expires_at:
                    best[owner] = record
        return [r for r in best.values() if self._validator(key, r.owner, r.value, r.expires_at, now)]

    async def _round_trip(self) -> None:
        """Let the time of a message there and back pass; one that is lost is sent again after a second."""
        delay_s = 0.0
        for _ in range(2):
            while self._network.faults.loss and self._network.rng.random() < self._network.faults.loss:
                delay_s += 1.0
            delay_s += self._network._delay_s()
        future: asyncio.Future[None] = self._loop.create_future()
        timer = self._loop.call_later(delay_s, _succeed, future, None)
        self._waiting.add(future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiting.discard(future)

    def _carry_record(self, other: "MemoryTransport", num_bytes: int) -> None:
        if other is not self:
            self._bytes_out += num_bytes
            other._bytes_in += num_bytes

    def _check_up(self) -> None:
        if self._state != "up" or self._node_id in self._network._dead:
            raise TransportDown("the transport is down" if self._state == "up" else "the transport is not running")

    def _go_down(self, error: TransportDown) -> None:
        for future in list(self._waiting):
            _fail(future, error)
        for task in list(self._answering):
            task.cancel()
        self._records.clear()

    def _come_back(self) -> None:
        self._num_restarts += 1

    def _send_after_s(self, num_bytes: int) -> float:
        """Count what leaves the node; return in how many seconds it arrives."""
        self._bytes_out += num_bytes
        delay_s, bandwidth = self._network._delay_s(), self._network.faults.bandwidth_bytes_per_s
        if bandwidth is not None:
            now_s = self._loop.time()
            self._uplink_free_at_s = max(now_s, self._uplink_free_at_s) + num_bytes / bandwidth
            delay_s += self._uplink_free_at_s - now_s
        return delay_s


class _Call:
    """One request on its way to a peer and back. `name` None asks whether the peer is there: a connection."""

    __slots__ = ("asker", "future", "max_response_bytes", "name", "network", "payload", "peer", "task")

    def __init__(
        self, asker: MemoryTransport, peer: str, name: str | None, payload: bytes, max_response_bytes: int
    ) -> None:
        self.asker, self.peer, self.name, self.payload = asker, peer, name, payload
        self.max_response_bytes = max_response_bytes
        self.network = asker._network
        self.future: asyncio.Future[bytes] = asker._loop.create_future()
        self.task: asyncio.Task[None] | None = None

    def send(self) -> None:
        """Put the request on its way, as often as the network's faults say."""
        num_bytes = HEADER_BYTES + len(self.name or "") + len(self.payload)
        delay_s, faults, rng = self.asker._send_after_s(num_bytes), self.network.faults, self.network.rng
        if faults.loss and rng.random() < faults.loss:
            return
        payload = self._spoilt(self.payload)
        self.asker._loop.call_later(delay_s, self._arrive, payload, num_bytes)
        if faults.duplication and rng.random() < faults.duplication:
            self.asker._loop.call_later(delay_s + self.network._delay_s(), self._arrive, payload, num_bytes)

    def give_up(self) -> None:
        """Stop the peer's work on it, which notices when the message that says so arrives."""
        if self.task is not None and not self.task.done():
            self.asker._loop.call_later(self.network._delay_s(), self.task.cancel)

    def _arrive(self, payload: bytes, num_bytes: int) -> None:
        network, asker = self.network, self.asker
        if network._parted(asker._node_id, self.peer):
            return  # into nothing: the asker's timer ends it
        peer = network._nodes.get(self.peer)
        if peer is None or self.peer in network._dead or asker._node_id in peer._refused:
            self._break_off(f"{self.peer} does not answer")
            return
        peer._bytes_in += num_bytes
        if self.name is None:
            self._respond(peer, b"", None)
            return
        peer._num_in += 1
        try:
            place = peer._dispatcher.admit(asker._node_id, self.name, len(payload))
            place.__enter__()
        except RequestRefused as refusal:
            self._respond(peer, b"", refusal)
            return
        self.task = asker._loop.create_task(self._answer(peer, payload), name=asker._node_id)
        peer._answering.add(self.task)

        def ended(task: asyncio.Task[None]) -> None:
            place.__exit__(None, None, None)
            peer._answering.discard(task)
            if task.cancelled():
                self._break_off(f"{self.peer} broke off")

        self.task.add_done_callback(ended)

    async def _answer(self, peer: MemoryTransport, payload: bytes) -> None:
        assert self.name is not None
        try:
            response = await peer._dispatcher.answer(self.asker._node_id, self.name, payload)
        except RequestRefused as refusal:
            self._respond(peer, b"", refusal)
        else:
            self._respond(peer, response, None)

    def _respond(self, peer: MemoryTransport, response: bytes, refusal: RequestRefused | None) -> None:
        network = self.network
        error: Exception | None = None
        num_bytes = HEADER_BYTES + len(response)
        if refusal is not None:
            num_bytes += 1 + len(refusal.code) + len(refusal.detail.encode())
            error = RequestRefused(refusal.code, refusal.detail)
        elif len(response) > self.max_response_bytes:
            num_bytes = HEADER_BYTES
            error = ResponseTooLarge(f"{len(response)} bytes, over the cap of {self.max_response_bytes}")
        delay_s = peer._send_after_s(num_bytes)
        if network.faults.loss and network.rng.random() < network.faults.loss:
            return
        self.asker._loop.call_later(delay_s, self._come_home, self._spoilt(response), error, num_bytes)

    def _come_home(self, response: bytes, error: Exception | None, num_bytes: int) -> None:
        if self.network._parted(self.asker._node_id, self.peer) or self.future.done():
            return
        self.asker._bytes_in += num_bytes
        if error is not None:
            _fail(self.future, error)
        else:
            _succeed(self.future, response)

    def _break_off(self, why: str) -> None:
        self.asker._loop.call_later(self.network._delay_s(), _fail, self.future, PeerUnreachable(why))

    def _spoilt(self, payload: bytes) -> bytes:
        rng, corruption = self.network.rng, self.network.faults.corruption
        if not payload or not corruption or rng.random() >= corruption:
            return payload
        position = rng.randrange(len(payload))
        return payload[:position] + bytes([payload[position] ^ rng.randrange(1, 256)]) + payload[position + 1 :]


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _succeed(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _place(name: bytes) -> bytes:
    """Where on the ring something stands."""
    return hashlib.sha256(name).digest()[:16]
