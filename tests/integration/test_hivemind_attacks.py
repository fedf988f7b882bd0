"""Attacks by a peer that runs hivemind's own DHT without our filter."""

import asyncio
import hashlib
import random
import resource
import time
from collections import Counter

import msgpack
import pytest

from protocol.identity import Identity, public_key_of, verify
from protocol.transport.base import MAX_FRAME_BYTES
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.peer_id import peer_bytes_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
LOCAL = HivemindSettings(listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False, auto_nat=False)
KEY, OTHER_KEY = b"shard 0", b"shard 1"
PLACE = int.from_bytes(hashlib.sha1(KEY, usedforsecurity=False).digest(), "big")
DOMAIN = b"test"


def signed(identity, key, expires_at, text=b"here I am"):
    return identity.sign(DOMAIN, key + repr(expires_at).encode() + text) + text


def good(key, owner, value, expires_at, now):
    message = key + repr(expires_at).encode() + value[64:]
    return expires_at <= now + 120 and verify(public_key_of(owner), DOMAIN, message, value[:64])


def packed(key, value):
    return msgpack.packb(bytes([len(key)]) + key + value)


class Attacker:
    """hivemind's `DHTNode` as it is, at a place in the DHT of its choice, under an Ed25519 key as ours."""

    def __init__(self, folder, place):
        self.identity = Identity.create(folder / f"attacker-{place}.pem")
        self.key_file = folder / f"attacker-{place}.p2p"
        self.key_file.write_bytes(bytes.fromhex("08011240") + self.identity.seed + self.identity.public_key)
        self.place = place

    async def join(self, *nodes):
        from hivemind.dht.node import DHTID, DHTNode
        from hivemind.p2p import P2P, PeerID

        addresses = [node.addresses[0] for node in nodes]
        self.p2p = await P2P.create(
            addresses,
            identity_path=str(self.key_file),
            check_if_identity_free=False,
            nat_port_map=False,
            auto_nat=False,
        )
        self.node = await DHTNode.create(self.p2p, node_id=DHTID(self.place), initial_peers=addresses, strict=False,
                                         ensure_bootstrap_success=False)  # fmt: skip
        self.peers = [PeerID(peer_bytes_of(node.node_id)) for node in nodes]
        self.dht_id = DHTID

    async def store(self, key, value, expires_at, subkey=None, in_cache=False):
        """Ask every node it knows to store something; return whether any did."""
        place = self.dht_id(int.from_bytes(hashlib.sha1(key, usedforsecurity=False).digest(), "big"))
        answers = await asyncio.gather(
            *(
                self.node.protocol.call_store(peer, [place], [value], [expires_at], [subkey], in_cache)
                for peer in self.peers
            )
        )
        return any(answer and answer[0] for answer in answers)

    async def end(self):
        await self.node.shutdown()
        await self.p2p.shutdown()


async def swarm(folder, count):
    nodes = [HivemindTransport(Identity.create(folder / f"{number}.pem"), good, LOCAL) for number in range(count)]

    async def echo(asker, request):
        return request

    for node in nodes:
        node.handle("echo", echo, max_request_bytes=MAX_FRAME_BYTES)
        await node.start()
        if node is not nodes[0]:
            await node.connect(nodes[0].addresses[0], timeout_s=20)
    return nodes


async def publish(nodes, key=KEY):
    for node in nodes:
        expires_at = time.time() + 100
        assert await node.store(key, signed(node._identity, key, expires_at), expires_at) == min(8, len(nodes))


async def found(nodes, key=KEY):
    """Return which share of each other the nodes find, and how many others."""
    ids = {node.node_id for node in nodes}
    owners = [{record.owner for record in await node.lookup(key, timeout_s=5)} for node in nodes]
    return sum(len(o & ids) for o in owners) / len(nodes) ** 2, max(len(o - ids) for o in owners)


def test_stores_that_are_refused(tmp_path):
    async def main():
        nodes = await swarm(tmp_path, 3)
        await publish(nodes)
        attacker = Attacker(tmp_path, 12345)
        await attacker.join(*nodes)
        now, me, victim = time.time(), attacker.identity.node_id, nodes[0]
        [theirs] = [r for r in await nodes[1].lookup(KEY, timeout_s=5) if r.owner == victim.node_id]
        in_time, late = now + 100, now + 10_000_000
        mine = packed(KEY, signed(attacker.identity, KEY, in_time))
        from hivemind.dht.storage import DictionaryDHTValue

        dictionary = DictionaryDHTValue()
        dictionary.store(me, mine, in_time)
        attempts = {
            "plain value": attacker.store(KEY, msgpack.packb(b"junk"), late),
            "plain good value": attacker.store(KEY, mine, in_time),
            "far future": attacker.store(KEY, packed(KEY, signed(attacker.identity, KEY, late)), late, me),
            "never": attacker.store(KEY, packed(KEY, signed(attacker.identity, KEY, 1e300)), float("inf"), me),
            "no number": attacker.store(KEY, mine, float("nan"), me),
            "past": attacker.store(KEY, packed(KEY, signed(attacker.identity, KEY, now - 9)), now - 9, me),
            "another's name": attacker.store(KEY, mine, in_time, victim.node_id),
            "another's record": attacker.store(KEY, packed(KEY, theirs.value), theirs.expires_at, victim.node_id),
            "prolonged": attacker.store(KEY, packed(KEY, theirs.value), theirs.expires_at + 50, victim.node_id),
            "no owner": attacker.store(KEY, mine, in_time, "me"),
            "odd subkey": attacker.store(KEY, mine, in_time, 7),
            "another key": attacker.store(OTHER_KEY, mine, in_time, me),
            "unsigned": attacker.store(KEY, packed(KEY, bytes(64) + b"x"), in_time, me),
            "large": attacker.store(KEY, packed(KEY, signed(attacker.identity, KEY, in_time, bytes(961))), in_time, me),
            "huge": attacker.store(KEY, packed(KEY, bytes(2**20)), in_time, me),
            "dictionary": attacker.store(KEY, dictionary, in_time),
            "no value": attacker.store(KEY, b"", in_time, me),
            "odd value": attacker.store(KEY, msgpack.packb([1, 2]), in_time, me),
        }
        for name, attempt in attempts.items():
            assert not await attempt, name
        assert await found(nodes) == (1.0, 0)
        assert await attacker.store(KEY, mine, in_time, me)  # what is its own and right is served as anybody's
        assert await found(nodes) == (1.0, 1)
        assert sum((node.dht_refusals for node in nodes), start=Counter()).total() >= len(attempts)
        await attacker.end()
        for node in nodes:
            await node.close()

    asyncio.run(main())


