"""The directory abused: records that lie and flood, keys that nobody gives, and both at once."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from _attacker import ABOUT, Attacker, attack
from _swarm import Swarm, identity_of

from protocol.identity import Identity
from protocol.limits import NODE_RECORD_TTL_S
from protocol.own_record import sign_own_record
from protocol.shards import NUM_SALTS, Shards, path_of, record_validator, shard_key
from protocol.transport import libp2p_dht, libp2p_walk, memory_network, virtual_time
from protocol.transport.base import Record
from protocol.transport.libp2p_dht_messages import STORE, Store
from protocol.transport.libp2p_routing import place_of_key, place_of_node
from protocol.transport.memory import MemoryTransport
from protocol.transport.memory_network import MemoryNetwork
from protocol.transport.peer_id import peer_id_of
from protocol.transport.virtual_time import virtual_clock
from tests.unit.protocol.transport.dht_network import ADDRESS, Network


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


@pytest.mark.no_cover
def test_an_abused_directory_hides_nobody():
    async def main() -> None:
        swarm = Swarm()
        attacker = await attack(swarm)
        clock, owner = virtual_clock(), attacker.identity.node_id
        value = attacker.record().encoded
        path = path_of(owner, 0)
        for salt in (0, 1):
            for depth in range(17):
                for far_s in (NODE_RECORD_TTL_S, 10**9):
                    await attacker.transport.store(
                        shard_key("main", salt, depth, path_of(owner, salt)), value, clock() + far_s
                    )
            await attacker.transport.store(shard_key("main", salt, 0, path), b"a plain value", clock() + 10**9)
        sybils = [await attack(swarm, 30_000 + number) for number in range(10)]
        for sybil in sybils:
            for salt in (0, 1):
                expires_at = sybil.record().created_at_ms / 1000 + NODE_RECORD_TTL_S
                await sybil.transport.store(shard_key("main", salt, 0, 0), sybil.record().encoded, expires_at)
        honest = [await swarm.add(peers=()) for _ in range(20)]
        for number, node in enumerate(honest):  # each knows one other: the sybils are in the DHT alone
            node.member.neighbours.given = {honest[number - 1].address: "not tried yet"}
        await asyncio.sleep(1200)
        names = {node.id for node in honest}
        found = [len({k.record.node_id for k in node.member.directory.nodes()} & names) / 19 for node in honest]
        assert sum(found) / len(found) >= 0.95
        assert min(len({link.node_id for link in node.member.neighbours.outbound()} & names) for node in honest) >= 1
        await swarm.close()

    simulate(main())


def test_eclipsed_keys_isolate_nobody():
    async def main() -> None:
        swarm = Swarm()
        honest = [await swarm.add() for _ in range(12)]
        await asyncio.sleep(60)
        eclipsed = shard_key("main", 0, 0, 0)
        real = MemoryTransport.lookup

        async def blind(self: MemoryTransport, key: bytes, *, timeout_s: float) -> Any:
            return [] if key == eclipsed else await real(self, key, timeout_s=timeout_s)

        MemoryTransport.lookup = blind  # type: ignore[method-assign]
        try:
            late = await swarm.add(peers=(honest[0].address,))
            await asyncio.sleep(120)
            names = {node.id for node in honest}
            assert len({known.record.node_id for known in late.member.directory.nodes()} & names) >= 0.95 * 12
        finally:
            MemoryTransport.lookup = real  # type: ignore[method-assign]
        await swarm.close()

    simulate(main())


class Blind(dict[bytes, Any]):
    """What a hostile node holds for others: it takes every record and has none, but those of its own crowd."""

    def __init__(self, crowd: dict[bytes, dict[str, Record]]) -> None:
        self._crowd = crowd

    def setdefault(self, key: bytes, default: Any = None) -> Any:
        return {}

    def get(self, key: bytes, default: Any = None) -> Any:
        return dict(self._crowd.get(key, {}))


def keys_of(max_depth: int) -> list[bytes]:
    """The keys of the shards that a small swarm writes to."""
    return [
        shard_key("main", salt, depth, prefix << 16 - depth)
        for salt in range(NUM_SALTS)
        for depth in range(max_depth + 1)
        for prefix in range(2**depth)
    ]


class MemoryNodes:
    """Nodes on the transport `memory`. Places are on a ring: what is next to a key is behind it."""

    def __init__(self) -> None:
        self._network = MemoryNetwork(random.Random(0), clock=virtual_clock())

    @staticmethod
    def distance(key: bytes, identity: Identity) -> int:
        place, start = memory_network._place(identity.node_id.encode()), memory_network._place(key)
        return int.from_bytes(place) - int.from_bytes(start) & 2**128 - 1

    async def add(self, identity: Identity) -> Any:
        transport = MemoryTransport(self._network, identity.node_id, record_validator("main"))
        await transport.start()
        return transport

    async def add_hostile(self, identity: Identity) -> None:
        hostile = MemoryTransport(self._network, identity.node_id, lambda *record: True)
        await hostile.start()
        hostile._records = Blind({})

    async def join(self) -> None:
        """Everybody knows everybody."""


class Libp2pNodes:
    """Nodes of libp2p's own DHT."""

    def __init__(self) -> None:
        self._network = Network(is_good=record_validator("main"), now=virtual_clock())

    @staticmethod
    def distance(key: bytes, identity: Identity) -> int:
        return place_of_node(identity.node_id) ^ place_of_key(key)

    async def add(self, identity: Identity) -> Any:
        dht = self._network.add(identity.node_id)

        async def lookup(key: bytes, *, timeout_s: float) -> Any:
            return await dht.lookup(key, timeout_s)

        address = f"{ADDRESS[0]}/p2p/{peer_id_of(identity.node_id)}"
        return SimpleNamespace(
            name="libp2p", node_id=identity.node_id, addresses=(address,), store=dht.store, lookup=lookup
        )

    async def add_hostile(self, identity: Identity) -> None:
        """It says who is near as it should, holds every record, and has none."""
        dht = self._network.add(identity.node_id)
        dht._records = lambda key: []  # type: ignore[method-assign]
        self._network.lies[identity.node_id] = {STORE: Store.encode_answer(True)}

    async def join(self) -> None:
        """Each meets the first one, and looks for its place, twice: the second time all are there."""
        await self._network.meet_all()
        await self._network.meet_all()


