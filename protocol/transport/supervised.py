"""A transport whose bytes are carried by what may die and is brought back: what `hivemind` and `libp2p` share.

    supervisor     keeps the carrier running             session   what lives and ends with one carrier
    peer_streams   one long-lived stream for each peer that is asked; its framing: `mux`, `framing`
    ports          the ports, which stay the same        here      the contract

The carrier's key is the node's key, so that libp2p's handshake proves the node id. When a carrier has ended or hangs,
everything that used it fails with TransportDown, and a new one takes its key, its ports, the records that this node
holds for others, and its peers. Which carrier that is, and its DHT, is the subclass's.
"""

import asyncio
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

from protocol.clock import Clock
from protocol.errors import IdentityError
from protocol.identity import Identity
from protocol.transport.base import (
    MAX_FRAME_BYTES,
    MAX_RECORD_VALUE_BYTES,
    Handler,
    PeerUnreachable,
    Record,
    RecordValidator,
    RequestRefused,
    Traffic,
    Transport,
    TransportDown,
)
from protocol.transport.dispatch import TOO_LARGE, Dispatcher, check_name
from protocol.transport.gate import Gate
from protocol.transport.mux import Tally
from protocol.transport.peer_id import node_id_of_peer_bytes, peer_bytes_of
from protocol.transport.peer_streams import Stream
from protocol.transport.ports import choose_ports
from protocol.transport.session import Carrier, Session
from protocol.transport.supervisor import PEER_ADDRESS, PING_TIMEOUT_S, Supervisor

__all__ = ["STREAM_PROTOCOL", "SupervisedTransport", "open_stream"]

STREAM_PROTOCOL = "/swarm-node/requests/2"
OPEN_TIMEOUT_S = 10.0  # for a stream on a connection that there is, or a connection and a stream
STORE_TIMEOUT_S = 20.0
LOOKUP_GRACE_S = 5.0
CANCEL_AGAIN_S = 5.0  # longer than a carrier takes to end
_FORM = "ends in /p2p/12D3KooW…"


