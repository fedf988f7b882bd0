import asyncio
import hashlib
import random

import pytest
from _swarm import identity_of

from protocol.about import NodeAbout
from protocol.identity import Identity
from protocol.limits import NODE_RECORD_TTL_S
from protocol.messages import NodeRecord
from protocol.own_record import sign_own_record
from protocol.shards import MAX_SHARD_DEPTH, SHARD_ROOM, Shards, path_of, record_validator, shard_key
from protocol.transport import virtual_time
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport

NOW_S = 1_800_000_000.0
TTL_S = NODE_RECORD_TTL_S
ABOUT = NodeAbout("trainer", "swarm-node/0.1.0", "tiny", ())
IDENTITY = identity_of(1)


def signed(identity: Identity = IDENTITY, swarm_id: str = "main", created_at_s: float = NOW_S) -> NodeRecord:
    network = MemoryNetwork(random.Random(0))
    transport = MemoryTransport(network, identity.node_id, record_validator(swarm_id))
    return sign_own_record(identity, transport, swarm_id, ABOUT, int(created_at_s * 1000))


def own_key(salt: int = 0, depth: int = 0, swarm_id: str = "main") -> bytes:
    return shard_key(swarm_id, salt, depth, path_of(IDENTITY.node_id, salt))


@pytest.mark.parametrize("salt", [0, 1])
@pytest.mark.parametrize("depth", [0, 1, 7, MAX_SHARD_DEPTH])
def test_an_owner_may_write_every_shard_on_its_path(salt, depth):
    is_valid = record_validator("main")
    assert is_valid(own_key(salt, depth), IDENTITY.node_id, signed().encoded, NOW_S + TTL_S, NOW_S)


def test_everything_else_is_refused():
    is_valid = record_validator("main")
    value, owner, expires_at = signed().encoded, IDENTITY.node_id, NOW_S + TTL_S
    key = own_key()
    good = (key, owner, value, expires_at, NOW_S)
    assert is_valid(*good)
    path = path_of(owner, 0)
    flipped = bytes([value[5] ^ 1])
    bad = {
        "another path": (shard_key("main", 0, 4, path ^ 0x8000), owner, value, expires_at, NOW_S),
        "another salt": (shard_key("main", 2, 0, path), owner, value, expires_at, NOW_S),
        "too deep": (key[:17] + b"\x11" + key[18:], owner, value, expires_at, NOW_S),
        "a prefix with bits below its depth": (key[:18] + b"\x00\x01", owner, value, expires_at, NOW_S),
        "another swarm's key": (own_key(swarm_id="other"), owner, value, expires_at, NOW_S),
        "another swarm's record": (key, owner, signed(swarm_id="other").encoded, expires_at, NOW_S),
        "no key of ours": (b"rollouts", owner, value, expires_at, NOW_S),
        "another owner": (key, identity_of(2).node_id, value, expires_at, NOW_S),
        "no owner": (key, "nobody", value, expires_at, NOW_S),
        "no record": (key, owner, b"plain value", expires_at, NOW_S),
        "nothing": (key, owner, b"", expires_at, NOW_S),
        "another's record": (key, owner, signed(identity_of(2)).encoded, expires_at, NOW_S),
        "an altered record": (key, owner, value[:5] + flipped + value[6:], expires_at, NOW_S),
        "too large": (key, owner, value + bytes(1024), expires_at, NOW_S),
        "far future": (key, owner, value, NOW_S + 10**9, NOW_S),
        "longer than its time allows": (key, owner, value, NOW_S + TTL_S + 2, NOW_S),
        "shorter than its time says": (key, owner, value, NOW_S + TTL_S - 2, NOW_S),
        "expired": (key, owner, value, NOW_S + TTL_S, NOW_S + TTL_S),
        "an old one with a new expiration": (key, owner, value, NOW_S + TTL_S + 100, NOW_S + 100),
        "from the future": (key, owner, signed(created_at_s=NOW_S + 100).encoded, NOW_S + 100 + TTL_S, NOW_S),
    }
    for what, arguments in bad.items():
        assert not is_valid(*arguments), what
        assert is_valid(*good), f"after {what}"


