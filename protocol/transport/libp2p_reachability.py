"""Whether others can connect to this node: peers are asked to try (AutoNAT), and tried for when they ask.

Who is asked tries at the address that the question comes from and nowhere else. The verdict is that of most peers asked
in one round; a peer that does not answer, or is busy, has none. TCP alone is tried.
"""

import random
from collections.abc import Callable
from typing import Any, Literal

import trio
from libp2p.host.autonat.autonat import AutoNATService
from libp2p.host.autonat.pb.autonat_pb2 import Message
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from protocol.transport.libp2p_relay import STREAM_ERRORS, has_direct

__all__ = ["Reachability", "State"]

State = Literal["unknown", "public", "private"]
NUM_ASKED = 5  # peers in a round
FIRST_CHECK_S = 2.0  # between rounds until there is a verdict
CHECK_S = 120.0
ASK_S = 15.0
TRY_S = 5.0  # for one address of who asks
MAX_TRIED = 2  # addresses of who asks
MAX_TRIALS = 4  # at one time


class Reachability:
    """What is known of it: `state`."""

    def __init__(self, host: Any, addresses: Callable[[], list[str]], *, serves: bool, state: State | None) -> None:
        """`addresses`: where this node listens. `serves`: whether peers are asked, and tried for; `state`: as it is."""
        self._host, self._addresses, self._is_asked = host, addresses, serves and state is None
        self.state: State = state or "unknown"
        self._service = _AutoNat(host, serve=serves)

    async def run(self) -> None:
        """Ask peers from time to time. Ends by cancellation."""
        while self._is_asked:
            await self._ask_some()
            await trio.sleep(FIRST_CHECK_S if self.state == "unknown" else CHECK_S)

    async def _ask_some(self) -> None:
        network = self._host.get_network()
        peers = [peer for peer in self._host.get_connected_peers() if has_direct(network, peer)]
        verdicts: list[bool] = []
        async with trio.open_nursery() as nursery:
            for peer in random.sample(peers, min(NUM_ASKED, len(peers))):
                nursery.start_soon(self._ask, peer, verdicts)
        num_reached = sum(verdicts)
        if 2 * num_reached != len(verdicts):
            self.state = "public" if 2 * num_reached > len(verdicts) else "private"

    async def _ask(self, peer: ID, verdicts: list[bool]) -> None:
        addresses = [Multiaddr(address).to_bytes() for address in self._addresses()]
        try:
            status, _ = await self._service.query_server(peer, addresses, ASK_S)
        except STREAM_ERRORS:
            return
        # Refused: no address of this node's is where it comes from, as behind a router.
        if status in (Message.OK, Message.E_DIAL_ERROR, Message.E_DIAL_REFUSED):
            verdicts.append(status == Message.OK)
        self._service.dial_results.clear()  # upstream keeps one for every peer


class _AutoNat(AutoNATService):  # type: ignore[misc]  # libp2p has no types
    """AutoNAT whose trials are some. Upstream's ask for a connection, and who asks has one: all are well reachable."""

    _num_trials = 0

    async def _try_dial(self, peer_id: ID, addrs: list[bytes]) -> bytes | None:
        """Return the first address at which this peer answers and proves who it is, or None."""
        if self._num_trials >= MAX_TRIALS:
            raise RuntimeError("busy")  # upstream ends the stream without an answer
        self._num_trials += 1
        try:
            for address in addrs[:MAX_TRIED]:
                if await self._answers(Multiaddr(address), peer_id):
                    return address
            return None
        finally:
            self._num_trials -= 1

    async def _answers(self, address: Multiaddr, peer: ID) -> bool:
        """Try an address up to the handshake: a second connection, and its end, would confuse GossipSub."""
        network: Any = self.host.get_network()
        transport = network.transport_manager.transport_for_dialing(address)
        if transport is None or "/tcp/" not in str(address):
            return False
        connection = None
        try:
            with trio.fail_after(TRY_S):
                connection = await transport.dial(address)
                await network.upgrader.upgrade_security(connection, True, peer)
        except STREAM_ERRORS:
            return False
        finally:
            if connection is not None:
                await connection.close()
        return True