def next_to(
    keys: Sequence[bytes],
    honest: Sequence[Identity],
    num: int,
    distance: Callable[[bytes, Identity], int] = MemoryNodes.distance,
) -> list[Identity]:
    """Make so many identities for each key that stand between it and the nearest honest node."""
    nearest = {key: min(distance(key, identity) for identity in honest) for key in keys}
    missing, found, seed = dict.fromkeys(keys, num), list[Identity](), 50_000
    while missing:
        identity, seed = identity_of(seed), seed + 1
        for key in missing:
            if distance(key, identity) < nearest[key]:
                missing[key] -= 1
                if not missing[key]:
                    del missing[key]
                found.append(identity)
                break
    return found


async def share_found_in_shards(kind: type[MemoryNodes] | type[Libp2pNodes], num_hostile: int) -> float:
    """Place twenty nodes beside some ids next to each key that they may write to; return how much of it is found."""
    honest, swarm, clock = [identity_of(number) for number in range(1, 21)], kind(), virtual_clock()
    hostile = next_to(keys_of(2), honest, num_hostile, kind.distance) if num_hostile else []
    nodes = []
    for identity in honest:
        transport = await swarm.add(identity)
        nodes.append((identity, transport, Shards(transport, "main", timeout_s=5, rng=random.Random(0))))
    for identity in hostile:
        await swarm.add_hostile(identity)
    await swarm.join()
    for _ in range(2):  # the second time they see one another
        for identity, transport, shards in nodes:
            await shards.place(lambda record, salt: None)
            now_ms = int(clock() * 1000)
            await shards.publish(sign_own_record(identity, transport, "main", ABOUT, now_ms))
    seen = [set[str]() for _ in nodes]
    for names, (_, _, shards) in zip(seen, nodes, strict=True):
        for turn in range(16):
            await shards.read(turn % NUM_SALTS, lambda record, salt, names=names: names.add(record.node_id))
    return sum(len(names) for names in seen) / len(nodes) ** 2


