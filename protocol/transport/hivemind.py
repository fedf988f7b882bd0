"""hivemind's libp2p daemon and DHT in the node's own event loop: TCP, QUIC where asked for, relays, NAT traversal.

Parts: `hivemind_settings` (what a user sets, ports), `hivemind_daemon` (p2pd), `hivemind_dht` and
`hivemind_records` (the DHT, and what it stores and believes), `streams` (the framing of requests).

A request is one stream of the libp2p protocol `/swarm-node/request/1`, framed as `streams` says. The daemon's key
is the node's key, so that libp2p's handshake proves the node id. Of DHT calls there are hivemind's `DHTProtocol`
rpc_ping, rpc_store and rpc_find, over its unary calls.

A supervisor watches p2pd. When it has ended or hangs, everything that used it fails with TransportDown, and
a new one takes its key, its ports, the records that this node holds for others, and its peers.

hivemind is imported by `start`, in a thread: it takes seconds, and no other transport may load it.
"""

import asyncio
import importlib
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.clock import Clock, system_clock
from protocol.errors import IdentityError
from protocol.identity import Identity
from protocol.transport.base import (
    MAX_FRAME_BYTES,
    MAX_RECORD_VALUE_BYTES,
    ClockSkewed,
    Handler,
    PeerUnreachable,
    Record,
    RecordValidator,
    RequestRefused,
    RequestTimedOut,
    Traffic,
    Transport,
    TransportDown,
    TransportError,
)
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER, TOO_LARGE, Dispatcher
from protocol.transport.hivemind_settings import HivemindSettings, choose_ports
from protocol.transport.peer_id import node_id_of_peer, node_id_of_peer_bytes, peer_bytes_of, peer_id_of
from protocol.transport.streams import (
    ANSWERED,
    CHUNK_BYTES,
    GRACE_S,
    RESPONSE_HEAD_BYTES,
    BrokenStream,
    read_request_head,
    read_response,
    refusal_bytes,
    request_head,
    response_head,
    transfer_timeout_s,
    write_all,
)

if TYPE_CHECKING:
    from protocol.transport.hivemind_daemon import Daemon
    from protocol.transport.hivemind_dht import Dht

__all__ = ["HivemindSettings", "HivemindTransport"]

_T = TypeVar("_T")
STREAM_PROTOCOL = "/swarm-node/request/1"
MAX_STREAMS = 256  # that peers have open at one time
MAX_STREAMS_PER_PEER = 32
PING_INTERVAL_S = 2.0  # at which p2pd is asked for its addresses
MIN_PING_INTERVAL_S = 0.2  # where strangers call
PING_TIMEOUT_S = 3.0
NUM_MISSED_PINGS = 2  # after which p2pd hangs
STORE_TIMEOUT_S = 20.0
RESTART_DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # before each attempt; then the transport has failed
REJOIN_TIMEOUT_S = 10.0
CANCEL_AGAIN_S = 5.0  # longer than p2pd takes to end
MAX_KNOWN_PEERS = 64  # that are connected to again after a restart
MIN_KNOWN_PEERS = 8  # with fewer, a stranger who calls is noted at once
_PEER_ADDRESS = re.compile(r"(/.+)/p2p/([1-9A-HJ-NP-Za-km-z]+)\Z")