@pytest.mark.parametrize("num_nodes", [2, 100])
def test_shards_stay_small_and_readers_find_the_swarm(num_nodes):
    async def main() -> None:
        clock = virtual_time.virtual_clock()
        network = MemoryNetwork(random.Random(0), Faults(latency_s=(0, 0)), clock)
        validator = record_validator("main")
        nodes: list[tuple[Identity, MemoryTransport, Shards]] = []
        sizes: list[int] = []

        async def publish(identity: Identity, transport: MemoryTransport, shards: Shards) -> None:
            await shards.place(lambda record, salt: None)
            record = sign_own_record(identity, transport, "main", ABOUT, int(clock() * 1000))
            assert await shards.publish(record) >= min(num_nodes, 2) - 1

        for number in range(num_nodes):
            identity = identity_of(number)
            transport = MemoryTransport(network, identity.node_id, validator)
            await transport.start()
            nodes.append((identity, transport, Shards(transport, "main", timeout_s=5, rng=random.Random(number))))
            await publish(*nodes[-1])
        # Who comes later with a better rank makes a shard too full, until the others look again.
        await asyncio.sleep(TTL_S / 2)
        for node in nodes:
            await publish(*node)
        await asyncio.sleep(0.6 * TTL_S)
        for salt in (0, 1):
            for depth in range(7):
                for path in range(0, 1 << 16, 1 << (16 - depth)):
                    sizes.append(len(await transport.lookup(shard_key("main", salt, depth, path), timeout_s=5)))
        assert sum(sizes) == 2 * num_nodes
        assert max(sizes) <= 2 * SHARD_ROOM  # some were pushed down after others had looked
        reader = Shards(transport, "main", timeout_s=5, rng=random.Random(0))
        seen = set[str]()
        await reader.place(lambda record, salt: seen.add(record.node_id))
        for turn in range(60):
            await reader.read(turn % 2, lambda record, salt: seen.add(record.node_id))
        assert len(seen) >= 0.5 * num_nodes

    virtual_time.run(main())


def test_a_flooded_shard_pushes_others_deeper_and_hides_nobody():
    async def main() -> None:
        clock = virtual_time.virtual_clock()
        network, validator = MemoryNetwork(random.Random(0), clock=clock), record_validator("main")

        async def join(number: int) -> Shards:
            identity = identity_of(number)
            transport = MemoryTransport(network, identity.node_id, validator)
            await transport.start()
            shards = Shards(transport, "main", timeout_s=5, rng=random.Random(number))
            record = sign_own_record(identity, transport, "main", ABOUT, int(clock() * 1000))
            if number >= 1000:  # floods the root of the first trie, whoever else stands there
                await transport.store(shard_key("main", 0, 0, 0), record.encoded, record.created_at_ms / 1000 + TTL_S)
            else:
                await shards.place(lambda record, salt: None)
                await shards.publish(record)
            return shards

        await asyncio.gather(*(join(number) for number in range(1000, 1100)))
        honest = [await join(number) for number in range(8)]
        assert max(shards.depths[0] or 0 for shards in honest) >= 1
        assert [shards.depths[1] for shards in honest] == [0] * 8
        seen = set[str]()
        await honest[0].place(lambda record, salt: seen.add(record.node_id))
        for turn in range(20):
            await honest[0].read(turn % 2, lambda record, salt: seen.add(record.node_id))
        assert {identity_of(number).node_id for number in range(8)} <= seen

    virtual_time.run(main())


def test_reading_a_crowded_shard_tells_of_few_and_hides_nobody():
    async def main() -> None:
        clock = virtual_time.virtual_clock()
        network, validator = MemoryNetwork(random.Random(0), clock=clock), record_validator("main")
        key, names = shard_key("main", 0, 0, 0), set[str]()
        for number in range(100):
            identity = identity_of(number)
            transport = MemoryTransport(network, identity.node_id, validator)
            await transport.start()
            record = sign_own_record(identity, transport, "main", ABOUT, int(clock() * 1000))
            await transport.store(key, record.encoded, record.created_at_ms / 1000 + TTL_S)
            names.add(identity.node_id)
        by_rank = sorted(names, key=lambda name: hashlib.sha256(key + name.encode()).digest())
        shards = Shards(transport, "main", timeout_s=5, rng=random.Random(0))
        seen = set[str]()
        for _ in range(60):
            told: list[str] = []
            await shards.read(0, lambda record, salt, told=told: told.append(record.node_id))
            assert len(told) == len(set(told)) == 2 * SHARD_ROOM
            assert set(by_rank[:SHARD_ROOM]) <= set(told)
            seen.update(told)
        assert seen == names

    virtual_time.run(main())