@pytest.mark.parametrize("kind", [MemoryNodes, Libp2pNodes])
def test_five_ids_next_to_every_key_hide_nobody(kind, monkeypatch):
    def found(num_hostile: int) -> float:
        shares: list[float] = []

        async def main() -> None:
            shares.append(await share_found_in_shards(kind, num_hostile))

        simulate(main())
        return shares[0]

    undisturbed = found(0)  # by some random reads, not quite all
    assert undisturbed > 0.8
    assert found(5) >= 0.95 * undisturbed
    for module in (memory_network, libp2p_dht):
        monkeypatch.setattr(module, "NUM_REPLICAS", 5)  # the five have every replica then
    monkeypatch.setattr(libp2p_walk, "NUM_NEAREST_ANSWERED", 5)
    assert found(5) <= 0.2


def crowd_of(attackers: Sequence[Attacker]) -> dict[bytes, dict[str, Record]]:
    """What each of them may write to the shards on its path, at every depth that a small swarm uses."""
    crowd = dict[bytes, dict[str, Record]]()
    for attacker in attackers:
        owner, record = attacker.identity.node_id, attacker.record()
        held = Record(owner, record.encoded, record.created_at_ms / 1000 + NODE_RECORD_TTL_S)
        for salt in range(NUM_SALTS):
            for depth in range(3):
                crowd.setdefault(shard_key("main", salt, depth, path_of(owner, salt)), {})[owner] = held
    return crowd


async def shares_found_beside_a_crowd(num_flooding: int) -> list[float]:
    """Let five ids beside every key hide what they hold, be polite, and tell of each other alone; so many of them also
    flood the DHT. Return how much of each other twenty nodes know every five minutes, each of whom knew one other."""
    swarm, identities = Swarm(), [identity_of(number) for number in range(1, 21)]
    attackers = [Attacker(swarm, identity) for identity in next_to(keys_of(2), identities, 5)]
    crowd = dict[bytes, dict[str, Record]]()
    for attacker in attackers:
        await attacker.transport.start()
        attacker.transport._records = Blind(crowd)
    honest = [await swarm.add(peers=(), identity=identity) for identity in identities]
    for number, node in enumerate(honest):
        node.member.neighbours.given = {honest[number - 1].address: "not tried yet"}
    names, shares = {node.id for node in honest}, list[float]()
    for _ in range(8):
        for _ in range(3):
            crowd.clear()
            crowd.update(crowd_of(attackers[:num_flooding]))
            for attacker in attackers:
                attacker.records = [other.record().encoded for other in attackers]
            await asyncio.sleep(100)
        found = [len({known.record.node_id for known in node.member.directory.nodes()} & names) for node in honest]
        shares.append(sum(found) / (len(honest) * (len(honest) - 1)))
        links = [len(node.member.neighbours.ids.keys() & names) for node in honest]
        assert min(links) >= 1
    await swarm.close()
    return shares


@pytest.mark.soak
@pytest.mark.parametrize("num_flooding", [5, 70])
def test_ids_that_hide_and_flood_hide_nobody_for_long(num_flooding):
    async def main() -> None:
        shares = await shares_found_beside_a_crowd(num_flooding)
        print(
            f"\n{num_flooding} of 70 flood; found of each other, every 5 min: {[round(share, 2) for share in shares]}"
        )
        assert shares[-1] >= 0.95

    simulate(main())
