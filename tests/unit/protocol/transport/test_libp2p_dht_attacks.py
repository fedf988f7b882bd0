"""Attacks on the DHT of the transport libp2p by nodes that speak its protocol, in virtual time."""

import asyncio
import math
import random
import tracemalloc

import msgpack
import pytest

from protocol.identity import Identity, node_id_of, public_key_of, verify
from protocol.transport import virtual_time
from protocol.transport.base import ClockSkewed, Record, RequestRefused
from protocol.transport.libp2p_dht import CALL_TIMEOUT_S, MAX_SILENT
from protocol.transport.libp2p_dht_messages import FIND, STORE, Find, Found, Store
from protocol.transport.libp2p_routing import NUM_NEIGHBOURS, place_of_node
from protocol.transport.peer_id import peer_bytes_of
from protocol.transport.records import MAX_KEYS_PER_OWNER, MAX_RECORDS_PER_KEY
from protocol.transport.virtual_time import virtual_clock
from tests.unit.protocol.transport.dht_network import NOWHERE, Network, node

KEY, OTHER_KEY, DOMAIN = b"shard 0", b"shard 1", b"test"
LOOKUP_S = 5.0


def signed(identity, key, expires_at, text=b"here I am"):
    return identity.sign(DOMAIN, key + repr(expires_at).encode() + text) + text


def good(key, owner, value, expires_at, now):
    message = key + repr(expires_at).encode() + value[64:]
    return expires_at <= now + 120 and verify(public_key_of(owner), DOMAIN, message, value[:64])


async def share_found(network, honest, key=KEY):
    """How much of each other honest nodes find within a lookup's time, and how long the longest takes."""
    loop, num_found, longest_s = asyncio.get_running_loop(), 0, 0.0
    for own in honest:
        start_s = loop.time()
        records = await network.nodes[own].lookup(key, LOOKUP_S)
        longest_s = max(longest_s, loop.time() - start_s)
        num_found += len({record.owner for record in records} & set(honest))
    return num_found / len(honest) ** 2, longest_s


def ghosts_near(rng):
    """Answer every question with nodes that are not there, nearer to what was asked for than anybody who is."""

    def lie(asker, payload):
        place = Find.decode(payload).place
        ids = sorted((node_id_of(rng.randbytes(32)) for _ in range(400)), key=lambda one: place_of_node(one) ^ place)
        return Found([(ghost, NOWHERE) for ghost in ids[:NUM_NEIGHBOURS]], []).encode()

    return lie


@pytest.mark.parametrize("num_liars", [4, 12])
def test_nodes_that_name_nobody_who_is_there_delay_no_lookup(num_liars):
    """A third of the DHT names twenty nodes in each answer that do not exist, and are tried in vain for seconds."""

    async def main():
        network = Network(36, now=virtual_clock())
        await network.meet_all()
        honest, liars = list(network.nodes)[num_liars:], list(network.nodes)[:num_liars]
        rng = random.Random(0)
        network.lies = {liar: {FIND: ghosts_near(rng), STORE: Store.encode_answer(True)} for liar in liars}
        loop = asyncio.get_running_loop()
        start_s, expires_at = loop.time(), virtual_clock()() + 300
        stores = [network.nodes[own].store(KEY, b"value", expires_at) for own in honest]
        assert min(await asyncio.gather(*stores)) > 0
        longest_s = loop.time() - start_s
        found, lookup_s = await share_found(network, honest)
        assert found >= 0.95
        assert lookup_s <= LOOKUP_S
        # Each liar is believed four times, four are tried at one time; from then on it is not.
        assert longest_s <= num_liars * CALL_TIMEOUT_S + 1
        again_s, start_s = 0.0, loop.time()
        for own in honest:
            await network.nodes[own].lookup(KEY, 60)
            again_s, start_s = max(again_s, loop.time() - start_s), loop.time()
        assert again_s < CALL_TIMEOUT_S
        for own in honest:
            dht = network.nodes[own]
            assert dht.refusals["dht_misled"] <= 2 * num_liars
            assert set(dht.peers()) <= set(network.nodes)
            assert len(dht._silent) <= MAX_SILENT
            assert set(dht._misled_until) <= set(liars)

    virtual_time.run(main())


def test_nodes_that_have_ended_cost_nobody_who_names_them_its_word_for_long():
    """Half of the DHT is gone at once, as after a power cut: what is left finds each other."""

    async def main():
        network = Network(60, now=virtual_clock())
        await network.meet_all()
        ids = list(network.nodes)
        network.dead = set(random.Random(1).sample(ids, 30))
        honest = [one for one in ids if one not in network.dead]
        for own in honest:
            assert await network.nodes[own].store(KEY, b"value", virtual_clock()() + 300) == 8
        assert (await share_found(network, honest))[0] >= 0.95

    virtual_time.run(main())


