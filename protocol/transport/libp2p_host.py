"""py-libp2p's host on a loop of its own, and what the node asks of it from asyncio: a `session.Carrier`.

Importing this module imports libp2p, which takes a second: `libp2p` does so when a node starts, and no one else.

    libp2p_thread   the loop                          libp2p_pubsub   the topic
    libp2p_reachability, libp2p_relay, libp2p_circuits   whether others can connect; relaying; being relayed
    here            the host: what it speaks, whom it is connected to, streams between the two loops

A stream of libp2p reaches asyncio through a pair of sockets within the process: what one side does not read, the other
cannot write, with the kernel's buffer and the stream's window between them.

What py-libp2p offers beside Noise and TLS would let anybody pass for anybody (`/plaintext/2.0.0`, on by default): it is
left out. What it does by itself is switched off: it dials every address that strangers tell of until it has a hundred
connections, and does not dial one for a minute after it has failed once. What escapes a stream's handler ends the host
there; here it ends the stream.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import IOException
from libp2p.network.config import ConnectionConfig
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL_ID
from libp2p.security.tls.transport import PROTOCOL_ID as TLS_PROTOCOL_ID
from libp2p.security.tls.transport import TLSTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL_ID
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from protocol.identity import Identity
from protocol.transport.base import NotConnected, PeerUnreachable, TransportError
from protocol.transport.libp2p_circuits import CIRCUIT, Circuits
from protocol.transport.libp2p_pubsub import AskJudge, Topic
from protocol.transport.libp2p_reachability import Reachability
from protocol.transport.libp2p_relay import STREAM_ERRORS, Relay
from protocol.transport.libp2p_settings import Libp2pSettings
from protocol.transport.libp2p_thread import TrioThread
from protocol.transport.libp2p_wire import Connection, Noise
from protocol.transport.own_addresses import dialable
from protocol.transport.peer_id import base58_encode

__all__ = ["Host"]

MAX_CONNECTIONS = 300
MAX_STREAMS = 1024  # between the two loops
CHUNK_BYTES = 65_536
CLOSE_S = 5.0  # for the other side to close its half of a stream
END_S = 5.0
FOLLOW_S = 0.5  # until what is found of this node's reachability has its consequences
MAX_ADDRESSES = 6  # of this machine's that others are told

logging.getLogger("libp2p").setLevel(logging.CRITICAL)  # what peers do is counted, and no message of this program's
logging.getLogger("libp2p").addHandler(logging.NullHandler())

TakeStream = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Host:
    """One life of a node's libp2p host."""

    what = "py-libp2p"

    def __init__(self, identity: Identity, settings: Libp2pSettings, listen: tuple[str, ...], protocol: str) -> None:
        self._settings, self._listen, self._protocol = settings, listen, protocol
        private = Ed25519PrivateKey.from_bytes(identity.seed)
        self._keys = KeyPair(private, private.get_public_key())
        self._thread = TrioThread(self.what)
        self._take: TakeStream | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_streams = 0
        self._told: dict[bytes, tuple[str, ...]] = {}  # addresses that connected peers have told of themselves
        self.broken = Counter[str]()  # streams that ended by what a peer did, before the node had them
        self.topic: Topic
        self.reachability: Reachability
        self.relay: Relay
        self.circuits: Circuits

    # on asyncio

    async def start(self, take: TakeStream, ask_judge: AskJudge, topic: str) -> None:
        """Listen; peers' streams go to `take`, messages of the topic to `ask_judge`. Raises TransportError."""
        self._take = take

        async def main(ready: Callable[[], None]) -> None:
            await self._run(ready, ask_judge, topic)

        try:
            async with asyncio.timeout(self._settings.startup_timeout_s):
                await self._thread.start(main)
        except TimeoutError:
            await self.end(at_once=True)
            raise TransportError("py-libp2p does not start in time: the machine may be too busy") from None

    @property
    def ask(self) -> Callable[..., Awaitable[Any]]:
        """From trio: run a plain function on the node's loop."""
        return self._thread.ask

    def parse(self, address: str) -> Multiaddr:
        """Return a multiaddress as libp2p reads it. Raises ValueError for text that is none."""
        try:
            return Multiaddr(address)
        except Exception as error:  # the parser has a dozen kinds of errors
            raise ValueError(f"not a multiaddress: {address[:200]!r}") from error

    async def connect(self, peer: bytes, addresses: list[Multiaddr]) -> None:
        """Connect to a peer at one of these addresses, unless it is connected."""
        await self._thread.call(self._connect, ID(peer), addresses)

    async def disconnect(self, peer: bytes) -> None:
        """Close every connection to a peer."""
        self._told.pop(peer, None)
        await self._thread.call(self._disconnect, ID(peer))

    async def open_stream(self, peer: bytes, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a connected peer."""
        near, far = socket.socketpair()
        try:
            await self._thread.call(self._open_stream, ID(peer), protocol, far)
            return await asyncio.open_unix_connection(sock=near)
        except BaseException:
            near.close()
            raise

    async def visible_addresses(self) -> tuple[str, ...]:
        """Return where others can reach this node."""
        own = base58_encode(self._keys_id())
        return tuple(f"{address}/p2p/{own}" for address in await self._thread.call(self._addresses))

    async def peers(self) -> list[tuple[bytes, list[Any]]]:
        """Return the connected peers, with the addresses that they have told."""
        connected: list[bytes] = await self._thread.call(self._connected)
        self._told = {peer: told for peer, told in self._told.items() if peer in connected}
        return [(peer, list(self._told.get(peer, ()))) for peer in connected]

    def note_addresses(self, peer: bytes, addresses: tuple[str, ...]) -> None:
        """Remember where a connected peer says it can be reached."""
        self._told[peer] = addresses

    async def broadcast(self, message: bytes) -> None:
        """Publish a message."""
        await self._thread.call(self.topic.send, message)

    async def topic_status(self) -> dict[str, Any]:
        """Return the state of the mesh."""
        return await self._thread.call(self._topic_status)

    async def wait_ended(self) -> None:
        """Wait until the loop has ended."""
        await asyncio.wait({self._thread.ended})

    def is_stopped(self) -> bool:
        """A thread of this process does not stop alone."""
        return False

    async def end(self, *, at_once: bool = False) -> None:
        """End the host; where it does not listen its thread is left behind, which ends with the process."""
        for task in list(self._tasks):
            task.cancel()
        try:
            async with asyncio.timeout(0.1 if at_once else END_S):
                await self._thread.end()
        except TimeoutError:
            return

    def _on_stream(self, peer: bytes, near: socket.socket) -> None:
        if self._take is None or self._thread.ended.done():
            near.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(self._take, peer, near))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _serve(take: TakeStream, peer: bytes, near: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=near)
        await take(peer, reader, writer)

    # on trio

    async def _run(self, ready: Callable[[], None], ask_judge: AskJudge, topic: str) -> None:
        self._host = host = self._new_host()
        self._network = network = host.get_network()
        network.set_stream_handler(self._guarded)
        network.auto_connector.maybe_connect = _dial_nobody
        host.set_stream_handler(self._protocol, self._take_stream)
        self.topic = Topic(host, topic, ask_judge)
        self._open_circuits(host)
        async with host.run([Multiaddr(address) for address in self._listen]):
            self._check_listening()
            async with background_trio_service(self.topic), background_trio_service(self.topic.router):
                await self.topic.wait_until_ready()
                await self.topic.join()
                for run in (self.reachability.run, self.circuits.run, self._follow_reachability):
                    self._thread.spawn(run)
                ready()
                await trio.sleep_forever()

    def _open_circuits(self, host: Any) -> None:
        settings = self._settings
        self.reachability = Reachability(
            host, self._direct_addresses, serves=settings.auto_nat, state=settings.force_reachability
        )
        self.relay = Relay(host)
        self.circuits = Circuits(host, self._dial, map(Multiaddr, settings.trusted_relays))

    async def _follow_reachability(self) -> None:
        """Relay others where this node can be reached, and be relayed where it cannot. Ends by cancellation."""
        while True:
            is_public = self.reachability.state == "public"
            self.relay.is_open = self._settings.relay and is_public
            self.circuits.wanted = self._settings.auto_relay and not is_public
            await trio.sleep(FOLLOW_S)

    def _new_host(self) -> Any:
        return new_host(
            key_pair=self._keys,
            sec_opt={
                NOISE_PROTOCOL_ID: Noise(self._keys, noise_privkey=create_new_key_pair().private_key),
                TLS_PROTOCOL_ID: TLSTransport(self._keys),
            },
            muxer_opt={YAMUX_PROTOCOL_ID: Connection},  # without mplex, which has no windows
            listen_addrs=[Multiaddr(address) for address in self._listen],
            connection_config=ConnectionConfig(
                max_connections=MAX_CONNECTIONS, high_watermark=MAX_CONNECTIONS, min_connections=0, low_watermark=0
            ),
            addrs_factory=lambda _: [Multiaddr(address) for address in self._direct_addresses()],
            disable_identify_address_discovery=True,
        )

    def _keys_id(self) -> bytes:
        return bytes(ID.from_pubkey(self._keys.public_key).to_bytes())

    def _check_listening(self) -> None:
        """py-libp2p says nothing of an address that it could not have."""
        for wanted in self._listen:
            if wanted not in self._network.listeners:
                raise TransportError(f"py-libp2p cannot listen on {wanted}: choose another address with --listen")

    async def _addresses(self) -> list[str]:
        return self._expanded()

    def _expanded(self) -> list[str]:
        """Where others may dial: directly, unless that is known to fail, and through relays."""
        relayed = self.circuits.addresses
        if relayed and self.reachability.state == "private":
            return relayed
        return self._direct_addresses() + relayed

    def _direct_addresses(self) -> list[str]:
        """Return what the user says, or the listening addresses with this machine's own for 0.0.0.0."""
        return list(self._settings.announce) or dialable(self._listen)[:MAX_ADDRESSES]

    async def _connected(self) -> list[bytes]:
        return [peer.to_bytes() for peer in self._host.get_connected_peers() if self._network.get_connections(peer)]

    def _is_connected(self, peer: ID) -> bool:
        return any(not connection.is_closed for connection in self._network.get_connections(peer))

    async def _topic_status(self) -> dict[str, Any]:
        return self.topic.status()

    async def _connect(self, peer: ID, addresses: list[Multiaddr]) -> None:
        if self._is_connected(peer):
            return
        why: Exception | None = None
        for address in addresses:
            reach = self.circuits.dial if str(address).endswith(CIRCUIT) else self._dial
            try:
                await reach(peer, address)
            except (*STREAM_ERRORS, PeerUnreachable) as error:
                why = error
            else:
                return
        raise PeerUnreachable(_reason(why) if why is not None else "no address is known")

    async def _dial(self, peer: ID, address: Multiaddr) -> None:
        """Connect to a peer directly."""
        await self._network.dial_addr(address, peer)
        dialled = {one: where for one, where in self.circuits.dialled.items() if self._network.get_connections(one)}
        self.circuits.dialled = {**dialled, peer: address}

    async def _disconnect(self, peer: ID) -> None:
        with trio.move_on_after(CLOSE_S):
            await self._network.close_peer(peer)

    async def _open_stream(self, peer: ID, protocol: str, far: socket.socket) -> None:
        try:
            if not self._is_connected(peer):
                raise NotConnected("not connected")
            try:
                stream = await self._host.new_stream(peer, [protocol])
            except (BaseLibp2pError, OSError, trio.TooSlowError) as error:
                raise PeerUnreachable(_reason(error)) from error
        except BaseException:
            far.close()
            raise
        self._thread.spawn(self._pump, stream, far)

    async def _guarded(self, stream: Any) -> None:
        """Let whatever a peer's stream causes end that stream alone."""
        try:
            await self._host._swarm_stream_handler(stream)
        except Exception as error:  # the boundary: counted by its kind
            self.broken[type(error).__name__] += 1
            await _reset(stream)

    async def _take_stream(self, stream: Any) -> None:
        """Hand a stream that a peer has opened to the node, and carry its bytes until it ends."""
        if self._num_streams >= MAX_STREAMS:
            self.broken["too_many_streams"] += 1
            await _reset(stream)
            return
        near, far = socket.socketpair()
        self._thread.tell(self._on_stream, stream.muxed_conn.peer_id.to_bytes(), near)
        await self._pump(stream, far)

    async def _pump(self, stream: Any, far: socket.socket) -> None:
        """Carry bytes between a stream of libp2p and the node's end, until both have ended or one breaks."""
        self._num_streams += 1
        end = trio.SocketStream(trio.socket.from_stdlib_socket(far))
        try:
            async with end, trio.open_nursery() as nursery:
                nursery.start_soon(self._carry_in, stream, end)
                await self._carry_out(stream, end)
                nursery.cancel_scope.deadline = trio.current_time() + CLOSE_S
        finally:
            self._num_streams -= 1
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S):
                await _reset(stream)

    @staticmethod
    async def _carry_in(stream: Any, end: trio.SocketStream) -> None:
        """From the peer to the node."""
        try:
            while data := await stream.read(CHUNK_BYTES):
                await end.send_all(data)
        except (IOException, BaseLibp2pError, ValueError):
            pass  # ended or broken: the node hears of it as an end
        except trio.BrokenResourceError:
            return  # the node does not read any more
        try:
            await end.send_eof()
        except (trio.BrokenResourceError, OSError):
            return

    @staticmethod
    async def _carry_out(stream: Any, end: trio.SocketStream) -> None:
        """From the node to the peer. The node ends a stream as a whole: what it leaves unread nobody will read."""
        try:
            while data := await end.receive_some(CHUNK_BYTES):
                await stream.write(data)
            await stream.close_write()
        except (IOException, BaseLibp2pError, ValueError, trio.BrokenResourceError):
            return


async def _dial_nobody() -> None:
    """What stands for upstream's dialling of whoever strangers have told of: no number of connections stops it."""


async def _reset(stream: Any) -> None:
    try:
        await stream.reset()
    except (BaseLibp2pError, OSError):
        return


def _reason(error: BaseException) -> str:
    """Say why a dial or a stream has failed: the innermost cause has the words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