class SupervisedTransport(Transport):
    """One node's transport over carriers that come and go."""

    what: str  # the carrier's name in messages

    def __init__(
        self,
        identity: Identity,
        validator: RecordValidator,
        listen: tuple[str, ...],
        clock: Clock,
        *,
        max_requests: int,
        max_requests_per_asker: int,
    ) -> None:
        super().__init__()
        self._identity, self._validator, self._clock = identity, validator, clock
        self._node_id = identity.node_id
        self._dispatcher = Dispatcher(max_requests=max_requests, max_requests_per_asker=max_requests_per_asker)
        self._state = "new"
        self._gate = Gate(identity.node_id, PEER_ADDRESS, _FORM)
        self._tally = Tally()
        self._listen = listen  # from `start` on with the ports that were chosen
        self._supervisor: Supervisor | None = None  # before `start`
        self._supervising: asyncio.Task[None] | None = None

    @abstractmethod
    async def _prepare(self) -> None:
        """Do what is done once, before the first carrier. Raises TransportError."""

    @abstractmethod
    async def _open_session(self) -> Session:
        """Start a carrier and what uses it. Raises TransportError."""

    @property
    def node_id(self) -> str:
        """The node's own id."""
        return self._node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the node can be reached, as far as it is known by now; a relay's or router's address may come later."""
        return self._supervisor.addresses if self._supervisor is not None else ()

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        tally, supervisor = self._tally, self._supervisor
        return Traffic(
            tally.bytes_in,
            tally.bytes_out,
            tally.num_requests_in,
            tally.num_requests_out,
            supervisor.num_restarts if supervisor else 0,
        )

    @property
    def broken_streams(self) -> Counter[str]:
        """Streams that ended by what a peer did, by reason."""
        return self._tally.broken

    def handle(self, name: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer requests of this name."""
        if self._state != "new":
            raise RuntimeError("handlers are named before the transport starts")
        self._dispatcher.handle(name, handler, max_request_bytes)

    async def start(self) -> None:
        """Load what carries the bytes, start it, listen."""
        if self._state != "new":
            raise RuntimeError("a transport starts once")
        self._listen = await choose_ports(self._listen)
        await self._prepare()
        supervisor = Supervisor(self._open_session, self._listen, self._gate)
        self._supervisor = supervisor
        await supervisor.start()
        self._state = "up"
        self._supervising = asyncio.create_task(supervisor.run(), name=f"{self.what} supervisor")
        self._supervising.add_done_callback(self._fail_with)

    async def close(self) -> None:
        """End the carrier, after everything that uses it."""
        was_up, self._state = self._state == "up", "closed"
        if not was_up:
            return
        assert self._supervisor is not None
        assert self._supervising is not None
        while not self._supervising.done():  # again, where hivemind loses a cancellation (Python 3.11's wait_for does)
            self._supervising.cancel()
            await asyncio.wait({self._supervising}, timeout=CANCEL_AGAIN_S)
        await self._supervisor.end()

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug, or why the carrier does not come back."""
        await self._dispatcher.wait_failed()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Connect to an address, and get to know the peer's DHT."""
        node_id, match = self._gate.parse(address)
        supervisor, session = self._up()
        target = session.parse(match["target"])
        with self._gate.opened(node_id):
            await session.run(session.connect(node_id, target), timeout_s)
        supervisor.remember(node_id, address)
        return node_id

    async def disconnect(self, node_id: str) -> None:
        """Close the streams and connections with a peer, and everything that it asks from now on."""
        self._gate.refuse(node_id)
        supervisor = self._supervisor
        if supervisor is None:
            return
        supervisor.forget(node_id)
        session = supervisor.session
        if session is not None:
            session.streams.end_peer(node_id)
            await session.run(session.daemon.disconnect(peer_bytes_of(node_id)), PING_TIMEOUT_S)

    async def request(
        self, node_id: str, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float
    ) -> bytes:
        """Ask a peer on the stream to it, which is opened where there is none."""
        _, session = self._up()
        check_name(name)
        if len(payload) > MAX_FRAME_BYTES:
            raise RequestRefused(TOO_LARGE, f"a request has at most {MAX_FRAME_BYTES} bytes")
        self._gate.check(node_id)
        self._tally.num_requests_out += 1
        return await session.run(self._ask(session, node_id, name, payload, max_response_bytes), timeout_s)

    async def _ask(self, session: Session, node_id: str, name: str, payload: bytes, max_response_bytes: int) -> bytes:
        try:
            return await session.streams.request(node_id, name, payload, max_response_bytes)
        except PeerUnreachable:
            await session.daemon.visible_addresses()  # raises TransportDown where the carrier itself has ended
            raise

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Store the node's own record with the nodes nearest to its key."""
        if len(value) > MAX_RECORD_VALUE_BYTES:
            raise ValueError(f"a record has at most {MAX_RECORD_VALUE_BYTES} bytes, not {len(value)}")
        _, session = self._up()
        return await session.run(session.dht.store(key, value, expires_at), STORE_TIMEOUT_S)

    async def lookup(self, key: bytes, *, timeout_s: float) -> Sequence[Record]:
        """Return what the nodes nearest to a key hold under it, as far as they answer in time."""
        _, session = self._up()
        return await session.run(session.dht.lookup(key, timeout_s), timeout_s + LOOKUP_GRACE_S)

    @property
    def _session(self) -> Session | None:
        return self._supervisor.session if self._supervisor is not None else None

    def _up(self) -> tuple[Supervisor, Session]:
        supervisor, session = self._supervisor, self._session
        if supervisor is None or session is None:
            is_up = self._state == "up"
            raise TransportDown(f"{self.what} is being restarted" if is_up else "the transport is not running")
        return supervisor, session

    def _is_refused(self, node_id: str) -> bool:
        """Whether a peer that calls is to be turned away."""
        if self._supervisor is not None:
            self._supervisor.note_caller(node_id)
        return self._gate.refuses(node_id)

    def _fail_with(self, task: "asyncio.Task[Any]") -> None:
        """Make the death of a background task the transport's."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TransportDown):
            self._dispatcher.fail(error)

    async def _take_stream(
        self, session: Session, peer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer on a stream that a peer has opened."""
        try:
            asker = node_id_of_peer_bytes(peer)
        except IdentityError:
            self._tally.broken["foreign_peer"] += 1
            writer.transport.abort()
            return
        if self._is_refused(asker):
            self._tally.broken["disconnected_peer"] += 1
            writer.transport.abort()
            return
        await session.streams.take(asker, reader, writer)


async def open_stream(carrier: Carrier, node_id: str) -> Stream:
    """Open a stream to ask a peer on. Raises PeerUnreachable, TransportDown."""
    try:
        peer = peer_bytes_of(node_id)
    except IdentityError as error:
        raise PeerUnreachable(str(error)) from error
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            return await carrier.open_stream(peer, STREAM_PROTOCOL)
    except TimeoutError:
        await carrier.disconnect(peer)  # a connection that has fallen silent: the next request makes another
        raise PeerUnreachable("no stream could be opened in time") from None