def test_stores_that_are_refused(tmp_path):
    async def main():
        clock = virtual_clock()
        people = [Identity.create(tmp_path / f"{number}.pem") for number in range(4)]
        attacker, victim = people[3].node_id, people[0].node_id
        network = Network([one.node_id for one in people], good, clock)
        await network.meet_all()
        now = clock()
        in_time, late = now + 100, now + 10_000_000
        for one in people[:3]:
            assert await network.nodes[one.node_id].store(KEY, signed(one, KEY, in_time), in_time) == 4
        mine, theirs = signed(people[3], KEY, in_time), signed(people[0], KEY, in_time)
        attempts = {
            "far future": (KEY, signed(people[3], KEY, late), late),
            "never": (KEY, signed(people[3], KEY, float("inf")), float("inf")),
            "no number": (KEY, mine, float("nan")),
            "past": (KEY, signed(people[3], KEY, now - 9), now - 9),
            "another's record": (KEY, theirs, in_time),
            "prolonged": (KEY, mine, in_time + 10),
            "another key": (OTHER_KEY, mine, in_time),
            "unsigned": (KEY, bytes(64) + b"x", in_time),
            "large": (KEY, signed(people[3], KEY, in_time, bytes(961)), in_time),
            "empty": (KEY, b"", in_time),
        }
        dht = network.nodes[victim]
        outcomes = {}
        for name, (key, value, expires_at) in attempts.items():
            try:
                answer = await dht.handle_store(attacker, msgpack.packb([key, value, expires_at]))
                outcomes[name] = "held" if Store.decode_answer(answer) else "not held"
            except RequestRefused as refused:
                outcomes[name] = refused.code
        assert set(outcomes.values()) <= {"not held", "dht_bad_request"}, outcomes
        assert dht.refusals["dht_bad_record"] + dht.refusals["dht_bad_request"] == len(attempts)
        honest = [one.node_id for one in people[:3]]
        assert await share_found(network, honest) == (1.0, 0.0)
        lie = Found([], [Record(attacker, value, expires_at) for key, value, expires_at in attempts.values()
                         if len(value) <= 1024 and math.isfinite(expires_at)])  # fmt: skip
        network.lies[attacker] = {FIND: lie.encode()}
        for own in honest:
            assert {record.owner for record in await network.nodes[own].lookup(KEY, LOOKUP_S)} == set(honest)

    virtual_time.run(main())


def test_floods_of_stores_drive_nobody_out_and_memory_stays_flat():
    """More owners under a key than it has room for, and more keys of one owner: first come, first kept."""

    async def main():
        clock = virtual_clock()
        network = Network(12, now=clock)
        await network.meet_all()
        honest, target = list(network.nodes), network.nodes[node(3)]
        for own in honest:
            assert await network.nodes[own].store(KEY, b"value", clock() + 300) == 8
        floods = [node(1000 + number) for number in range(1500)]

        async def flood():
            expires_at = clock() + 500
            for dht in network.nodes.values():
                for owner in floods:
                    await dht.handle_store(owner, Store(KEY, bytes(1000), expires_at).encode())
                for number in range(200):
                    store = Store(b"%d" % number, bytes(1000), expires_at)
                    await dht.handle_store(floods[0], store.encode())

        await flood()
        assert len(target._held) <= MAX_RECORDS_PER_KEY + MAX_KEYS_PER_OWNER
        assert (await share_found(network, honest))[0] >= 0.95
        tracemalloc.start()
        try:
            for _ in range(3):
                await flood()
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert grown < 2**20
        assert target.refusals["dht_full"] > 1000

    virtual_time.run(main())


@pytest.mark.parametrize("offset_s", [-1e8, -61, 61, 1e8])
def test_nodes_with_other_clocks_are_in_no_table_and_hide_nothing(offset_s):
    async def main():
        clock = virtual_clock()
        network = Network(15, now=clock)
        honest, liars = list(network.nodes), [node(number) for number in range(100, 105)]
        for liar in liars:
            network.offsets[liar] = offset_s
            network.add(liar)
        for other in honest[1:]:
            await network.nodes[other].meet(peer_bytes_of(honest[0]))
        for liar in liars:
            with pytest.raises(ClockSkewed):
                await network.nodes[liar].meet(peer_bytes_of(honest[0]))
        for own in honest:
            await network.nodes[own].fill_routing_table()
            assert await network.nodes[own].store(KEY, b"value", clock() + 300) == 8
        assert (await share_found(network, honest))[0] == 1.0
        assert not {peer for own in honest for peer in network.nodes[own].peers()} & set(liars)

    virtual_time.run(main())
