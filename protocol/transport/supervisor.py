"""Keeps running what carries the bytes: watched, replaced when it ends or hangs, connected again to its peers.

p2pd has ended when its process has, py-libp2p when its loop has. It hangs when it does not answer twice in a row, or
once where the kernel says that it is stopped. What opens a new one is the transport's.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from protocol.errors import IdentityError
from protocol.transport.base import PeerUnreachable, TransportDown, TransportError
from protocol.transport.gate import Gate
from protocol.transport.peer_id import node_id_of_peer_bytes, peer_id_of
from protocol.transport.ports import choose_ports
from protocol.transport.session import Session

__all__ = ["PEER_ADDRESS", "Supervisor"]

PING_INTERVAL_S = 2.0  # at which the carrier is asked for its addresses
MIN_PING_INTERVAL_S = 0.2  # where strangers call
PING_TIMEOUT_S = 3.0
NUM_MISSED_PINGS = 2  # after which it hangs
RESTART_DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # before each attempt; then the transport has failed
REJOIN_TIMEOUT_S = 10.0
MAX_KNOWN_PEERS = 64  # that are connected to again after a restart
MIN_KNOWN_PEERS = 8  # with fewer, a stranger who calls is noted at once
PEER_ADDRESS = re.compile(r"(?P<target>/.+)/p2p/(?P<peer>[1-9A-HJ-NP-Za-km-z]{1,128})\Z")


class Supervisor:
    """The lives of one node's carrier."""

    def __init__(self, open_session: Callable[[], Awaitable[Session]], listen: tuple[str, ...], gate: Gate) -> None:
        self._open_session, self._listen, self._gate = open_session, listen, gate
        self.session: Session | None = None  # None while it is down
        self.addresses: tuple[str, ...] = ()
        self.num_restarts = 0
        self._known: OrderedDict[str, str] = OrderedDict()  # addresses by node id, of connected peers
        self._stranger = asyncio.Event()  # somebody called whose address is not known

    async def start(self) -> None:
        """Start the first one. Raises TransportError."""
        self.session = await self._open_session()
        self.addresses = await self.session.daemon.visible_addresses()

    async def end(self) -> None:
        """End it, once `run` has ended."""
        session, self.session = self.session, None
        if session is not None:
            await session.end()

    def remember(self, node_id: str, address: str) -> None:
        """Connect to a peer again after a restart."""
        self._known[node_id] = address
        self._known.move_to_end(node_id)
        while len(self._known) > MAX_KNOWN_PEERS:
            self._known.popitem(last=False)

    def address_of(self, node_id: str) -> str | None:
        """Return where a peer was reached, or said that it can be, if it is one to connect to again."""
        return self._known.get(node_id)

    def forget(self, node_id: str) -> None:
        """Do not connect to a peer again."""
        self._known.pop(node_id, None)

    def note_caller(self, node_id: str) -> None:
        """A peer calls: where few are known, its address is asked for soon."""
        if node_id not in self._known and len(self._known) < MIN_KNOWN_PEERS:
            self._stranger.set()

    async def run(self) -> None:
        """Bring it back when it ends or hangs. Ends by cancellation, or with the error when it does not come back."""
        session = self.session
        while True:
            assert session is not None
            hangs = await self._watch(session)
            self.session = None
            self.num_restarts += 1
            await session.end(at_once=hangs)
            self.session = session = await self._restart()
            for node_id, address in list(self._known.items()):
                session.spawn(self._rejoin(session, node_id, address))

    async def _watch(self, session: Session) -> bool:
        """Return when it has ended (False) or hangs (True); until then, keep addresses and known peers up to date."""
        ended = asyncio.create_task(session.daemon.wait_ended())
        num_missed = 0
        try:
            while num_missed < NUM_MISSED_PINGS:
                if not num_missed:
                    await self._wait_interval(ended)
                if ended.done():
                    return False
                try:
                    async with asyncio.timeout(PING_TIMEOUT_S):
                        self.addresses = await session.daemon.visible_addresses()
                        peers = await session.daemon.peers()
                except TransportDown:
                    return False
                except TimeoutError:
                    num_missed = NUM_MISSED_PINGS if session.daemon.is_stopped() else num_missed + 1
                else:
                    num_missed = 0
                    for peer, addresses in peers:
                        self._note_peer(peer, addresses)
                    await asyncio.wait({ended}, timeout=MIN_PING_INTERVAL_S)
            return True
        finally:
            ended.cancel()

    async def _wait_interval(self, ended: "asyncio.Task[None]") -> None:
        self._stranger.clear()
        stranger = asyncio.create_task(self._stranger.wait())
        try:
            await asyncio.wait({ended, stranger}, timeout=PING_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stranger.cancel()

    def _note_peer(self, peer: bytes, addresses: list[Any]) -> None:
        try:
            node_id = node_id_of_peer_bytes(peer)
        except IdentityError:
            return  # not a node: libp2p connects to relays and others too
        if addresses and node_id not in self._known and not self._gate.refuses(node_id):
            self.remember(node_id, f"{addresses[0]}/p2p/{peer_id_of(node_id)}")

    async def _restart(self) -> Session:
        for attempt, delay_s in enumerate(RESTART_DELAYS_S, start=1):
            await asyncio.sleep(delay_s)
            try:
                await choose_ports(self._listen)
                return await self._open_session()
            except TransportError:
                if attempt == len(RESTART_DELAYS_S):
                    raise
        raise AssertionError

    async def _rejoin(self, session: Session, node_id: str, address: str) -> None:
        """Connect to a peer from before the restart; that it has gone meanwhile is no error."""
        match = PEER_ADDRESS.match(address)
        assert match is not None
        try:
            async with asyncio.timeout(REJOIN_TIMEOUT_S):
                await session.connect(node_id, session.parse(match["target"]))
        except (PeerUnreachable, TimeoutError):
            self.forget(node_id)