def test_places_next_to_a_key_are_not_for_the_taking(tmp_path):
    """Five nodes sit next to a key, hold every replica of it for hivemind, and lie: a plain value, or nothing."""

    async def main():
        nodes = await swarm(tmp_path, 6)
        attackers = [Attacker(tmp_path, PLACE ^ number) for number in range(1, 6)]
        for attacker in attackers:
            await attacker.join(*nodes)
            place = attacker.dht_id(PLACE)
            attacker.node.protocol.storage.store(place, msgpack.packb(b"nobody is here"), time.time() + 1e7)
        await publish(nodes)
        assert await found(nodes) == (1.0, 0)
        for node in nodes:
            known = set(node._session.dht.peers())
            assert not known & {attacker.identity.node_id for attacker in attackers}
            assert node.dht_refusals["dht_bad_place"] > 0
        for attacker in attackers:
            await attacker.end()
        for node in nodes:
            await node.close()

    asyncio.run(main())


def test_a_holder_that_lies_in_its_answers(tmp_path):
    """A peer at its rightful place answers lookups with what hivemind would swallow."""

    async def main():
        nodes = await swarm(tmp_path, 3)
        await publish(nodes)
        from protocol.transport.hivemind_dht import dht_id_of_peer

        attacker = Attacker(tmp_path, 1)
        attacker.place = int(dht_id_of_peer(peer_bytes_of(attacker.identity.node_id)))
        await attacker.join(*nodes)
        for node in nodes:
            await node._session.dht.meet(peer_bytes_of(attacker.identity.node_id))
            assert attacker.identity.node_id in node._session.dht.peers()
        from hivemind.dht.storage import DictionaryDHTValue
        from hivemind.proto import dht_pb2
        from hivemind.utils import MSGPackSerializer

        late = time.time() + 1e7
        crowd = DictionaryDHTValue()
        rng = random.Random(0)
        for _ in range(5000):
            crowd.store(rng.randbytes(16).hex(), msgpack.packb(rng.randbytes(64)), late)
        mixed = DictionaryDHTValue()
        expires_at = time.time() + 100
        mixed.store(attacker.identity.node_id, packed(KEY, signed(attacker.identity, KEY, expires_at)), expires_at)
        mixed.store(nodes[0].node_id, packed(KEY, bytes(100)), late)
        mixed.store(7, b"x", late)
        lies = {
            "plain": (dht_pb2.FOUND_REGULAR, msgpack.packb(b"junk"), late, 0),
            "5,000 subkeys": (dht_pb2.FOUND_DICTIONARY, MSGPackSerializer.dumps(crowd), late, 0),
            "large": (dht_pb2.FOUND_DICTIONARY, msgpack.packb([[]] * 3_000_000), late, 0),
            "many empty lists": (dht_pb2.FOUND_DICTIONARY, msgpack.packb([[]] * 250_000), late, 0),
            "no message pack": (dht_pb2.FOUND_DICTIONARY, b"\xc1" * 100, late, 0),
            "deep": (dht_pb2.FOUND_DICTIONARY, b"\x91" * 100_000 + b"\x90", late, 0),
            "no dictionary": (dht_pb2.FOUND_DICTIONARY, msgpack.packb(1), late, 0),
            "some good": (dht_pb2.FOUND_DICTIONARY, MSGPackSerializer.dumps(mixed), float("nan"), 1),
        }
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, (kind, value, claimed_expiration, num_good) in lies.items():

            async def lie(request, context, kind=kind, value=value, expires_at=claimed_expiration):
                result = dht_pb2.FindResult(type=kind, value=value, expiration_time=expires_at)
                result.nearest_node_ids.extend([b"x", bytes(20)])
                result.nearest_peer_ids.extend([b"", b"y" * 38])
                return dht_pb2.FindResponse(results=[result], peer=attacker.node.protocol.node_info)

            async def handle(data, peer, lie=lie):
                return (await lie(None, None)).SerializeToString()

            attacker.p2p._client.control.unary_handlers["DHTProtocol.rpc_find"] = handle
            assert await found(nodes) == (1.0, num_good), name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000  # KiB; the attacker is in it too
        await attacker.end()
        for node in nodes:
            await node.close()

    asyncio.run(main())
