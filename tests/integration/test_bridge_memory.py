"""Networks joined by bridges, in virtual time: all arrives once, as its author signed it, and nothing circles."""

import asyncio
import itertools
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from _swarm import Node, Swarm, identity_of, write_group
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.about import NO_MODEL, NodeAbout
from protocol.bridge.channel import ChannelBroken, memory_channels
from protocol.bridge.side import BridgeSide
from protocol.bridge.store import BridgeStore
from protocol.config import SwarmConfig
from protocol.crawl import crawl
from protocol.identity import Identity
from protocol.member import Member
from protocol.refusals import Reason
from protocol.requests import AnnounceRequest, Offer, encode_announce_request
from protocol.shards import record_validator
from protocol.signing import sign_announcement, verify_announcement
from protocol.store import FrameStore
from protocol.transport import virtual_time
from protocol.transport.memory import MemoryTransport
from protocol.transport.virtual_time import virtual_clock
from protocol.wire import encode_frame

WANT_ALL: dict[str, Any] = {"reserve_groups": 400, "max_rescore_queue": 400, "max_author_share": 1.0}
ABOUT = NodeAbout("bootstrap", "swarm-node/0.1.0 bridge", NO_MODEL, ())


class OtherTransport(MemoryTransport):
    """A network that the nodes of the others cannot connect to, by its name."""

    name = "other"


class Bridge:
    """Two sides in one process."""

    def __init__(self, identity: Identity, networks: tuple[Swarm, Swarm], names: tuple[type, type]) -> None:
        self.sides: list[BridgeSide] = []
        self.members: list[Member] = []
        for number, (swarm, kind, channel) in enumerate(zip(networks, names, memory_channels(), strict=True)):
            config = SwarmConfig(peers=tuple(node.address for node in swarm.nodes[:2]))
            store = BridgeStore(config.max_store_bytes, config.max_live_batches)
            member = Member(
                identity,
                kind(swarm.network, identity.node_id, record_validator(config.swarm_id)),
                config,
                rescore=None,
                about=lambda: ABOUT,
                state_path=None,
                clock=virtual_clock(),
                rng=random.Random(f"{identity.node_id} {number}"),
                store=store,
            )
            self.members.append(member)
            self.sides.append(BridgeSide(member, store, channel))
        self.failing = [asyncio.create_task(side.wait_failed()) for side in self.sides]

    async def start(self) -> "Bridge":
        for side in self.sides:
            await side.start()
        return self

    def crossed(self) -> list[dict[str, Any]]:
        return [side.status()["bridge"] for side in self.sides]

    async def close(self) -> None:
        for task in self.failing:
            assert not task.done(), task.exception()
            task.cancel()
        for side in self.sides:
            await side.close()


async def bridge(seed: int, one: Swarm, other: Swarm, names: tuple[type, type] = (MemoryTransport,) * 2) -> Bridge:
    return await Bridge(identity_of(10_000_000 + seed), (one, other), names).start()


async def networks(num_networks: int, num_nodes: int, **wants: Any) -> list[Swarm]:
    swarms = [Swarm(seed=number + 1) for number in range(num_networks)]
    for swarm in swarms:
        for _ in range(num_nodes):
            await swarm.add(**(wants or WANT_ALL))
    await asyncio.sleep(5)
    return swarms


def nodes_of(swarms: list[Swarm]) -> list[Node]:
    return [node for swarm in swarms for node in swarm.nodes]


async def publish(node: Node, num_groups: int = 3) -> None:
    await node.member.publish([write_group(node.rng, num_completions=4, num_chars=80) for _ in range(num_groups)])


async def close(swarms: list[Swarm], *bridges: Bridge) -> None:
    for one in bridges:
        await one.close()
    for swarm in swarms:
        await swarm.close()


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


def check_all_arrived_once(swarms: list[Swarm], num_each: int) -> None:
    """Every node has every group of every other one, and has never been given one twice."""
    nodes = nodes_of(swarms)
    for node in nodes:
        drawn = node.member.sample(1000)
        groups = [(group.author, group.group.task) for group in drawn]
        assert len(set(groups)) == len(groups) == num_each * (len(nodes) - 1)
        assert {author for author, _ in groups} == {other.id for other in nodes} - {node.id}
        status = node.status()
        assert status["frames_pulled"] == len(groups), "no frame crosses to one node twice"
        assert status["num_rejected"] == 0


def test_a_batch_reaches_the_other_network_with_its_authors_signature():
    async def main() -> None:
        swarms = await networks(2, 2)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(5)
        author, far = swarms[0].nodes[1], swarms[1].nodes[0]
        await publish(author)
        await asyncio.sleep(3)
        [root] = far.member.announcements.roots()
        heard = far.member.announcements.get(root)
        assert heard is not None
        assert heard.announcement.author == author.id
        verify_announcement("main", heard.announcement)
        ours = author.member.announcements.get(root)
        assert ours is not None
        assert heard.announcement.encoded == ours.announcement.encoded, "byte for byte"
        assert {group.author for group in far.member.sample(10)} == {author.id}
        latency = far.status()["latency"]["max_s"]
        assert latency is not None
        assert latency < 2
        await close(swarms, joined)

    simulate(main())


@pytest.mark.parametrize(
    ("num_networks", "ends"),
    [
        (2, [(0, 1)]),
        (2, [(0, 1), (0, 1)]),
        (3, [(0, 1), (1, 2), (2, 0)]),
        (3, [(0, 1), (1, 2)]),
        (3, [(0, 1), (1, 2), (2, 0), (0, 1), (2, 1)]),
    ],
    ids=["one", "two between the same", "ring", "chain", "tangle"],
)
def test_everybody_gets_everything_once_whatever_the_bridges_form(num_networks, ends):
    async def main() -> None:
        swarms = await networks(num_networks, 2)
        bridges = [await bridge(n, swarms[a], swarms[b]) for n, (a, b) in enumerate(ends)]
        await asyncio.sleep(10)
        for _ in range(3):
            for node in nodes_of(swarms):
                await publish(node)
            await asyncio.sleep(5)
        await asyncio.sleep(60)
        check_all_arrived_once(swarms, num_each=9)
        told = [row["batches_offered"] for one in bridges for row in one.crossed()]
        await asyncio.sleep(120)
        assert told == [row["batches_offered"] for one in bridges for row in one.crossed()], "nothing circles"
        assert all(row["frames_missed"] == 0 for one in bridges for row in one.crossed())
        await close(swarms, *bridges)

    simulate(main())
