"""Relaying others: the hop of circuit relay v2, of a node that can be reached itself.

    RESERVE   a peer wants to be reached through this node: it is, as long as it is connected and asks again in time
    CONNECT   a peer wants to reach one that has reserved: their two streams are made one circuit. What crosses it is a
              connection of those two, with a handshake and keys of its own: it can be cut here, not read or altered

The messages are py-libp2p's. Its own relay reserves for whomever a message names, lets an idle circuit live for ever,
and closes a peer's newest circuit with its oldest.
"""

import time
from collections import Counter
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import (
    CONNECTION_FAILED,
    MALFORMED_MESSAGE,
    NO_RESERVATION,
    OK,
    PERMISSION_DENIED,
    RESERVATION_REFUSED,
    RESOURCE_LIMIT_EXCEEDED,
    HopMessage,
    Limit,
    PeerId,
    Reservation,
    StopMessage,
)
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as HOP
from libp2p.relay.circuit_v2.protocol import STOP_PROTOCOL_ID as STOP
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg

__all__ = ["HOP", "STOP", "STREAM_ERRORS", "Relay", "has_direct", "is_relayed"]

MAX_RESERVATIONS = 64
MAX_CIRCUITS = 64
MAX_CIRCUITS_PER_PEER = 16  # that begin or end at one
RESERVATION_S = 1800
CIRCUIT_S = 1800  # as long, and as much, as p2pd lets one last
CIRCUIT_BYTES = 4 * 2**30  # both ways together
MESSAGE_S = 10.0
CHUNK_BYTES = 65_536
CLOSE_S = 5.0
# What a peer can cause on a stream: it ends, breaks, says nothing in time, or says what is no message.
STREAM_ERRORS = (BaseLibp2pError, OSError, EOFError, ValueError, trio.TooSlowError, DecodeError)


def is_relayed(muxed_connection: Any) -> bool:
    """Whether a connection runs through a relay."""
    return any("/p2p-circuit" in str(address) for address in muxed_connection.get_transport_addresses())


def has_direct(network: Any, peer: ID) -> bool:
    """Whether there is a connection to a peer that no relay carries."""
    return any(
        not connection.is_closed and not is_relayed(connection.muxed_conn)
        for connection in network.get_connections(peer)
    )


class Relay:
    """Relays others as long as `is_open`."""

    def __init__(self, host: Any) -> None:
        self._host, self._network = host, host.get_network()
        self.is_open = False
        self._reserved: dict[ID, float] = {}  # until when, on trio's clock
        self._ends = Counter[ID]()  # circuits that begin or end at a peer
        self.num_circuits = 0
        self.num_bytes = 0  # carried for others so far
        host.set_stream_handler(HOP, self._take)

    @property
    def num_reserved(self) -> int:
        """How many peers may be reached through this node."""
        return len(self._reserved)

    async def _take(self, stream: Any) -> None:
        """Answer one message. What a peer's stream raises ends that stream."""
        peer: ID = stream.muxed_conn.peer_id
        with trio.fail_after(MESSAGE_S):
            asked = await read_delimited_msg(stream, HopMessage)
        if not self.is_open or is_relayed(stream.muxed_conn):
            await _answer(stream, PERMISSION_DENIED)
        elif asked.type == HopMessage.RESERVE:
            await self._reserve(stream, peer)
        elif asked.type == HopMessage.CONNECT:
            await self._connect(stream, peer, ID(asked.peer.id))
            return
        else:
            await _answer(stream, MALFORMED_MESSAGE)
        await stream.close()

    async def _reserve(self, stream: Any, peer: ID) -> None:
        """Reserve for who asks, whomever the message names."""
        now_s = trio.current_time()
        self._reserved = {
            one: until_s
            for one, until_s in self._reserved.items()
            if until_s > now_s and has_direct(self._network, one)
        }
        if peer not in self._reserved and len(self._reserved) >= MAX_RESERVATIONS:
            await _answer(stream, RESERVATION_REFUSED)
            return
        self._reserved[peer] = now_s + RESERVATION_S
        expire = int(time.time()) + RESERVATION_S  # by the machine's clock, as the protocol has it
        await _answer(stream, OK, reservation=Reservation(expire=expire), limit=_LIMIT)

    async def _connect(self, stream: Any, source: ID, destination: ID) -> None:
        """Make a circuit, and carry it until it ends."""
        refusal = self._refusal(source, destination)
        if refusal is not None:
            await _answer(stream, refusal)
            await stream.close()
            return
        self.num_circuits += 1
        self._ends.update((source, destination))
        far = None
        try:
            try:
                with trio.fail_after(MESSAGE_S):
                    far = await self._host.new_stream(destination, [STOP])
                    asked = StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=source.to_bytes()), limit=_LIMIT)
                    await write_delimited_msg(far, asked)
                    has_taken = (await read_delimited_msg(far, StopMessage)).status == OK
            except STREAM_ERRORS:
                has_taken = False
            await _answer(stream, OK if has_taken else CONNECTION_FAILED, limit=_LIMIT)
            if has_taken:
                await self._carry(stream, far)
        finally:
            self.num_circuits -= 1
            for peer in (source, destination):
                self._ends[peer] -= 1
                if not self._ends[peer]:
                    del self._ends[peer]
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S):
                for end in (stream, far):
                    if end is not None:
                        await end.reset()

    def _refusal(self, source: ID, destination: ID) -> Any:
        """Return why there is no circuit between these, as a status, or None."""
        if self._reserved.get(destination, 0.0) <= trio.current_time() or not has_direct(self._network, destination):
            return NO_RESERVATION
        is_full = any(self._ends[peer] >= MAX_CIRCUITS_PER_PEER for peer in (source, destination))
        return RESOURCE_LIMIT_EXCEEDED if is_full or self.num_circuits >= MAX_CIRCUITS else None

    async def _carry(self, near: Any, far: Any) -> None:
        """Carry bytes both ways until one side ends, or as long and as many as a circuit may."""
        left = CIRCUIT_BYTES
        with trio.move_on_after(CIRCUIT_S):
            async with trio.open_nursery() as nursery:

                async def copy(source: Any, target: Any) -> None:
                    nonlocal left
                    try:
                        while (data := await source.read(CHUNK_BYTES)) and len(data) <= left:
                            left -= len(data)
                            self.num_bytes += len(data)
                            await target.write(data)
                    except STREAM_ERRORS:
                        pass  # ended or broken: so is the circuit
                    nursery.cancel_scope.cancel()

                nursery.start_soon(copy, near, far)
                nursery.start_soon(copy, far, near)


_LIMIT = Limit(duration=CIRCUIT_S, data=CIRCUIT_BYTES)


async def _answer(stream: Any, status: Any, **fields: Any) -> None:
    with trio.fail_after(MESSAGE_S):
        await write_delimited_msg(stream, HopMessage(type=HopMessage.STATUS, status=status, **fields))
