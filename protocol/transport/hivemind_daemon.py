"""p2pd, the libp2p daemon that hivemind carries: started with the node's own key, watched, spoken to.

Importing this module imports hivemind, which takes seconds: `hivemind` does so when a node starts, and no one
else. hivemind's `P2P` runs the daemon and the unary calls of the DHT; streams and connections are opened here,
so that a call that is cancelled leaves no socket behind. What crosses the DHT's calls is filtered by a `CallFilter`.
"""

import asyncio
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    ControlFailure,
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from protocol.identity import Identity
from protocol.transport.base import PeerUnreachable, TransportDown, TransportError
from protocol.transport.hivemind_settings import HivemindSettings
from protocol.transport.peer_id import base58_decode

__all__ = ["CallFilter", "Daemon", "PendingCalls", "start_daemon"]

# Where the kernel can: p2pd ends with the thread that started it, also where that is killed, and frees its ports.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent has ended")
os.execv(sys.argv[2], sys.argv[2:])
"""
_P2P_CODE = bytes.fromhex("a503")  # of /p2p/ in a multiaddress: 421 as a varint
_IDENTITY_PREFIX = bytes.fromhex("08011240")  # libp2p's protobuf of an Ed25519 private key: type 1, 64 bytes
_END_TIMEOUT_S = 3.0

use_hivemind_log_handler("nowhere")  # messages go where the program's own logging says, and nowhere by default
logging.getLogger("hivemind").addHandler(logging.NullHandler())
logging.getLogger("hivemind").setLevel(logging.WARNING)
logging.addLevelName(logging.WARNING, "WARNING")  # hivemind renames it to WARN, for everybody

StreamHandler = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class CallFilter(Protocol):
    """Looks at every call of the DHT's protocol."""

    async def answer(self, name: str, request: Any, peer: bytes, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return the response to a peer's request; `call` is hivemind's own answer."""

    async def ask(self, name: str, request: Any, peer: bytes, call: Callable[[], Awaitable[Any]]) -> Any:
        """Return the peer's response to our request; `call` sends it."""


class PendingCalls(dict[Any, "asyncio.Future[Any]"]):
    """Unary calls that wait for p2pd, for hivemind's client, which gives an answer to any call that is `in` here.

    A call that was cancelled a moment ago is not: its answer would end the client's one reader, and with it every
    call of the DHT from then on.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


class Daemon(P2P):  # type: ignore[misc]  # hivemind has no types
    """One p2pd process: a `session.Carrier`."""

    what = "p2pd"
    folder: Path
    call_filter: CallFilter
    newest: "Daemon | None" = None  # of its class: how one is reached that hivemind failed to start

    def __init__(self) -> None:
        super().__init__()
        type(self).newest = self

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = P2P._make_process_args(*args, **kwargs)
        if "trustedRelays" in kwargs:
            command.append("-relayDiscovery=false")  # these alone, and at once: discovery begins after three minutes
        if platform.system() == "Linux":
            return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        return command

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, P2PContext], Awaitable[Any]], *args: Any, **kwargs: Any
    ) -> None:
        """Answer unary calls of the DHT through the filter."""

        async def filtered(request: Any, context: P2PContext) -> Any:
            return await self.call_filter.answer(
                name, request, context.remote_id.to_bytes(), lambda: handler(request, context)
            )

        await super().add_protobuf_handler(name, filtered, *args, **kwargs)

    async def call_protobuf_handler(self, peer_id: PeerID, name: str, input: Any, output_protobuf_type: Any) -> Any:
        """Make a unary call of the DHT through the filter."""

        async def call() -> Any:
            response = await self._client.call_unary_handler(peer_id, name, input.SerializeToString())
            if response is None:  # p2pd had an answer from the peer that holds none
                raise P2PHandlerError("an empty answer")
            return output_protobuf_type.FromString(response)

        return await self.call_filter.ask(name, input, peer_id.to_bytes(), call)

    async def add_stream_handler(self, protocol: str, handler: StreamHandler) -> None:
        """Let peers open streams: the handler is given the peer id's bytes, and closes the stream."""

        async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await handler(info.peer_id.to_bytes(), reader, writer)

        await self.add_binary_stream_handler(protocol, handle)

    async def open_stream(self, peer: bytes, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a stream to a peer. Raises PeerUnreachable or TransportDown."""
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=p2pd_pb2.StreamOpenRequest(peer=peer, proto=[protocol])
        )
        reader, writer = await self._open_control()
        try:
            await self._control(reader, writer, request)
        except BaseException:
            writer.transport.abort()
            raise
        return reader, writer

    @staticmethod
    def parse(address: str) -> bytes:
        """Return a multiaddress as p2pd reads it. Raises ValueError for text that is none.

        A peer id within it, of a relay, is a multihash to p2pd, where hivemind writes a CID.
        """
        first, *rest = re.split(r"/p2p/([^/]*)", address)
        try:
            encoded: bytes = Multiaddr(first).to_bytes()
            for peer, after in zip(rest[::2], rest[1::2], strict=True):
                multihash = base58_decode(peer)
                encoded += _P2P_CODE + bytes([len(multihash)]) + multihash
                encoded += Multiaddr(after).to_bytes() if after else b""
        except Exception as error:  # hivemind's own parser has a dozen kinds of errors
            raise ValueError(f"not a multiaddress: {address[:200]!r}") from error
        return encoded

    async def connect(self, peer: bytes, addresses: list[bytes]) -> None:
        """Connect to a peer, at addresses that `parse` gave. Raises PeerUnreachable or TransportDown."""
        connect = p2pd_pb2.ConnectRequest(peer=peer, addrs=addresses)
        await self._call(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))

    async def disconnect(self, peer: bytes) -> None:
        """Close every connection to a peer. Raises TransportDown."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.DISCONNECT, disconnect=p2pd_pb2.DisconnectRequest(peer=peer))
        await self._call(request)

    async def visible_addresses(self) -> tuple[str, ...]:
        """Ask p2pd, which also tells whether it still answers, under which addresses it can be reached."""
        response = await self._call(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return tuple(f"{Multiaddr(address)}/p2p/{self.peer_id}" for address in response.identify.addrs)

    async def peers(self) -> list[tuple[bytes, list[Multiaddr]]]:
        """Return the connected peers, with the addresses at which they were met."""
        response = await self._call(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        return [(peer.id, [Multiaddr(address) for address in peer.addrs]) for peer in response.peers]

    async def wait_ended(self) -> None:
        """Wait until the process has ended, whoever ended it."""
        await self._child.wait()

    def is_stopped(self) -> bool:
        """Whether the kernel says that the process is stopped: it will not answer."""
        try:
            return bool(psutil.Process(self._child.pid).status() == psutil.STATUS_STOPPED)
        except psutil.Error:
            return False

    async def end(self, *, at_once: bool = False) -> None:
        """End the process, whatever state it is in, and remove what it left; `at_once` where it cannot end itself."""
        self._terminate()
        if self._child is not None:
            if at_once and self._child.returncode is None:
                self._child.kill()
            try:
                async with asyncio.timeout(_END_TIMEOUT_S):
                    await self._child.wait()
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
            self._child._transport.close()  # its pipe, which asyncio would close when the loop is gone
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _call(self, request: Any) -> Any:
        reader, writer = await self._open_control()
        try:
            return await self._control(reader, writer, request)
        finally:
            writer.transport.abort()

    async def _open_control(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.open_unix_connection(self.daemon_listen_maddr["unix"])
        except OSError as error:
            raise TransportDown(f"p2pd does not answer: {error.strerror}") from error

    async def _control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
        response = p2pd_pb2.Response()
        try:
            await write_pbmsg(writer, request)
            await read_pbmsg_safe(reader, response)
        except (OSError, EOFError) as error:
            raise TransportDown("p2pd ended while it was asked") from error
        if response.type == p2pd_pb2.Response.ERROR:
            raise PeerUnreachable(" ".join(response.error.msg.split())[:300])
        return response


async def start_daemon(
    identity: Identity, settings: HivemindSettings, listen: tuple[str, ...], call_filter: CallFilter
) -> Daemon:
    """Start p2pd. Raises TransportError with the fix where it does not start."""
    folder = Path(tempfile.mkdtemp(prefix="swarm-p2pd-"))  # mode 0700: it holds the key for a moment, and the sockets
    key = folder / "identity"
    key.touch(0o600)
    key.write_bytes(_IDENTITY_PREFIX + identity.seed + identity.public_key)
    # A class of its own, since hivemind keeps the folder of the sockets in the class.
    kind: type[Daemon] = type(
        "Daemon", (Daemon,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/", "folder": folder, "call_filter": call_filter}
    )
    try:
        daemon: Daemon = await kind.create(
            host_maddrs=listen,
            announce_maddrs=settings.announce or None,
            identity_path=str(key),
            check_if_identity_free=False,  # it knows RSA keys alone, and starts a second daemon for it
            use_relay=settings.relay,
            use_auto_relay=settings.auto_relay,
            trusted_relays=settings.trusted_relays or None,
            nat_port_map=settings.nat_port_map,
            auto_nat=settings.auto_nat,
            force_reachability=settings.force_reachability,
            startup_timeout=settings.startup_timeout_s,
        )
    except (P2PDaemonError, ControlFailure, OSError, EOFError) as error:
        await _end_newest(kind, folder)
        reason = " ".join(str(error).split())[:300]
        raise TransportError(
            f"p2pd does not start: {reason}; check --listen, and `pip install hivemind` anew"
        ) from error
    except BaseException:
        await _end_newest(kind, folder)
        raise
    key.unlink()
    daemon._client.control._pending_calls = PendingCalls(daemon._client.control._pending_calls)
    return daemon


async def _end_newest(kind: type[Daemon], folder: Path) -> None:
    if kind.newest is not None:
        await kind.newest.end()
    shutil.rmtree(folder, ignore_errors=True)
