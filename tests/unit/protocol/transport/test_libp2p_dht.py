"""The DHT of the transport libp2p, over calls within the process: many nodes, nodes that end, nodes that lie."""

import asyncio
import random

import pytest

from protocol.transport.base import ClockSkewed, Record, RequestRefused
from protocol.transport.libp2p_dht import NUM_REPLICAS
from protocol.transport.libp2p_dht_messages import (
    FIND,
    MAX_FIND_RESPONSE_BYTES,
    DhtRefused,
    Find,
    Found,
    Meet,
    Store,
)
from protocol.transport.libp2p_routing import NUM_NEIGHBOURS, RoutingTable, place_of_key, place_of_node
from protocol.transport.peer_id import peer_bytes_of
from tests.unit.protocol.transport.dht_network import ADDRESS, NOW, Network, node


def owners(records):
    return {record.owner for record in records}


def test_what_one_stores_all_find_and_others_take_the_places_of_those_that_end():
    async def main():
        network = Network(60)
        await network.meet_all()
        nodes = list(network.nodes.values())
        for number, dht in enumerate(nodes[:5]):
            assert await dht.store(b"key", b"%d" % number, NOW + 100) == NUM_REPLICAS
        for dht in nodes:
            assert owners(await dht.lookup(b"key", 5)) == {node(number) for number in range(5)}
        network.dead = set(random.Random(0).sample(list(network.nodes)[5:], 20))
        for dht in nodes[:5]:
            assert await dht.store(b"key", b"again", NOW + 200) == NUM_REPLICAS
        found = await nodes[4].lookup(b"key", 5)
        assert {(record.owner, record.value) for record in found} == {(node(n), b"again") for n in range(5)}

    asyncio.run(main())


def test_a_record_comes_from_its_owner_and_is_believed_if_it_is_good():
    async def main():
        network = Network(3, is_good=lambda key, owner, value, expires_at, now: value == b"good")
        await network.meet_all()
        a, b, c = network.nodes.values()
        with pytest.raises(ValueError, match="validator"):
            await a.store(b"key", b"bad", NOW + 100)
        assert await a.store(b"key", b"good", NOW + 100) == 3
        assert await b.handle_store(node(2), Store(b"key", b"bad", NOW + 100).encode()) == Store.encode_answer(False)
        assert b.refusals["dht_bad_record"] == 1
        lie = Found([], [Record(node(9), b"bad", NOW + 100), Record(node(8), b"good", NOW + 9e9)])
        network.lies[node(1)] = {FIND: lie.encode()}
        assert owners(await c.lookup(b"key", 5)) == {node(0)}
        network.lies[node(1)] = {FIND: b"nonsense"}
        assert owners(await c.lookup(b"key", 5)) == {node(0)}
        assert c.refusals["dht_bad_response"] == 1

    asyncio.run(main())


def test_nodes_that_only_hearsay_knows_cost_a_try_and_no_more():
    async def main():
        network = Network(3)
        await network.meet_all()
        ghosts = [(node(1000 + number), ADDRESS) for number in range(NUM_NEIGHBOURS)]
        network.lies[node(1)] = {FIND: Found(ghosts, []).encode()}
        dht = network.nodes[node(2)]
        assert await dht.store(b"key", b"value", NOW + 100) == 3
        assert not {ghost for ghost, _ in ghosts} & set(dht.peers())

    asyncio.run(main())


@pytest.mark.parametrize(("offset_s", "side"), [(-61, "behind"), (61, "ahead of")])
def test_clocks_that_differ_are_said_and_such_nodes_not_remembered(offset_s, side):
    async def main():
        network = Network(2)
        network.offsets[node(1)] = offset_s
        with pytest.raises(ClockSkewed, match=side):
            await network.nodes[node(0)].meet(peer_bytes_of(node(1)))
        assert network.nodes[node(0)].peers() == network.nodes[node(1)].peers() == []

    asyncio.run(main())


def test_a_request_that_is_none_is_refused():
    async def main():
        dht = Network(1).nodes[node(0)]
        for handle in (dht.handle_meet, dht.handle_find, dht.handle_store):
            for payload in (b"", b"\xc1", b"\x90", b"\x92\x01\x02", b"\x93\x01\x02\x03", bytes(1000)):
                with pytest.raises(RequestRefused, match="dht_bad_request"):
                    await handle(node(1), payload)
        assert dht.refusals["dht_bad_request"] == 18

    asyncio.run(main())


def test_messages_come_back_as_they_were_and_the_largest_fits():
    addresses = tuple(f"/ip4/192.0.2.{number}/tcp/7000/" + "x" * 230 for number in range(8))
    meet, find, store = Meet(5, addresses), Find(2**256 - 1, b"k" * 64), Store(b"k", bytes(1024), NOW)
    for message in (meet, find, store):
        assert type(message).decode(message.encode()) == message
    found = Found([(node(n), addresses) for n in range(20)], [Record(node(n), bytes(1024), NOW) for n in range(256)])
    assert Found.decode(found.encode()) == found
    assert len(found.encode()) <= MAX_FIND_RESPONSE_BYTES
    with pytest.raises(DhtRefused):
        Found.decode(Found([(node(n), ()) for n in range(21)], []).encode())


def test_a_bucket_keeps_those_that_were_there_first():
    table = RoutingTable(node(0))
    far = [node(n) for n in range(1, 2000) if (place_of_node(node(n)) ^ place_of_node(node(0))).bit_length() == 256]
    for other in far:
        table.add(other, ADDRESS)
    assert table.ids() == far[:NUM_NEIGHBOURS]
    table.drop(far[0])
    table.add(far[-1], ADDRESS)
    assert table.ids() == [*far[1:NUM_NEIGHBOURS], far[-1]]
    place = place_of_key(b"key")
    assert [n for n, _ in table.nearest(place, 3)] == sorted(table.ids(), key=lambda n: place_of_node(n) ^ place)[:3]
