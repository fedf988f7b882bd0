"""Peers that are hostile on GossipSub: floods, forgeries, spam, a ring around one node. Honest news arrives.

The hostile write to the stream of py-libp2p what they like; nothing of this node's own limits them.
"""

import asyncio
import itertools
import random
from contextlib import asynccontextmanager

import psutil
import pytest

from protocol.identity import Identity
from protocol.transport.base import Judgement, TransportError
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.peer_id import peer_bytes_of

pytestmark = pytest.mark.libp2p
LOCAL = ("/ip4/127.0.0.1/tcp/0",)
MIN_DELIVERY = 0.95
MAX_GROWTH_BYTES = 48 * 2**20  # of the whole process, attackers included
NUM_NEWS = 30
PAUSE_S = 0.05  # between two writes of one attacker to one node: all share the interpreter with who is attacked


class Hostile:
    """A node that hears everything and passes on nothing."""

    def __init__(self, folder, name):
        identity = Identity.create(folder / f"{name}.pem")
        self.transport = Libp2pTransport(identity, lambda *_: True, Libp2pSettings(listen=LOCAL, mdns=False))
        self.transport.hear(lambda teller, message: Judgement.IGNORE)
        self.peer = peer_bytes_of(identity.node_id)

    async def start(self, victims):
        await self.transport.start()
        for victim in victims:
            await self.transport.connect(victim.addresses[0], timeout_s=20)
        async with asyncio.timeout(20):
            while not all(self.peer_of(victim) in self.topic.peers for victim in victims):  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    @property
    def topic(self):
        return self.transport._session.daemon.topic

    @staticmethod
    def peer_of(transport):
        from libp2p.peer.id import ID

        return ID(peer_bytes_of(transport.node_id))

    async def write(self, victim, data):
        """Write bytes to the stream that the victim reads; an error where it has ended."""

        async def write():
            stream = self.topic.peers.get(self.peer_of(victim))
            if stream is not None:
                await stream.write(data)

        await self.transport._session.daemon._thread.call(write)

    async def go_on(self, attack, victim):
        """Attack until the test has had enough. The victim may end the stream: it is opened anew."""
        while True:
            try:
                async with asyncio.timeout(2):
                    await self.write(victim, attack(self))
            except (TransportError, TimeoutError, OSError):
                await asyncio.sleep(0.1)
            except Exception as error:
                if type(error).__module__.partition(".")[0] != "libp2p":
                    raise
                await asyncio.sleep(0.1)
            await asyncio.sleep(PAUSE_S)

    def rpc(self, **fields):
        from libp2p.pubsub.pb import rpc_pb2
        from libp2p.utils.varint import encode_varint_prefixed

        return encode_varint_prefixed(rpc_pb2.RPC(**fields).SerializeToString())

    def message(self, data, **fields):
        from libp2p.pubsub.pb import rpc_pb2

        return rpc_pb2.Message(data=data, topicIDs=[self.topic._topic], **fields)

    def control(self, **fields):
        from libp2p.pubsub.pb import rpc_pb2

        return self.rpc(control=rpc_pb2.ControlMessage(**fields))

    def graft(self):
        from libp2p.pubsub.pb import rpc_pb2

        return self.control(graft=[rpc_pb2.ControlGraft(topicID=self.topic._topic)])

    @classmethod
    def attacks(cls):
        """Return what is written again and again, by name."""
        from libp2p.pubsub.pb import rpc_pb2

        def subscriptions(peer):
            topics = [f"topic {random.random()}" for _ in range(1000)]
            return peer.rpc(subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=True, topicid=topic) for topic in topics])

        def in_and_out(peer):
            topic = peer.topic._topic
            return peer.rpc(
                subscriptions=[rpc_pb2.RPC.SubOpts(subscribe=bool(n % 2), topicid=topic) for n in range(16)]
            )

        def noise(peer):
            return peer.rpc(publish=[peer.message(random.randbytes(500)) for _ in range(50)])

        def ihave(peer):
            ids = [random.randbytes(32) for _ in range(1000)]
            return peer.control(ihave=[rpc_pb2.ControlIHave(topicID=peer.topic._topic, messageIDs=ids)])

        def iwant(peer):
            known = list(peer.topic.seen_messages._ids)[-20:]
            return peer.control(iwant=[rpc_pb2.ControlIWant(messageIDs=known * 10)] * 8)

        def grafts(peer):
            prune = rpc_pb2.ControlPrune(topicID=peer.topic._topic, backoff=60)
            return peer.control(prune=[prune]) + peer.graft() * 10

        return {
            "subscriptions": subscriptions,
            "in and out": in_and_out,
            "noise": noise,
            "forged": lambda peer: peer.rpc(publish=[peer.message(b"forged" + random.randbytes(99))] * 3),
            "signed": lambda peer: peer.rpc(publish=[peer.message(b"news" + random.randbytes(9), signature=b"x")]),
            "too large": lambda peer: peer.rpc(publish=[peer.message(b"news" + bytes(9000))]),
            "other topic": lambda peer: peer.rpc(
                publish=[rpc_pb2.Message(data=random.randbytes(9), topicIDs=[peer.topic._topic, "other"])] * 9
            ),
            "garbage": lambda peer: b"\x20" + random.randbytes(32),
            "endless": lambda peer: b"\xff\xff\xff\xff\x0f" + bytes(1000),
            "ihave": ihave,
            "iwant": iwant,
            "grafts": grafts,
        }


