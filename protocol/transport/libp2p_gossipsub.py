"""GossipSub's router, with what py-libp2p leaves to its user or to an attacker made good.

The mesh, its heartbeat, IHAVE and IWANT are py-libp2p's. Here is what differs:

    messages     have the id of their content (upstream's cache knows only sender and number)
    own ones     go to every peer of the topic with a score to speak of, as go-libp2p floods them: whoever has filled
                 the mesh around a node cannot keep it from being heard
    mesh         takes no peer with a negative score, drops those that get one, and grows by GRAFT no further than its
                 upper bound: beyond it a peer is pruned and told when it may ask again
    IHAVE, IWANT so many ids of one peer in one heartbeat; each message is given to a peer at most three times; whoever
                 tells of messages and does not give them when asked breaks a promise, which counts
    limits       of rates and equivocations that upstream applies to *accepted* messages of honest peers are off:
                 admission has its own
    records      signed peer records are not sent with every message: 200 bytes and a signature to check each time
"""

import hashlib
import random
from collections import Counter
from typing import Any

import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.mcache import CacheEntry, MessageCache
from libp2p.pubsub.pb import rpc_pb2

from protocol.transport.libp2p_scores import Scorer

__all__ = ["Router", "message_id"]

DEGREE, DEGREE_LOW, DEGREE_HIGH = 6, 4, 12
HEARTBEAT_S = 1
MAX_IDS_PER_HEARTBEAT = 64  # in IHAVE and IWANT of one peer
MAX_GIVEN = 3  # times that one message is given to one peer that asks
MAX_CACHED = 1024  # messages that can be asked for
PROMISE_S = 5.0
MAX_PROMISES = 256


def message_id(message: Any) -> bytes:
    """Return what names a message: two that say the same are one, whoever sends them."""
    return hashlib.sha256(message.data).digest()


class _Cache(MessageCache):  # type: ignore[misc]
    """The last messages, by the id of their content."""

    def put(self, message: Any) -> None:
        mid = message_id(message)
        if mid not in self.msgs and len(self.msgs) < MAX_CACHED:
            self.msgs[mid] = message
            self.history[0].append(CacheEntry(mid, message.topicIDs))


