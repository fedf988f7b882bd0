"""hivemind's libp2p daemon and DHT in the node's own event loop: TCP and QUIC, relays, NAT traversal.

    hivemind_settings     what a user sets, ports
    hivemind_supervisor   keeps p2pd running          hivemind_session   what lives and ends with one p2pd
    hivemind_daemon       p2pd itself                 hivemind_dht, hivemind_records   the DHT, and what it believes
    peer_streams          one long-lived stream for each peer that is asked; its framing: `mux`, `framing`
    here                  the contract

Requests travel on streams of the libp2p protocol `STREAM_PROTOCOL`. The daemon's key is the node's key, so that
libp2p's handshake proves the node id. Of DHT calls there are hivemind's `DHTProtocol` rpc_ping, rpc_store and
rpc_find, over its unary calls.

When p2pd has ended or hangs, everything that used it fails with TransportDown, and a new one takes its key, its
ports, the records that this node holds for others, and its peers.

hivemind is imported by `start`, in a thread, and as little of it as a node needs (`hivemind_import`): no other
transport may load it.
"""

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from protocol.clock import Clock, system_clock
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
    TransportError,
)
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER, TOO_LARGE, Dispatcher, check_name
from protocol.transport.gate import Gate
from protocol.transport.hivemind_import import import_dht
from protocol.transport.hivemind_session import Session
from protocol.transport.hivemind_settings import HivemindSettings, choose_ports
from protocol.transport.hivemind_supervisor import PEER_ADDRESS, PING_TIMEOUT_S, Supervisor
from protocol.transport.mux import Tally
from protocol.transport.peer_id import node_id_of_peer_bytes, peer_bytes_of
from protocol.transport.peer_streams import PeerStreams

if TYPE_CHECKING:
    from protocol.transport.hivemind_daemon import Daemon

__all__ = ["STREAM_PROTOCOL", "HivemindSettings", "HivemindTransport"]

STREAM_PROTOCOL = "/swarm-node/requests/2"
OPEN_TIMEOUT_S = 10.0  # for a stream on a connection that there is, or a connection and a stream
STORE_TIMEOUT_S = 20.0
LOOKUP_GRACE_S = 5.0
CANCEL_AGAIN_S = 5.0  # longer than p2pd takes to end
_FORM = "ends in /p2p/12D3KooW…"


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
        self._gate = Gate(identity.node_id, PEER_ADDRESS, _FORM)
        self._tally = Tally()
        self._listen: tuple[str, ...] = ()
        self._supervisor: Supervisor | None = None  # before `start`
        self._supervising: asyncio.Task[None] | None = None

    @property
    def node_id(self) -> str:
        """The node's own id."""
        return self._node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where p2pd can be reached, as far as it knows by now; a relay's or router's address may come later."""
        return self._supervisor.addresses if self._supervisor is not None else ()

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        tally, supervisor = self._tally, self._supervisor
        return Traffic(
            tally.bytes_in + (self._filter.bytes_in if supervisor else 0),
            tally.bytes_out + (self._filter.bytes_out if supervisor else 0),
            tally.num_requests_in,
            tally.num_requests_out,
            supervisor.num_restarts if supervisor else 0,
        )

    @property
    def broken_streams(self) -> Counter[str]:
        """Streams that ended by what a peer did, by reason."""
        return self._tally.broken

    @property
    def dht_refusals(self) -> Counter[str]:
        """What peers said to the DHT that was not believed, by reason."""
        return self._filter.refusals if self._supervisor is not None else Counter()

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
        await asyncio.to_thread(import_dht)
        from protocol.transport.hivemind_dht import DhtFilter
        from protocol.transport.hivemind_records import BoundedStorage, OwnedRecordValidator

        self._record_validator = OwnedRecordValidator(self._validator, self._clock)
        self._storage = BoundedStorage(self._clock)
        self._filter = DhtFilter(self._record_validator, self._storage, self._is_refused)
        supervisor = Supervisor(self._open_session, self._listen, self._gate)
        self._supervisor = supervisor
        await supervisor.start()
        self._state = "up"
        self._supervising = asyncio.create_task(supervisor.run(), name="p2pd supervisor")
        self._supervising.add_done_callback(self._fail_with)

    async def close(self) -> None:
        """End p2pd, after everything that uses it."""
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
        """Return never; raise a handler's bug, or why p2pd does not come back."""
        await self._dispatcher.wait_failed()

    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Connect p2pd to an address, and get to know the peer's DHT."""
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
            await session.daemon.visible_addresses()  # raises TransportDown where p2pd itself has ended
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
            raise TransportDown("p2pd is being restarted" if self._state == "up" else "the transport is not running")
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

    async def _open_session(self) -> Session:
        from protocol.transport.hivemind_daemon import start_daemon
        from protocol.transport.hivemind_dht import Dht

        daemon = await start_daemon(self._identity, self._settings, self._listen, self._filter)
        try:
            if not self._settings.announce:
                self._check_listening(await daemon.visible_addresses())
            dht = await Dht.start(daemon, self._node_id, self._record_validator, self._storage, self._clock)
        except BaseException:
            await daemon.end()
            raise
        streams = PeerStreams(self._dispatcher, self._tally, lambda node_id: _open_stream(daemon, node_id))
        session = Session(daemon, dht, streams, self._fail_with)
        try:
            await daemon.add_stream_handler(
                STREAM_PROTOCOL, lambda peer, reader, writer: self._take_stream(session, peer, reader, writer)
            )
        except BaseException:
            await session.end()
            raise
        return session

    def _check_listening(self, addresses: tuple[str, ...]) -> None:
        """p2pd says nothing of an address that it could not have, as long as it has another."""
        for wanted in self._listen:
            port = re.sub(r"^/ip./[^/]+", "", wanted)
            if not any(port in address for address in addresses):
                raise TransportError(f"p2pd cannot listen on {wanted}: choose another address with --listen")

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


async def _open_stream(daemon: "Daemon", node_id: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a stream to ask a peer on. Raises PeerUnreachable, TransportDown."""
    try:
        peer = peer_bytes_of(node_id)
    except IdentityError as error:
        raise PeerUnreachable(str(error)) from error
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            return await daemon.open_stream(peer, STREAM_PROTOCOL)
    except TimeoutError:
        await daemon.disconnect(peer)  # a connection that has fallen silent: the next request makes another
        raise PeerUnreachable("no stream could be opened in time") from None
