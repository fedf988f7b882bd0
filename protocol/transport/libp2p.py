"""py-libp2p in the node's own process: TCP and QUIC, announcements by GossipSub, nodes nearby by mDNS.

    libp2p_settings    what a user sets                libp2p_thread     trio, and the way there and back
    libp2p_host        the host, streams               libp2p_pubsub, libp2p_gossipsub, libp2p_scores   the topic
    libp2p_reachability, libp2p_relay, libp2p_circuits   whether others can connect; relaying; being relayed
    libp2p_dht, libp2p_routing, libp2p_dht_messages    the DHT            mdns   the local network
    supervised         the contract, as far as it does not depend on libp2p
    here               what does

libp2p is imported by `start`, in a thread: hivemind cannot be in the same process, since both bring Protocol Buffers of
one name. What peers send that it does not withstand is told where it is worked around; see docs/transports.md.
"""

import asyncio
import contextlib
import hashlib
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from protocol.clock import Clock, system_clock
from protocol.errors import IdentityError
from protocol.identity import Identity
from protocol.transport.base import (
    MAX_BROADCAST_BYTES,
    Judge,
    Judgement,
    NotConnected,
    RecordValidator,
    Traffic,
    TransportDown,
    TransportError,
)
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER
from protocol.transport.libp2p_dht import Dht
from protocol.transport.libp2p_dht_messages import (
    FIND,
    MAX_FIND_REQUEST_BYTES,
    MAX_MEET_BYTES,
    MAX_STORE_REQUEST_BYTES,
    MEET,
    STORE,
)
from protocol.transport.libp2p_settings import Libp2pSettings
from protocol.transport.peer_id import node_id_of_peer_bytes, peer_bytes_of, peer_id_of
from protocol.transport.peer_streams import PeerStreams
from protocol.transport.records import RecordRules
from protocol.transport.session import Session
from protocol.transport.supervised import STREAM_PROTOCOL, SupervisedTransport, open_stream
from protocol.transport.supervisor import PEER_ADDRESS

if TYPE_CHECKING:
    from protocol.transport.libp2p_host import Host
    from protocol.transport.mdns import LocalNetwork

__all__ = ["Libp2pSettings", "Libp2pTransport"]

TOPIC_PREFIX = "/swarm-node/announcements/1/"
STATUS_S = 2.0  # how old what `details` says of the mesh may be


