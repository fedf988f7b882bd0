"""One topic of GossipSub, whose messages are judged by the node: accepted, ignored or rejected.

    libp2p_gossipsub   mesh, IHAVE and IWANT          libp2p_scores   what is thought of a peer
    here               what peers send: read, judged, counted

A message is content alone: no sender, no number, no signature of libp2p's (what is said is signed by its author within
it, and whoever passes it on is known by the connection). One that has any of these is rejected. Of a peer one message
is judged at a time, and its stream is not read meanwhile: a flood waits at its sender.

py-libp2p's own `Pubsub` knows accepted and invalid messages only, starts a task for each that comes however many there
are, does not count bad signatures, and lets what is no protobuf end the node.
"""

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import IncompleteReadError, IOException
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.utils.varint import MessageTooLarge

from protocol.transport.base import MAX_BROADCAST_BYTES, Judgement
from protocol.transport.libp2p_gossipsub import Router, message_id

__all__ = ["Topic"]

MAX_RPC_BYTES = 64 * 1024
MAX_LENGTH_BYTES = 3  # of what says so: seven bits in each
MAX_SUBSCRIPTIONS = 16  # in one message
MAX_CHANGES = 20.0  # of one peer's subscriptions, which fade by one a second
MAX_USELESS_PER_HEARTBEAT = 256  # of one peer: duplicates, and what is ignored, which counts for more
IGNORED = 16
USELESS = 1.0  # of the penalty for bad behaviour, for each beyond
MAX_SEEN = 16_384
MAX_REJECTED = 1024

AskJudge = Callable[[bytes, bytes], Awaitable[Judgement]]  # (peer id of who passed it on, message)


class _Seen:
    """The ids of the last messages: what upstream's cache of seen messages is to its router, and bounded."""

    def __init__(self, max_ids: int) -> None:
        self._ids: OrderedDict[bytes, None] = OrderedDict()
        self._max_ids = max_ids

    def add(self, mid: bytes) -> None:
        self._ids[mid] = None
        if len(self._ids) > self._max_ids:
            self._ids.popitem(last=False)

    def has(self, mid: bytes) -> bool:
        return mid in self._ids