class HivemindTransport(Transport):
    """One node's transport over p2pd."""

    name = "hivemind"

    def __init__(
        self,
        identity: Identity,
        validator: RecordValidator,
        settings: HivemindSettings | None = None,
        *,
        clock: Clock = system_clock,
        max_requests: int = MAX_REQUESTS,
        max_requests_per_asker: int = MAX_REQUESTS_PER_ASKER,
    ) -> None:
        self._identity, self._validator, self._clock = identity, validator, clock
        self._settings = settings or HivemindSettings()
        self._node_id = identity.node_id
        self._dispatcher = Dispatcher(max_requests=max_requests, max_requests_per_asker=max_requests_per_asker)
        self._state = "new"
        self._session: _Session | None = None  # None while p2pd is down
        self._supervisor: asyncio.Task[None] | None = None
        self._listen: tuple[str, ...] = ()
        self._addresses: tuple[str, ...] = ()
        self._refused: set[str] = set()  # peers that were disconnected from here
        self._known: OrderedDict[str, str] = OrderedDict()  # addresses by node id, of connected peers
        self._stranger = asyncio.Event()  # somebody called whose address is not known
        self._num_streams: Counter[str] = Counter()  # by asker
        self._answering: dict[asyncio.Task[None], str] = {}
        self._bytes_in = self._bytes_out = self._num_in = self._num_out = self._num_restarts = 0
        self.broken_streams: Counter[str] = Counter()  # by reason: what peers did that is not counted as a request

    @property
    def node_id(self) -> str:
        """The node's own id."""
        return self._node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where p2pd can be reached, as far as it knows by now; a relay's or router's address may come later."""
        return self._addresses

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        dht = self._filter if self._state != "new" else None
        return Traffic(
            self._bytes_in + (dht.bytes_in if dht else 0),
            self._bytes_out + (dht.bytes_out if dht else 0),
            self._num_in,
            self._num_out,
            self._num_restarts,
        )

    @property
    def dht_refusals(self) -> Counter[str]:
        """What peers said to the DHT that was not believed, by reason."""
        return self._filter.refusals if self._state != "new" else Counter()

    def handle(self, name: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer requests of this name."""
        if self._state != "new":
            raise RuntimeError("handlers are named before the transport starts")
        self._dispatcher.handle(name, handler, max_request_bytes)

    async def start(self) -> None:
        """Load hivemind, start p2pd, listen."""
        if self._state != "new":
            raise RuntimeError("a transport starts once")
        self._listen = await choose_ports(self._settings.listen)
        if "libp2p" in sys.modules:
            raise TransportError("hivemind and libp2p cannot share a process: choose one transport")
        await asyncio.to_thread(importlib.import_module, "protocol.transport.hivemind_dht")
        from protocol.transport.hivemind_dht import DhtFilter
        from protocol.transport.hivemind_records import BoundedStorage, OwnedRecordValidator

        self._record_validator = OwnedRecordValidator(self._validator, self._clock)
        self._storage = BoundedStorage(self._clock)
        self._filter = DhtFilter(self._record_validator, self._storage, self._is_refused)
        self._session = await self._open_session()
        self._state = "up"
        self._supervisor = asyncio.create_task(self._supervise(self._session), name="p2pd supervisor")
        self._supervisor.add_done_callback(self._fail_with)

    async def close(self) -> None:
        """End p2pd, after everything that uses it."""
        was_up, self._state = self._state == "up", "closed"
        if not was_up:
            return
        assert self._supervisor is not None
        while not self._supervisor.done():  # again, where hivemind loses a cancellation (Python 3.11's wait_for does)
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor}, timeout=CANCEL_AGAIN_S)
        session, self._session = self._session, None
        if session is not None:
            await self._end_session(session)

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug, or why p2pd does not come back."""
        await self._dispatcher.wait_failed()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Connect p2pd to an address, and get to know the peer's DHT."""
        match = _PEER_ADDRESS.match(address)
        try:
            node_id = node_id_of_peer(match[2]) if match else None
        except IdentityError:
            node_id = None
        if match is None or node_id is None:
            raise ValueError(f"not an address of this transport: {address[:200]!r}; it ends in /p2p/12D3KooW…")
        if node_id == self._node_id:
            raise ValueError("this is the node's own address: name another node's")
        session = self._up()
        target = session.parse(match[1])
        was_refused = node_id in self._refused
        self._refused.discard(node_id)
        try:
            await session.run(self._connect(session, node_id, target), timeout_s)
        except BaseException:
            if was_refused:
                self._refused.add(node_id)
            raise
        self._remember(node_id, address)
        return node_id

    async def _connect(self, session: "_Session", node_id: str, target: Any) -> None:
        peer = peer_bytes_of(node_id)
        await session.daemon.connect(peer, [target])
        try:
            await session.dht.meet(peer)
        except ClockSkewed:
            await session.daemon.disconnect(peer)
            raise
        session.spawn(session.dht.fill_routing_table(), self._fail_with)

    async def disconnect(self, node_id: str) -> None:
        """Close the connections to a peer, and everything that it asks from now on."""
        self._refused.add(node_id)
        self._known.pop(node_id, None)
        for task in [task for task, asker in self._answering.items() if asker == node_id]:
            task.cancel()
        session = self._session
        if session is not None:
            await session.run(session.daemon.disconnect(peer_bytes_of(node_id)), PING_TIMEOUT_S)

    async def request(
        self, node_id: str, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float
    ) -> bytes:
        """Ask a peer over a stream of its own."""
        session = self._up()
        head = request_head(name, len(payload))
        if len(payload) > MAX_FRAME_BYTES:
            raise RequestRefused(TOO_LARGE, f"a request has at most {MAX_FRAME_BYTES} bytes")
        if node_id in self._refused:
            raise PeerUnreachable(f"{node_id} was disconnected from here")
        self._num_out += 1
        return await session.run(self._ask(session, node_id, head, payload, max_response_bytes), timeout_s)

    async def _ask(
        self, session: "_Session", node_id: str, head: bytes, payload: bytes, max_response_bytes: int
    ) -> bytes:
        try:
            peer = peer_bytes_of(node_id)
        except IdentityError as error:
            raise PeerUnreachable(str(error)) from error
        reader, writer = await session.daemon.open_stream(peer, STREAM_PROTOCOL)
        sending = asyncio.create_task(write_all(writer, head, payload))
        try:
            self._bytes_out += len(head) + len(payload)
            response = await read_response(reader, max_response_bytes)
            self._bytes_in += RESPONSE_HEAD_BYTES + len(response)
            return response
        except (OSError, EOFError) as error:
            await session.daemon.visible_addresses()  # raises TransportDown where p2pd itself has ended
            raise PeerUnreachable(f"{node_id} broke off") from error
        finally:
            sending.cancel()
            sending.add_done_callback(_forget)
            writer.transport.abort()

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Store the node's own record with the nodes nearest to its key."""
        if len(value) > MAX_RECORD_VALUE_BYTES:
            raise ValueError(f"a record has at most {MAX_RECORD_VALUE_BYTES} bytes, not {len(value)}")
        session = self._up()
        return await session.run(session.dht.store(key, value, expires_at), STORE_TIMEOUT_S)

    async def lookup(self, key: bytes, *, timeout_s: float) -> Sequence[Record]:
        """Return what the nodes nearest to a key hold under it, as far as they answer in time."""
        session = self._up()
        return await session.run(session.dht.lookup(key, timeout_s), timeout_s + GRACE_S)

    def _up(self) -> "_Session":
        if self._session is None:
            raise TransportDown("p2pd is being restarted" if self._state == "up" else "the transport is not running")
        return self._session

    def _is_refused(self, node_id: str) -> bool:
        """Whether a peer that calls is to be turned away."""
        if node_id not in self._known and len(self._known) < MIN_KNOWN_PEERS:
            self._stranger.set()
        return node_id in self._refused

    def _remember(self, node_id: str, address: str) -> None:
        self._known[node_id] = address
        self._known.move_to_end(node_id)
        while len(self._known) > MAX_KNOWN_PEERS:
            self._known.popitem(last=False)

    def _fail_with(self, task: "asyncio.Task[Any]") -> None:
        """Make the death of a background task the transport's."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TransportDown):
            self._dispatcher.fail(error)

    # p2pd's life

    async def _open_session(self) -> "_Session":
        from protocol.transport.hivemind_daemon import start_daemon
        from protocol.transport.hivemind_dht import Dht

        daemon = await start_daemon(self._identity, self._settings, self._listen, self._filter)
        try:
            self._addresses = await daemon.visible_addresses()
            if not self._settings.announce:
                self._check_listening()
            dht = await Dht.start(daemon, self._node_id, self._record_validator, self._storage, self._clock)
            await daemon.add_stream_handler(STREAM_PROTOCOL, self._take_stream)
        except BaseException:
            await daemon.end()
            raise
        return _Session(daemon, dht)

    def _check_listening(self) -> None:
        """p2pd says nothing of an address that it could not have, as long as it has another."""
        for wanted in self._listen:
            port = re.sub(r"^/ip./[^/]+", "", wanted)
            if not any(port in address for address in self._addresses):
                raise TransportError(f"p2pd cannot listen on {wanted}: choose another address with --listen")

    async def _end_session(self, session: "_Session") -> None:
        session.end()
        for task in list(self._answering):
            task.cancel()
        await session.daemon.end()

    async def _supervise(self, session: "_Session") -> None:
        """Bring p2pd back when it ends or hangs. Ends by `close`, or with the error when it does not come back."""
        while True:
            await self._watch(session)
            self._session = None
            self._num_restarts += 1
            await self._end_session(session)
            session = await self._restart()
            self._session = session
            for node_id, address in list(self._known.items()):
                session.spawn(self._rejoin(session, node_id, address), self._fail_with)

    async def _watch(self, session: "_Session") -> None:
        """Return when p2pd has ended or hangs; until then, keep addresses and known peers up to date."""
        ended = asyncio.create_task(session.daemon.wait_ended())
        num_missed = 0
        try:
            while num_missed < NUM_MISSED_PINGS:
                self._stranger.clear()
                stranger = asyncio.create_task(self._stranger.wait())
                await asyncio.wait({ended, stranger}, timeout=PING_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
                stranger.cancel()
                if ended.done():
                    return
                try:
                    async with asyncio.timeout(PING_TIMEOUT_S):
                        self._addresses = await session.daemon.visible_addresses()
                        peers = await session.daemon.peers()
                except TransportDown:
                    return
                except TimeoutError:
                    num_missed += 1
                else:
                    num_missed = 0
                    for peer, addresses in peers:
                        self._note_peer(peer, addresses)
                    await asyncio.wait({ended}, timeout=MIN_PING_INTERVAL_S)
        finally:
            ended.cancel()

    def _note_peer(self, peer: bytes, addresses: list[Any]) -> None:
        try:
            node_id = node_id_of_peer_bytes(peer)
        except IdentityError:
            return  # not a node: libp2p connects to relays and others too
        if addresses and node_id not in self._known and node_id not in self._refused:
            self._remember(node_id, f"{addresses[0]}/p2p/{peer_id_of(node_id)}")

    async def _restart(self) -> "_Session":
        for attempt, delay_s in enumerate(RESTART_DELAYS_S, start=1):
            await asyncio.sleep(delay_s)
            try:
                await choose_ports(self._listen)
                return await self._open_session()
            except TransportError:
                if attempt == len(RESTART_DELAYS_S):
                    raise
        raise AssertionError

    async def _rejoin(self, session: "_Session", node_id: str, address: str) -> None:
        """Connect to a peer from before the restart; that it has gone meanwhile is no error."""
        match = _PEER_ADDRESS.match(address)
        assert match is not None
        try:
            async with asyncio.timeout(REJOIN_TIMEOUT_S):
                await self._connect(session, node_id, session.parse(match[1]))
        except (PeerUnreachable, TimeoutError):
            self._known.pop(node_id, None)

    # peers' requests

    async def _take_stream(self, peer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one stream in a task of its own, so that cancelling it is not an error of the stream's server."""
        try:
            asker = node_id_of_peer_bytes(peer)
        except IdentityError:
            self.broken_streams["foreign_peer"] += 1
            writer.transport.abort()
            return
        if self._is_refused(asker):
            self.broken_streams["disconnected_peer"] += 1
        elif self._num_streams.total() >= MAX_STREAMS or self._num_streams[asker] >= MAX_STREAMS_PER_PEER:
            self.broken_streams["too_many_streams"] += 1
        else:
            self._num_streams[asker] += 1
            task = asyncio.create_task(self._answer(asker, reader, writer))
            self._answering[task] = asker
            await asyncio.wait({task})
            del self._answering[task]
            self._num_streams[asker] -= 1
            if not self._num_streams[asker]:
                del self._num_streams[asker]
            self._fail_with(task)
        writer.transport.abort()

    async def _answer(self, asker: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(GRACE_S):
                name, num_bytes = await read_request_head(reader)
            self._num_in += 1
            self._bytes_in += 5 + len(name)
            try:
                response = await self._serve(asker, name, num_bytes, reader)
            except RequestRefused as refusal:
                await self._refuse(refusal, num_bytes, reader, writer)
            else:
                self._bytes_out += RESPONSE_HEAD_BYTES + len(response)
                async with asyncio.timeout(transfer_timeout_s(len(response))):
                    await write_all(writer, response_head(ANSWERED, len(response)), response)
                    await reader.read(1)  # until the asker has it all and closes
        except TimeoutError:
            self.broken_streams["too_slow"] += 1
        except BrokenStream:
            self.broken_streams["bad_framing"] += 1
        except (OSError, EOFError):
            self.broken_streams["broken_off"] += 1

    async def _serve(self, asker: str, name: str, num_bytes: int, reader: asyncio.StreamReader) -> bytes:
        with self._dispatcher.admit(asker, name, num_bytes):
            async with asyncio.timeout(transfer_timeout_s(num_bytes)):
                payload = await reader.readexactly(num_bytes)
            self._bytes_in += num_bytes
            answering = asyncio.create_task(self._dispatcher.answer(asker, name, payload))
            given_up = asyncio.create_task(reader.read(1))
            try:
                await asyncio.wait({answering, given_up}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    raise EOFError("the asker has given up")
                return answering.result()
            finally:
                for task in (answering, given_up):
                    task.cancel()
                    task.add_done_callback(_forget)
                await asyncio.wait({answering, given_up})

    async def _refuse(
        self, refusal: RequestRefused, num_bytes: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Say why, then drop what the asker is still sending: a stream that is reset can lose the refusal."""
        response = refusal_bytes(refusal)
        self._bytes_out += len(response)
        async with asyncio.timeout(GRACE_S):
            await write_all(writer, response, b"")
            num_left = min(num_bytes, MAX_FRAME_BYTES)
            while num_left > 0 and (dropped := await reader.read(CHUNK_BYTES)):
                num_left -= len(dropped)
                self._bytes_in += len(dropped)


class _Session:
    """What ends with one p2pd."""

    def __init__(self, daemon: "Daemon", dht: "Dht") -> None:
        self.daemon, self.dht = daemon, dht
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_ended = False

    def parse(self, address: str) -> Any:
        """Return a multiaddress as p2pd takes it. Raises ValueError."""
        return self.daemon.parse(address)

    async def run(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Await something that uses p2pd. Raises TransportDown when it ends, RequestTimedOut."""
        if self._has_ended:
            work.close()
            raise TransportDown("p2pd has ended")
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                raise RequestTimedOut(f"no response within {timeout_s:g} s")
            if task.cancelled():
                raise TransportDown("p2pd has ended")
            return task.result()
        finally:
            task.cancel()
            task.add_done_callback(_forget)

    def spawn(self, work: Coroutine[Any, Any, None], ended: Any) -> None:
        """Let something run in the background as long as p2pd; `ended` is called with its task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(ended)

    def end(self) -> None:
        """Cancel everything."""
        self._has_ended = True
        for task in list(self._tasks):
            task.cancel()


def _forget(task: "asyncio.Task[Any]") -> None:
    """Take note of the outcome of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