class Libp2pTransport(SupervisedTransport):
    """One node's transport over py-libp2p."""

    name = "libp2p"
    what = "py-libp2p"
    broadcasts = True

    def __init__(
        self,
        identity: Identity,
        validator: RecordValidator,
        settings: Libp2pSettings | None = None,
        *,
        clock: Clock = system_clock,
        max_requests: int = MAX_REQUESTS,
        max_requests_per_asker: int = MAX_REQUESTS_PER_ASKER,
    ) -> None:
        self._settings = settings or Libp2pSettings()
        super().__init__(
            identity,
            validator,
            self._settings.listen,
            clock,
            max_requests=max_requests,
            max_requests_per_asker=max_requests_per_asker,
        )
        self._topic = TOPIC_PREFIX + hashlib.sha256(self._settings.swarm_id.encode()).hexdigest()[:32]
        self._judge: Judge = lambda teller, message: Judgement.IGNORE
        self._dht = Dht(
            self._node_id,
            RecordRules(validator, clock),
            clock,
            self._ask_dht,
            self._reach,
            self._own_addresses,
            self._note_addresses,
        )
        self._tally.own_names = frozenset({MEET, FIND, STORE})
        for name, handler, max_bytes in (
            (MEET, self._dht.handle_meet, MAX_MEET_BYTES),
            (FIND, self._dht.handle_find, MAX_FIND_REQUEST_BYTES),
            (STORE, self._dht.handle_store, MAX_STORE_REQUEST_BYTES),
        ):
            self._dispatcher.handle(name, handler, max_bytes, apart=True)
        self._local_network: LocalNetwork | None = None
        self._bytes_before = (0, 0)  # of the topics of carriers that have ended
        self._topic_status: dict[str, Any] = {}
        self._watching: asyncio.Task[None] | None = None

    def hear(self, judge: Judge) -> None:
        """Judge what others broadcast."""
        self._judge = judge

    async def broadcast(self, message: bytes) -> None:
        """Publish a message to the topic."""
        if len(message) > MAX_BROADCAST_BYTES:
            raise ValueError(f"a broadcast has at most {MAX_BROADCAST_BYTES} bytes, not {len(message)}")
        _, session = self._up()
        await self._host_of(session).broadcast(message)

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        traffic, session = super().traffic, self._session
        bytes_in, bytes_out = self._bytes_before
        if session is not None:
            topic = self._host_of(session).topic
            bytes_in, bytes_out = bytes_in + topic.bytes_in, bytes_out + topic.bytes_out
        return replace(traffic, bytes_in=traffic.bytes_in + bytes_in, bytes_out=traffic.bytes_out + bytes_out)

    @property
    def dht_refusals(self) -> Counter[str]:
        """What peers said to the DHT that was not believed, by reason."""
        return self._dht.refusals

    def details(self) -> dict[str, Any]:
        """Return the state of the mesh, the scores, and what became of messages."""
        network = self._local_network
        return {
            "topics": [self._topic_status] if self._topic_status else [],
            "nearby_found": 0 if network is None else network.num_found,
            "nearby_problem": None if network is None else network.problem,
            **self._circuit_details(),
        }

    def _circuit_details(self) -> dict[str, Any]:
        """Return whether others can connect, at how many relays this node can be reached, and what it relays."""
        if self._session is None:
            return {}
        host = self._host_of(self._session)
        return {
            "reachability": host.reachability.state,
            "num_relays": host.circuits.num_reserved,
            "num_relayed_peers": host.relay.num_reserved,
            "num_relayed_circuits": host.relay.num_circuits,
            "relayed_bytes": host.relay.num_bytes,
        }

    async def start(self) -> None:
        """Listen, and look for nodes nearby."""
        await super().start()
        self._watching = asyncio.create_task(self._watch_topic(), name="libp2p topic status")
        if self._settings.mdns:
            from protocol.transport.mdns import LocalNetwork

            self._local_network = LocalNetwork(self._node_id, self._settings.swarm_id, self._found)
            await self._local_network.start(self.addresses)

    async def close(self) -> None:
        """Leave the local network, then end the host."""
        if self._watching is not None:
            self._watching.cancel()
        network, self._local_network = self._local_network, None
        if network is not None:
            await network.close()
        await super().close()

    async def _prepare(self) -> None:
        if "hivemind" in sys.modules:
            raise TransportError("hivemind and libp2p cannot share a process: choose one transport")
        for relay in self._settings.trusted_relays:
            if "/p2p-circuit" in relay or PEER_ADDRESS.match(relay) is None:
                raise TransportError(f"not the address of a relay: {relay[:200]!r}; it is a node's, with its /p2p/…")
        await asyncio.to_thread(__import__, "protocol.transport.libp2p_host")

    async def _open_session(self) -> Session:
        from protocol.transport.libp2p_host import Host

        host = Host(self._identity, self._settings, self._listen, STREAM_PROTOCOL)
        streams = PeerStreams(self._dispatcher, self._tally, lambda node_id: open_stream(host, node_id))
        session = Session(host, self._dht, streams, self._fail_with)

        async def take(peer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._take_stream(session, peer, reader, writer)

        async def ask_judge(peer: bytes, message: bytes) -> Judgement:
            judgement: Judgement = await host.ask(self._judge_of, peer, message)
            return judgement

        try:
            await host.start(take, ask_judge, self._topic)
        except BaseException:
            await session.end()
            raise
        return session

    @staticmethod
    def _host_of(session: Session) -> "Host":
        return cast("Host", session.daemon)

    def _judge_of(self, peer: bytes, message: bytes) -> Judgement:
        """Judge a message. What raises here is a bug of the judge's: it stops the node."""
        try:
            teller = node_id_of_peer_bytes(peer)
        except IdentityError:
            return Judgement.REJECT
        if self._gate.refuses(teller):
            return Judgement.IGNORE
        try:
            return self._judge(teller, message)
        except Exception as error:  # the boundary: recorded here, raised by `wait_failed`
            self._dispatcher.fail(error)
            return Judgement.IGNORE

    def _found(self, address: str) -> None:
        self.on_found(address)

    async def _ask(self, session: Session, node_id: str, name: str, payload: bytes, max_response_bytes: int) -> bytes:
        """Ask a peer; where there is no connection, connect to it where it was before, or where the DHT knows it."""
        try:
            return await super()._ask(session, node_id, name, payload, max_response_bytes)
        except NotConnected:
            addresses = self._address_before(node_id) or await self._dht.find(node_id)
            if not addresses:
                raise
            await self._reach(node_id, addresses)
            return await super()._ask(session, node_id, name, payload, max_response_bytes)

    def _address_before(self, node_id: str) -> tuple[str, ...]:
        address = self._supervisor.address_of(node_id) if self._supervisor is not None else None
        return () if address is None else (address.rpartition("/p2p/")[0],)

    # what the DHT needs

    async def _ask_dht(self, node_id: str, name: str, payload: bytes, max_bytes: int) -> bytes:
        _, session = self._up()
        self._gate.check(node_id)
        return await super()._ask(session, node_id, name, payload, max_bytes)

    async def _reach(self, node_id: str, addresses: tuple[str, ...]) -> None:
        """Connect to a node that another one has named."""
        _, session = self._up()
        self._gate.check(node_id)
        host, peer = self._host_of(session), peer_bytes_of(node_id)
        await host.connect(peer, [host.parse(address) for address in addresses])
        await self._dht.meet(peer)

    def _own_addresses(self) -> tuple[str, ...]:
        return tuple(address.rpartition("/p2p/")[0] for address in self.addresses)

    def _note_addresses(self, node_id: str, addresses: tuple[str, ...]) -> None:
        supervisor, session = self._supervisor, self._session
        if supervisor is None or session is None:
            return
        self._host_of(session).note_addresses(peer_bytes_of(node_id), addresses)
        if addresses and supervisor.address_of(node_id) is None and not self._gate.refuses(node_id):
            supervisor.remember(node_id, f"{addresses[0]}/p2p/{peer_id_of(node_id)}")

    async def _tell_addresses(self, session: Session) -> None:
        """Meet connected peers again, so that they know where this node can be reached now."""
        for peer, _ in await self._host_of(session).peers():
            with contextlib.suppress(TransportError):  # it is told when it is met again
                await self._dht.meet(peer)

    async def _watch_topic(self) -> None:
        """Ask now and then how the mesh is, and tell peers when the addresses have changed. Ends by `close`."""
        told = self.addresses
        while True:
            session = self._session
            if session is not None:
                try:
                    status = await self._host_of(session).topic_status()
                except TransportDown:  # a new one comes
                    status = {}
                if told != self.addresses:
                    told = self.addresses
                    session.spawn(self._tell_addresses(session))
                self._topic_status = status and {"topic": self._topic, **_with_node_ids(status)}
            await asyncio.sleep(STATUS_S)


def _with_node_ids(status: dict[str, Any]) -> dict[str, Any]:
    """Return what the topic says of its peers as plain data, by node id; peers that are no nodes are left out."""
    scores = {}
    for peer, score in status["scores"].items():
        with contextlib.suppress(IdentityError):
            scores[node_id_of_peer_bytes(peer)] = round(score, 3)
    return {"mesh_size": len(status["mesh"]), "scores": scores, "messages": status["counts"]}