class Router(GossipSub):  # type: ignore[misc]  # libp2p has no types that mypy can follow
    """The router of one topic."""

    def __init__(self, topic: str) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            prune_back_off=10,
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,
            eclipse_protection_enabled=False,  # by IP alone, and none is ever known
        )
        self._topic = topic
        self.scorer: Scorer = Scorer(topic)
        self.mcache = _Cache(3, 5)
        self.num_dropped = 0  # messages that a peer's queue had no room for
        self._num_ids = Counter[ID]()  # in this heartbeat
        self.num_useless = Counter[ID]()  # messages of a peer that were no news, in this heartbeat
        self._given = Counter[tuple[ID, bytes]]()  # in this and the last few
        self._promises: dict[tuple[ID, bytes], float] = {}  # by when
        self._num_heartbeats = 0

    # what is sent

    def send_rpc(self, peer_id: ID, rpc: Any, priority: bool = False) -> None:
        """Send without a signed record."""
        rpc.ClearField("senderRecord")
        super().send_rpc(peer_id, rpc, priority)

    async def publish(self, msg_forwarder: ID, pubsub_msg: Any) -> None:
        """Send a message to the mesh, and keep it for those that ask."""
        self.mcache.put(pubsub_msg)
        rpc = rpc_pb2.RPC(publish=[pubsub_msg])
        for peer in self._get_peers_to_send([self._topic], msg_forwarder, ID(b"")):
            if self.scorer.allow_publish(peer, [self._topic]):
                self.send_rpc(peer, rpc)

    async def emit_control_message(self, control_msg: Any, to_peer: ID) -> None:
        """Send a control message."""
        self.send_rpc(to_peer, rpc_pb2.RPC(control=control_msg), priority=True)

    def _handle_dropped_rpc(self, peer_id: ID, rpc: Any, reason: str) -> None:
        self.num_dropped += len(rpc.publish)
        super()._handle_dropped_rpc(peer_id, rpc, reason)

    def _get_peers_to_send(self, topic_ids: Any, msg_forwarder: ID, origin: ID, msg_id: bytes | None = None) -> Any:
        peers = set(super()._get_peers_to_send(topic_ids, msg_forwarder, origin, msg_id))
        if self.pubsub is not None and msg_forwarder == self.pubsub.my_id:
            everyone = self.pubsub.peer_topics.get(self._topic, set())
            peers |= {peer for peer in everyone if self.scorer.allow_publish(peer, [self._topic])}
        return peers

    def _check_equivocation(self, msg: Any) -> bool:
        return True  # messages have no sender and no number

    async def send_recent_messages(self, peer_id: ID, topic: str) -> None:
        """Send nothing for a subscription alone: saying it again and again would bring the whole cache each time."""

    # the mesh

    def _get_in_topic_gossipsub_peers_from_minus(
        self, topic: str, num_to_select: int, minus: Any, backoff_check: bool = False
    ) -> list[ID]:
        bad = {peer for peer in self.pubsub.peer_topics.get(topic, ()) if self.scorer.of(peer) < 0}
        found: list[ID] = super()._get_in_topic_gossipsub_peers_from_minus(
            topic, num_to_select, set(minus) | bad, backoff_check
        )
        return found

    async def on_peer_subscribed(self, peer_id: ID, topic: str) -> None:
        """Take a new peer into the mesh at once where there is room, unless its score is bad."""
        if self.scorer.of(peer_id) >= 0:
            await super().on_peer_subscribed(peer_id, topic)

    async def handle_graft(self, graft_msg: Any, sender_peer_id: ID) -> None:
        """Take a peer into the mesh that asks for it, unless its score is bad, it asks too soon, or it is full."""
        topic, mesh = graft_msg.topicID, self.mesh.get(graft_msg.topicID)
        if mesh is None or sender_peer_id in mesh:
            return
        if self._check_back_off(sender_peer_id, topic):
            self.scorer.penalize(sender_peer_id)
        elif self.scorer.of(sender_peer_id) >= 0 and len(mesh) < DEGREE_HIGH:
            mesh.add(sender_peer_id)
            self.scorer.on_join_mesh(sender_peer_id, topic)
            return
        self._add_back_off(sender_peer_id, topic, False)
        await self.emit_prune(topic, sender_peer_id, False, False)

    def mesh_heartbeat(self) -> Any:
        """Drop whoever has got a bad score, then fill and trim the mesh."""
        self._note_heartbeat()
        dropped = []
        for topic, mesh in self.mesh.items():
            for peer in [peer for peer in mesh if self.scorer.of(peer) < 0]:
                mesh.discard(peer)
                self._add_back_off(peer, topic, False)
                dropped.append((peer, topic))
        to_graft, to_prune = super().mesh_heartbeat()
        for peer, topic in dropped:
            to_prune[peer].append(topic)
        return to_graft, to_prune

    def _note_heartbeat(self) -> None:
        self._num_heartbeats += 1
        self._num_ids.clear()
        self.num_useless.clear()
        if self._num_heartbeats % 5 == 0:
            self._given.clear()
        now_s = trio.current_time()
        for promise in [promise for promise, until_s in self._promises.items() if until_s < now_s]:
            del self._promises[promise]
            self.scorer.penalize(promise[0])

    # what is told and asked for

    async def handle_rpc(self, rpc: Any, sender_peer_id: ID) -> None:
        """Heed a peer's control messages, unless its score is very bad."""
        control = rpc.control
        num_entries = sum(map(len, (control.ihave, control.iwant, control.graft, control.prune, control.idontwant)))
        if num_entries > MAX_IDS_PER_HEARTBEAT:
            self.scorer.penalize(sender_peer_id, num_entries / MAX_IDS_PER_HEARTBEAT)
            return
        rpc.ClearField("senderRecord")
        await super().handle_rpc(rpc, sender_peer_id)

    def _take_ids(self, peer: ID, ids: Any) -> list[bytes]:
        """Return as many ids as a peer may name in this heartbeat; more count against it."""
        room = MAX_IDS_PER_HEARTBEAT - self._num_ids[peer]
        self._num_ids[peer] += len(ids)
        if len(ids) > room:
            self.scorer.penalize(peer, 1 + len(ids) / MAX_IDS_PER_HEARTBEAT)
        return list(ids)[: max(0, room)]

    async def handle_ihave(self, ihave_msg: Any, sender_peer_id: ID) -> None:
        """Ask for messages that are not known here, from whoever says that it has them."""
        if ihave_msg.topicID != self._topic or not self.scorer.allow_gossip(sender_peer_id, []):
            return
        ids = self._take_ids(sender_peer_id, ihave_msg.messageIDs)
        wanted = [mid for mid in ids if not self.pubsub.seen_messages.has(mid)]
        if not wanted:
            return
        if len(self._promises) < MAX_PROMISES:
            self._promises[sender_peer_id, random.choice(wanted)] = trio.current_time() + PROMISE_S
        await self.emit_iwant(wanted, sender_peer_id)

    def keep_promise(self, mid: bytes) -> None:
        """Note that a message has come, whoever brought it."""
        for promise in [promise for promise in self._promises if promise[1] == mid]:
            del self._promises[promise]

    async def handle_iwant(self, iwant_msg: Any, sender_peer_id: ID) -> None:
        """Give a peer the messages that it asks for, as far as they are here."""
        if not self.scorer.allow_gossip(sender_peer_id, []):
            return
        found = []
        for mid in self._take_ids(sender_peer_id, iwant_msg.messageIDs):
            message = self.mcache.get(mid)
            if message is None:
                continue
            self._given[sender_peer_id, mid] += 1
            if self._given[sender_peer_id, mid] > MAX_GIVEN:
                self.scorer.penalize(sender_peer_id)
            else:
                found.append(message)
        if found:
            self.send_rpc(sender_peer_id, rpc_pb2.RPC(publish=found))

    def remove_peer(self, peer_id: ID) -> None:
        """Forget a peer that has gone; its score as the scorer says."""
        super().remove_peer(peer_id)
        self._num_ids.pop(peer_id, None)