class _Messages:
    """A peer's messages, each behind its length. Upstream reads a length byte by byte, each from the connection."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._data = bytearray()

    async def next(self) -> bytes:
        """Return the next one. Raises MessageTooLarge, IncompleteReadError, and what the stream raises."""
        while (size := self._size()) is None or len(self._data) < sum(size):
            data = await self._stream.read(MAX_RPC_BYTES)
            if not data:
                raise IncompleteReadError("the stream has ended")
            self._data += data
        num_length_bytes, num_bytes = size
        end = num_length_bytes + num_bytes
        message = bytes(self._data[num_length_bytes:end])
        del self._data[:end]
        return message

    def _size(self) -> tuple[int, int] | None:
        """Return how many bytes the length has, and the message; None where the length is not whole."""
        num_bytes = 0
        for number, byte in enumerate(self._data[:MAX_LENGTH_BYTES]):
            num_bytes |= (byte & 0x7F) << (7 * number)
            if byte < 0x80:
                if num_bytes > MAX_RPC_BYTES:
                    raise MessageTooLarge(f"{num_bytes} bytes, over {MAX_RPC_BYTES}")
                return number + 1, num_bytes
        if len(self._data) >= MAX_LENGTH_BYTES:
            raise MessageTooLarge("a length of too many bytes")
        return None


class Topic(Pubsub):  # type: ignore[misc]  # libp2p has no types that mypy can follow
    """The one topic of a node."""

    router: Router
    seen_messages: Any

    def __init__(self, host: Any, topic: str, ask_judge: AskJudge) -> None:
        super().__init__(
            host,
            Router(topic),
            strict_signing=False,
            msg_id_constructor=message_id,
            max_subscriptions_per_rpc=MAX_SUBSCRIPTIONS,
            max_subscriptions_per_peer=1,
            max_inbound_rpc_size=MAX_RPC_BYTES,
            allowed_topics={topic},
        )
        self._topic, self._ask_judge = topic, ask_judge
        self.seen_messages.stop()  # a thread of its own
        self.seen_messages = _Seen(MAX_SEEN)
        self._rejected = _Seen(MAX_REJECTED)
        self._changes: dict[ID, tuple[float, float]] = {}  # of subscriptions: (how many, when)
        self.counts = Counter[str]()  # messages, by what became of them
        self.bytes_in = self.bytes_out = 0

    async def join(self) -> None:
        """Subscribe; once, at the start."""
        await self.subscribe(self._topic)

    async def send(self, data: bytes) -> None:
        """Publish a message of this node's."""
        message = rpc_pb2.Message(data=data, topicIDs=[self._topic])
        self.seen_messages.add(message_id(message))
        self.counts["sent"] += 1
        await self.router.publish(self.my_id, message)

    def status(self) -> dict[str, Any]:
        """Return the state of the mesh as plain data."""
        mesh = self.router.mesh.get(self._topic, set())
        peers = self.peer_topics.get(self._topic, set())
        return {
            "mesh": [peer.to_bytes() for peer in mesh],
            "scores": {peer.to_bytes(): self.router.scorer.of(peer) for peer in {*peers, *mesh, *self.peers}},
            "counts": {**self.counts, "dropped": self.router.num_dropped},
        }

    # what peers send

    async def continuously_read_stream(self, stream: Any) -> None:
        """Read a peer's messages, one after the other, until its stream ends."""
        peer: ID = stream.muxed_conn.peer_id
        messages = _Messages(stream)
        try:
            while self.manager.is_running:
                data = await messages.next()
                self.bytes_in += len(data)
                rpc = rpc_pb2.RPC()
                rpc.ParseFromString(data)
                if self.router.scorer.is_graylisted(peer, []):
                    self.counts["graylisted"] += 1
                    continue
                await self._take(peer, rpc)
        except (DecodeError, MessageTooLarge):
            self.counts["malformed"] += 1
            self.router.scorer.on_invalid_message(peer, self._topic)
            await stream.reset()
            self._handle_dead_peer(peer)
        except (StreamError, ParseError, IOException):
            await stream.reset()

    async def _take(self, peer: ID, rpc: Any) -> None:
        for message in rpc.publish:
            await self.push_msg(peer, message)
        if len(rpc.subscriptions) > MAX_SUBSCRIPTIONS:
            self.router.scorer.penalize(peer, len(rpc.subscriptions) / MAX_SUBSCRIPTIONS)
        else:
            for subscription in rpc.subscriptions:
                if self._may_change(peer):
                    self.handle_subscription(peer, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer)

    def _may_change(self, peer: ID) -> bool:
        """Whether a peer may say once more to what it subscribes; saying it too often counts against it."""
        now_s = trio.current_time()
        num, at_s = self._changes.get(peer, (0.0, now_s))
        num = max(0.0, num - (now_s - at_s)) + 1
        self._changes[peer] = (num, now_s)
        if num > MAX_CHANGES:
            self.router.scorer.penalize(peer)
        return num <= MAX_CHANGES

    async def push_msg(self, msg_forwarder: ID, msg: Any) -> None:
        """Judge a message that a peer has passed on, once, and pass it on where it is accepted."""
        scorer = self.router.scorer
        if not scorer.allow_publish(msg_forwarder, []):
            self.counts["low_score"] += 1
            return
        if list(msg.topicIDs) != [self._topic]:
            self.counts["other_topic"] += 1
            scorer.penalize(msg_forwarder)
            return
        mid = message_id(msg)
        self.router.keep_promise(mid)
        if self.seen_messages.has(mid):
            self.counts["duplicate"] += 1
            self._note_useless(msg_forwarder, 1)
            return
        if self._is_malformed(msg) or self._rejected.has(mid):
            self._reject(msg_forwarder, mid)
            return
        self.seen_messages.add(mid)  # before it is judged: another peer may bring it meanwhile
        judgement = await self._ask_judge(msg_forwarder.to_bytes(), bytes(msg.data))
        if judgement is Judgement.REJECT:
            self._reject(msg_forwarder, mid)
            return
        self.counts[judgement.value] += 1
        if judgement is Judgement.IGNORE:
            self._note_useless(msg_forwarder, IGNORED)
        else:
            scorer.on_first_delivery(msg_forwarder, self._topic)
            await self.router.publish(msg_forwarder, msg)

    def _note_useless(self, peer: ID, weight: int) -> None:
        """Count what is no news and nobody's fault: few of it are a mesh at work, very many a flood."""
        num = self.router.num_useless[peer] = self.router.num_useless[peer] + weight
        if num > MAX_USELESS_PER_HEARTBEAT:
            self.router.scorer.penalize(peer, USELESS)

    @staticmethod
    def _is_malformed(msg: Any) -> bool:
        return bool(len(msg.data) > MAX_BROADCAST_BYTES or msg.from_id or msg.seqno or msg.signature or msg.key)

    def _reject(self, peer: ID, mid: bytes) -> None:
        self.counts[Judgement.REJECT.value] += 1
        self._rejected.add(mid)
        self.router.scorer.on_invalid_message(peer, self._topic)

    async def write_msg(self, stream: Any, rpc_msg: Any) -> bool:
        """Count what is written."""
        self.bytes_out += rpc_msg.ByteSize()
        return bool(await super().write_msg(stream, rpc_msg))

    def _handle_dead_peer(self, peer_id: ID) -> None:
        self._changes.pop(peer_id, None)
        super()._handle_dead_peer(peer_id)
