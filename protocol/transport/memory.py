"""Any number of nodes in one process: for tests, simulations and benchmarks.

    memory_network   carries requests between its transports with seeded faults, and places the DHT's records
    memory_calls     one request on its way, and what befalls it
    here             one node's part of it, by the contract of `base`

On a virtual clock (`virtual_time`) everything is a function of the seed and of the order of calls. On a real event
loop the latencies are real.

Departures from a real network: a peer needs no connection to be asked; the DHT routes in one hop, each key
having `NUM_REPLICAS` successors on a ring of hashed node ids, and its replicas store what they are given: the
validator is asked by the owner and by those who look up.
"""

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from protocol.transport.base import (
    MAX_FRAME_BYTES,
    MAX_RECORD_VALUE_BYTES,
    Handler,
    Record,
    RecordValidator,
    RequestRefused,
    RequestTimedOut,
    Traffic,
    Transport,
    TransportDown,
)
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER, TOO_LARGE, Dispatcher, check_name
from protocol.transport.gate import Gate
from protocol.transport.memory_calls import Call, fail, succeed
from protocol.transport.memory_network import Faults, MemoryNetwork
from protocol.transport.peer_id import peer_id_of

__all__ = ["Faults", "MemoryNetwork", "MemoryTransport"]

RECORD_OVERHEAD_BYTES = 80  # of a record in the DHT beside key and value: owner, expiration, framing
_ADDRESS = re.compile(r"/memory/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{1,128})\Z")


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
        super().__init__()
        self.network, self._node_id, self._validator = network, node_id, validator
        self._address = f"/memory/p2p/{peer_id_of(node_id)}"
        self._dispatcher = Dispatcher(max_requests=max_requests, max_requests_per_asker=max_requests_per_asker)
        self._state: str = "new"
        self._gate = Gate(node_id, _ADDRESS, f"looks like {self._address}")
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
        self.loop = asyncio.get_running_loop()
        self.network.join(self)
        self._state = "up"

    async def close(self) -> None:
        """Leave the network."""
        if self._state == "up":
            self.network.leave(self)
            self.go_down(TransportDown("the transport was closed"))
        self._state = "closed"

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug."""
        await self._dispatcher.wait_failed()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Reach the node behind an address of this network; both may ask each other from then on."""
        peer, _ = self._gate.parse(address)
        self._check_up()
        with self._gate.opened(peer):
            await self._call(Call(self, peer, None, b"", 0), timeout_s)
        return peer

    async def disconnect(self, node_id: str) -> None:
        """Refuse a peer until it is connected to again from here."""
        self._gate.refuse(node_id)
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
        return await self._call(Call(self, node_id, name, payload, max_response_bytes), timeout_s)

    async def _call(self, call: Call, timeout_s: float) -> bytes:
        self._check_up()
        self._gate.check(call.peer)
        future = call.future
        timer = self.loop.call_later(timeout_s, fail, future, RequestTimedOut(f"no response within {timeout_s:g} s"))
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
        if not self._validator(key, self._node_id, value, expires_at, self.network.clock()):
            raise ValueError("the node's own validator refuses this record")
        record = Record(self._node_id, value, expires_at)
        await self._round_trip()
        replicas = self.network.replicas(self._node_id, key)
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
        now, best = self.network.clock(), dict[str, Record]()
        for replica in self.network.replicas(self._node_id, key):
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
            while self.network.faults.loss and self.network.rng.random() < self.network.faults.loss:
                delay_s += 1.0
            delay_s += self.network.delay_s()
        future: asyncio.Future[None] = self.loop.create_future()
        timer = self.loop.call_later(delay_s, succeed, future, None)
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

    # a peer's part in a call

    def take(self, call: Call, payload: bytes, num_bytes: int) -> bool:
        """Answer a request that has arrived; return whether its asker is let in at all."""
        asker = call.asker.node_id
        if self._gate.refuses(asker):
            return False
        self._bytes_in += num_bytes
        if call.name is None:
            call.respond(self, b"", None)
            return True
        self._num_in += 1
        try:
            place = self._dispatcher.admit(asker, call.name, len(payload))
            place.__enter__()
        except RequestRefused as refusal:
            call.respond(self, b"", refusal)
            return True
        call.task = task = self.loop.create_task(self._answer(call, call.name, payload), name=asker)
        self._answering.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            place.__exit__(None, None, None)
            self._answering.discard(task)
            if task.cancelled():
                call.break_off(f"{self._node_id} broke off")

        task.add_done_callback(ended)
        return True

    async def _answer(self, call: Call, name: str, payload: bytes) -> None:
        try:
            response = await self._dispatcher.answer(call.asker.node_id, name, payload)
        except RequestRefused as refusal:
            call.respond(self, b"", refusal)
        else:
            call.respond(self, response, None)

    def send_after_s(self, num_bytes: int) -> float:
        """Count what leaves the node; return in how many seconds it arrives."""
        self._bytes_out += num_bytes
        delay_s, bandwidth = self.network.delay_s(), self.network.faults.bandwidth_bytes_per_s
        if bandwidth is not None:
            now_s = self.loop.time()
            self._uplink_free_at_s = max(now_s, self._uplink_free_at_s) + num_bytes / bandwidth
            delay_s += self._uplink_free_at_s - now_s
        return delay_s

    def count_in(self, num_bytes: int) -> None:
        """Count what reaches the node."""
        self._bytes_in += num_bytes

    def go_down(self, error: TransportDown) -> None:
        """End everything that is under way, and forget what others stored here."""
        for future in list(self._waiting):
            fail(future, error)
        for task in list(self._answering):
            task.cancel()
        self._records.clear()

    def come_back(self) -> None:
        """Be up again, after the network has let the node go down."""
        self._num_restarts += 1

    def _check_up(self) -> None:
        if self._state != "up" or self.network.is_dead(self._node_id):
            raise TransportDown("the transport is down" if self._state == "up" else "the transport is not running")
