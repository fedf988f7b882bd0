"""Attacks by a peer that runs hivemind's own DHT without our filter, or writes to a stream what it likes."""

import asyncio
import hashlib
import random
import resource
import time
from collections import Counter

import msgpack
import pytest

from protocol.identity import Identity, public_key_of, verify
from protocol.transport import pace
from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable, ResponseTooLarge
from protocol.transport.hivemind import STREAM_PROTOCOL, HivemindSettings, HivemindTransport
from protocol.transport.peer_id import peer_bytes_of
from protocol.transport.peer_streams import MAX_STREAMS_PER_PEER

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


def begin(number, size, content=b"", name=b"echo"):
    """A REQUEST that announces a body of so many bytes."""
    head = size.to_bytes(4, "big") + (2**22).to_bytes(4, "big") + bytes([len(name)]) + name + content
    return b"\x01" + number.to_bytes(4, "big") + len(head).to_bytes(2, "big") + head


def frame(kind, number, content=b""):
    return bytes([kind]) + number.to_bytes(4, "big") + len(content).to_bytes(2, "big") + content


def test_streams_that_do_not_keep_to_the_framing(tmp_path, monkeypatch):
    """Silent, slow, wrong and boundless: each is cut off and counted, and a neighbour notices nothing."""
    monkeypatch.setattr(pace, "GRACE_S", 0.5)

    async def main():
        victim, attacker, neighbour = await swarm(tmp_path, 3)
        peer = peer_bytes_of(victim.node_id)

        async def attack(data, every_s=None):
            """Return what comes back until the victim ends the stream."""
            reader, writer = await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL)
            answering = asyncio.create_task(reader.read())
            for piece in [data] if every_s is None else [data[i : i + 10] for i in range(0, len(data), 10)]:
                writer.write(piece)
                if every_s is not None and (await asyncio.wait({answering}, timeout=every_s))[0]:
                    break
            answer = await asyncio.wait_for(answering, 10)
            writer.close()
            return answer

        good = begin(1, 1, b"x")
        attacks = {
            "too_slow": [
                attack(b""),
                attack(good[:5]),
                attack(good[:-1]),
                attack(begin(1, 9999, bytes(2000))),
                attack(begin(1, 9999, bytes(9999)), every_s=0.1),
            ],
            "bad_framing": [
                attack(b"\0" * 7),
                attack(b"\xff" * 50),
                attack(begin(1, 0, name=b"ECHO")),
                attack(begin(1, 0, name=b"")),
                attack(begin(1, 2**32 - 1)),
                attack(begin(1, 4 * 2**20 + 1)),
                attack(begin(1, 9, b"crumb")),
                attack(begin(1, 9, bytes(10))),
                attack(frame(4, 1, bytes(10))),
                attack(frame(2, 1, bytes(10))),
                attack(frame(3, 1)),
                attack(begin(2, 9999, bytes(2000)) + begin(2, 1, b"x")),
                attack(begin(2, 9999, bytes(2000)) + begin(1, 1, b"x")),
                attack(begin(1, 9999, bytes(2000)) + frame(4, 1, bytes(8000))),
                attack(begin(1, 9999, bytes(2000)) + frame(3, 1) + frame(3, 1)),
                attack(begin(1, 9999, bytes(2000)) + frame(3, 1) + frame(4, 1, bytes(2000))),
            ],
            "too_many_requests": [attack(b"".join(begin(n, 9999, bytes(2000)) for n in range(1, 40)))],
        }
        for reason, attempts in attacks.items():
            began = time.monotonic()
            before = victim.broken_streams[reason]
            for attempt in attempts:
                await attempt
                answer = await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5)
                assert answer == b"x"
            assert victim.broken_streams[reason] - before == len(attempts), (reason, victim.broken_streams)
            assert time.monotonic() - began < 20

        # It opens streams and says nothing: each replaces one that it had before.
        many = [await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL) for _ in range(50)]
        async with asyncio.timeout(20):
            while victim.broken_streams["too_many_streams"] < 50 - MAX_STREAMS_PER_PEER:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert victim._session.streams.num_taken <= 1 + MAX_STREAMS_PER_PEER
        assert await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5) == b"x"
        for _, writer in many:
            writer.close()
        assert neighbour.broken_streams.total() == 0
        for node in (victim, attacker, neighbour):
            await node.close()

    asyncio.run(main())


def test_a_peer_that_asks_for_much_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.5)
    monkeypatch.setattr(pace, "MIN_BYTES_PER_S", 64 * 2**20)

    async def main():
        victim, attacker, neighbour = await swarm(tmp_path, 3)
        peer = peer_bytes_of(victim.node_id)
        before = victim.traffic.bytes_out
        reader, writer = await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL)
        reader._transport.pause_reading()
        for number in range(1, 9):
            writer.write(begin(number, 2**20, bytes(60_000)))
            for size in [60_000] * 16 + [2**20 - 17 * 60_000]:
                writer.write(frame(4, number, bytes(size)))
            await writer.drain()
        for _ in range(50):
            assert await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5) == b"x"
        async with asyncio.timeout(20):
            while not victim.broken_streams["too_slow"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert victim.traffic.bytes_out - before < 8 * 2**20  # the rest was never sent, and is not kept
        writer.transport.abort()
        for node in (victim, attacker, neighbour):
            await node.close()

    asyncio.run(main())


def test_responses_that_do_not_keep_to_the_framing(tmp_path):
    """A peer answers what it likes: nothing beyond the cap is kept, and the asker hears one kind of error."""

    async def main():
        asker, liar = await swarm(tmp_path, 2)
        answers = {
            frame(2, 1, (2**32 - 1).to_bytes(4, "big")): PeerUnreachable,
            frame(2, 1, (101).to_bytes(4, "big")): ResponseTooLarge,
            frame(2, 1, (101).to_bytes(4, "big") + bytes(101)): PeerUnreachable,
            frame(2, 1, (9).to_bytes(4, "big") + bytes(10)): PeerUnreachable,
            frame(2, 1, (9).to_bytes(4, "big") + b"abc"): PeerUnreachable,
            frame(2, 2, bytes(4)): PeerUnreachable,
            frame(4, 1, b"abc"): PeerUnreachable,
            frame(5, 1, b"\x03Bad!"): PeerUnreachable,
            frame(5, 1, b"\x03bad\xff\xff"): PeerUnreachable,
            frame(6, 1): PeerUnreachable,
            frame(7, 2): PeerUnreachable,
            b"\xff" * 9: PeerUnreachable,
            b"": PeerUnreachable,
        }
        for answer, expected in answers.items():

            async def lie(asker, reader, writer, answer=answer):
                await reader.read(5)
                writer.write(answer)
                await writer.drain()
                await asyncio.wait({asyncio.create_task(reader.read())}, timeout=0 if answer == b"" else 5)
                writer.close()

            liar._session.streams.take = lie
            with pytest.raises(expected) as error:
                await asker.request(liar.node_id, "echo", b"", max_response_bytes=100, timeout_s=5)
            assert type(error.value) is expected, answer
            asker._session.streams.end_peer(liar.node_id)
        await asker.close()
        await liar.close()

    asyncio.run(main())
