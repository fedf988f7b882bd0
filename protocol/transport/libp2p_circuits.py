"""Being reached through relays, and reaching who is: circuit relay v2 from both of its ends.

A node that cannot be reached reserves a place at up to NUM_RELAYS peers that can, and tells others its address there,
`RELAY/p2p-circuit`. Whoever dials that has the relay make a circuit, over which the two make a connection like any
other: the handshake proves who they are, and the relay reads nothing.
"""

import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import OK, PERMISSION_DENIED, HopMessage, PeerId, Status, StopMessage
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr

from protocol.transport.base import PeerUnreachable
from protocol.transport.libp2p_relay import HOP, MESSAGE_S, STOP, STREAM_ERRORS, has_direct

__all__ = ["CIRCUIT", "Circuits"]

CIRCUIT = "/p2p-circuit"
NUM_RELAYS = 2
CHECK_S = 1.0  # between two looks at which relays there are
RENEW_S = 600.0  # after which a relay is asked again; it forgets after half an hour
RETRY_S = 5.0  # before a peer that has refused, or was not reached, is asked again
DIAL_S = 10.0
UPGRADE_S = 15.0
MAX_UPGRADES = 16  # connections through relays whose handshake is under way

Dial = Callable[[ID, Multiaddr], Awaitable[None]]


class Circuits:
    """What one node has to do with relays. `wanted`: whether it is to be reached through them."""

    def __init__(self, host: Any, dial: Dial, trusted: Iterable[Multiaddr]) -> None:
        """`trusted`: the only relays to ask, with their peer ids; where there are none, peers are asked."""
        self._host, self._network, self._dial = host, host.get_network(), dial
        self._trusted = dict(map(_split, trusted))
        self.dialled: dict[ID, Multiaddr] = {}  # where peers were reached directly; the host keeps it
        self.wanted = False
        self._reserved: dict[ID, tuple[Multiaddr, float]] = {}  # by relay: where it is, when it was asked
        self._refused: dict[ID, float] = {}  # when to ask again
        self._num_upgrades = 0
        host.set_stream_handler(STOP, self._take)

    @property
    def addresses(self) -> list[str]:
        """Where others can reach this node through relays, without its peer id."""
        return [f"{address}/p2p/{relay}{CIRCUIT}" for relay, (address, _) in list(self._reserved.items())]

    @property
    def num_reserved(self) -> int:
        """How many relays this node can be reached through."""
        return len(self._reserved)

    # being reached

    async def run(self) -> None:
        """Hold places at relays as long as they are wanted. Ends by cancellation."""
        while True:
            for relay in list(self._reserved):
                if not self.wanted or not has_direct(self._network, relay):
                    del self._reserved[relay]
            if self.wanted:
                await self._reserve_all()
            await trio.sleep(CHECK_S)

    async def _reserve_all(self) -> None:
        now_s = trio.current_time()
        for relay, (address, asked_s) in list(self._reserved.items()):
            if now_s - asked_s > RENEW_S:
                await self._reserve(relay, address)
        candidates = self._candidates()
        self._refused = {relay: again_s for relay, again_s in self._refused.items() if again_s > now_s}
        for relay, address in candidates:
            if len(self._reserved) >= NUM_RELAYS:
                break
            if relay not in self._reserved and relay not in self._refused:
                await self._reserve(relay, address)

    def _candidates(self) -> list[tuple[ID, Multiaddr]]:
        if self._trusted:
            return list(self._trusted.items())
        found = [(peer, address) for peer, address in self.dialled.items() if has_direct(self._network, peer)]
        random.shuffle(found)
        return found

    async def _reserve(self, relay: ID, address: Multiaddr) -> None:
        """Ask a relay for a place; where it has none, do not ask it again soon."""
        self._reserved.pop(relay, None)
        stream = None
        try:
            await self._reach_relay(relay, address)
            with trio.fail_after(MESSAGE_S):
                stream = await self._host.new_stream(relay, [HOP])
                await write_delimited_msg(stream, HopMessage(type=HopMessage.RESERVE))
                has_place = (await read_delimited_msg(stream, HopMessage)).status == OK
                await stream.close()
        except (*STREAM_ERRORS, PeerUnreachable):
            has_place = False
            if stream is not None:
                await stream.reset()
        if has_place:
            self._reserved[relay] = address, trio.current_time()
        else:
            self._refused[relay] = trio.current_time() + RETRY_S

    async def _take(self, stream: Any) -> None:
        """Take a connection that a relay brings: only one at which this node has a place may."""
        relay: ID = stream.muxed_conn.peer_id
        with trio.fail_after(MESSAGE_S):
            asked = await read_delimited_msg(stream, StopMessage)
        is_taken = asked.type == StopMessage.CONNECT and relay in self._reserved and self._num_upgrades < MAX_UPGRADES
        status = OK if is_taken else PERMISSION_DENIED
        with trio.fail_after(MESSAGE_S):
            await write_delimited_msg(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if not is_taken:
            await stream.close()
            return
        self._num_upgrades += 1
        try:
            with trio.fail_after(UPGRADE_S):
                address = Multiaddr(f"/p2p/{relay}{CIRCUIT}")
                await self._network.upgrade_inbound_raw_conn(_raw(stream, address, initiator=False), address)
        finally:
            self._num_upgrades -= 1

    # reaching others

    async def dial(self, peer: ID, address: Multiaddr) -> None:
        """Connect to a peer at `RELAY/p2p-circuit`. Raises PeerUnreachable, or one of STREAM_ERRORS."""
        relay, relay_address = _split(Multiaddr(str(address).removesuffix(CIRCUIT)))
        await self._reach_relay(relay, relay_address)
        stream = None
        try:
            with trio.fail_after(MESSAGE_S + UPGRADE_S):
                stream = await self._host.new_stream(relay, [HOP])
                await write_delimited_msg(stream, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=peer.to_bytes())))
                status = (await read_delimited_msg(stream, HopMessage)).status
                if status != OK:
                    raise PeerUnreachable(f"the relay refuses: {_name(status)}")
                await self._upgrade(_raw(stream, address, initiator=True), peer)
        except BaseException:
            if stream is not None:
                with trio.CancelScope(shield=True):
                    await stream.reset()
            raise

    async def _upgrade(self, raw: RawConnection, peer: ID) -> None:
        try:
            await self._network.upgrade_outbound_raw_conn(raw, peer)
        except Exception as error:  # the boundary: a handshake with a stranger raises whatever it comes upon
            raise PeerUnreachable(f"no handshake through the relay: {type(error).__name__}") from error

    async def _reach_relay(self, relay: ID, address: Multiaddr) -> None:
        """Connect to a relay directly, unless it is connected."""
        if relay == self._host.get_id():
            raise PeerUnreachable("the relay is this node, and the peer is not connected to it")
        if not has_direct(self._network, relay):
            with trio.fail_after(DIAL_S):
                await self._dial(relay, address)


def _split(address: Multiaddr) -> tuple[ID, Multiaddr]:
    """Return who a relay is and where, from its full address. Raises ValueError."""
    where, _, relay = str(address).rpartition("/p2p/")
    if not where or CIRCUIT in where:
        raise ValueError(f"not the address of a relay: {str(address)[:200]!r}")
    return ID.from_string(relay), Multiaddr(where)


def _raw(stream: Any, address: Multiaddr, *, initiator: bool) -> RawConnection:
    return RawConnection(stream, initiator, connection_type=ConnectionType.RELAYED, addresses=[address])


def _name(status: Any) -> str:
    try:
        return str(Status.Name(status)).lower().replace("_", " ")
    except ValueError:
        return f"status {status}"