class Honest:
    """An honest node, and what it has heard."""

    def __init__(self, folder, number):
        self.transport = Libp2pTransport(
            Identity.create(folder / f"honest{number}.pem"), lambda *_: True, Libp2pSettings(listen=LOCAL, mdns=False)
        )
        self.heard = set()
        self.transport.hear(self.judge)

    def judge(self, teller, message):
        if message.startswith(b"news"):
            self.heard.add(message)
            return Judgement.ACCEPT
        return Judgement.REJECT if message.startswith(b"forged") else Judgement.IGNORE

    async def status(self):
        return await self.transport._session.daemon.topic_status()


@asynccontextmanager
async def honest_nodes(folder, num):
    """Honest nodes, each connected to each."""
    nodes = [Honest(folder, number) for number in range(num)]
    try:
        for node in nodes:
            await node.transport.start()
        for one, other in itertools.combinations(nodes, 2):
            await one.transport.connect(other.transport.addresses[0], timeout_s=20)
        yield nodes
    finally:
        for node in nodes:
            await node.transport.close()


async def spread(nodes, sources, num=NUM_NEWS):
    """Let sources broadcast news in turn; return which share of it has reached each of the nodes in the end."""
    sent = []
    for number in range(num):
        source = sources[number % len(sources)]
        sent.append((source, b"news %d " % number + random.randbytes(200)))
        await source.transport.broadcast(sent[-1][1])
        await asyncio.sleep(0.05)
    expected = [(node, message) for node in nodes for source, message in sent if node is not source]

    def share():
        return sum(message in node.heard for node, message in expected) / len(expected)

    for _ in range(60):
        if share() == 1:
            break
        await asyncio.sleep(0.1)
    return share()


@pytest.mark.parametrize(
    "names", [("forged", "noise", "ihave", "garbage"), pytest.param(None, marks=pytest.mark.soak)], ids=["four", "all"]
)
def test_hostile_peers_are_scored_out_and_what_is_honest_arrives(tmp_path, names):
    async def main():
        async with honest_nodes(tmp_path, 3) as nodes:
            attacks = {name: attack for name, attack in Hostile.attacks().items() if names is None or name in names}
            hostile = {name: Hostile(tmp_path, name) for name in attacks}
            attacking = []
            try:
                for peer in hostile.values():
                    await peer.start([node.transport for node in nodes])
                for name, peer in hostile.items():
                    attacking += [asyncio.create_task(peer.go_on(attacks[name], node.transport)) for node in nodes]
                await asyncio.sleep(2)
                before = psutil.Process().memory_info().rss
                delivery = await spread(nodes, nodes)
                growth = psutil.Process().memory_info().rss - before
                for node in nodes:
                    assert (await node.status())["counts"].get("accept", 0) <= NUM_NEWS
                    scores = (await node.status())["scores"]
                    for name, peer in hostile.items():
                        score = scores.get(peer.peer)  # None: it has cut itself off
                        assert score is None or score < -10, (name, score)
                    for other in nodes:
                        assert scores.get(other.transport._session.daemon._keys_id(), 0) >= 0
            finally:
                for task in attacking:
                    task.cancel()
                for peer in hostile.values():
                    await peer.transport.close()
            print(f"\ndelivery under attack {delivery:.1%}, memory {growth / 2**20:+.1f} MiB")
            assert delivery >= MIN_DELIVERY
            assert growth < MAX_GROWTH_BYTES

    asyncio.run(main())


@pytest.mark.soak
def test_a_node_whose_mesh_twenty_hostile_peers_have_filled_hears_and_is_heard(tmp_path):
    async def main():
        async with honest_nodes(tmp_path, 4) as nodes:
            victim, *others = nodes
            ring = [Hostile(tmp_path, f"ring{number}") for number in range(20)]
            try:
                for peer in ring:
                    await peer.start([victim.transport])
                    await peer.write(victim.transport, peer.graft())
                for other in others:  # the mesh is the ring's by now
                    await other.transport._session.daemon._thread.call(prune, other.transport, victim.transport)
                heard = await spread([victim], others)
                told = await spread(others, [victim], 20)
            finally:
                for peer in ring:
                    await peer.transport.close()
            print(f"\nin a ring of 20: hears {heard:.1%}, is heard {told:.1%}")
            assert heard >= MIN_DELIVERY
            assert told >= MIN_DELIVERY

    async def prune(one, other):
        router = one._session.daemon.topic.router
        for mesh in router.mesh.values():
            mesh.discard(Hostile.peer_of(other))
            router._add_back_off(Hostile.peer_of(other), router._topic, False)

    asyncio.run(main())
