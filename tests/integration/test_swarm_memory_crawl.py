"""Seeing a swarm from outside: every node is found, and nobody gets a neighbour by it."""

import asyncio
import json
import random

import pytest
from _swarm import Swarm, identity_of

from protocol.about import NodeAbout
from protocol.crawl import Crawled, crawl
from protocol.transport import virtual_time
from protocol.transport.base import PeerUnreachable
from protocol.transport.memory import MemoryTransport
from protocol.transport.virtual_time import virtual_clock

ABOUT = NodeAbout("bootstrap", "swarm-node/0.1.0", "none", ())


async def look(swarm: Swarm, address: str, swarm_id: str = "main") -> list[Crawled]:
    identity = identity_of(99_999)
    transport = MemoryTransport(swarm.network, identity.node_id, lambda *record: True)
    await transport.start()
    try:
        return await crawl(
            transport, identity, swarm_id, [address], about=ABOUT, clock=virtual_clock(), rng=random.Random(0),
            timeout_s=5, max_nodes=1000,
        )  # fmt: skip
    finally:
        await transport.close()


def test_a_crawl_finds_every_node_and_says_which_answer():
    async def main() -> None:
        swarm = Swarm()
        for _ in range(25):
            await swarm.add()
        await asyncio.sleep(200)
        gone = swarm.nodes[7]
        await swarm.remove(gone, kill=True)
        found = await look(swarm, swarm.nodes[0].address)
        reached = {node.record.node_id for node in found if node.reachable}
        assert reached == {node.id for node in swarm.nodes}
        assert all(node.rtt_ms is not None and 10 < node.rtt_ms < 120 for node in found if node.reachable)
        assert [node.record.node_id for node in found if not node.reachable] == [gone.id]
        assert all(identity_of(99_999).node_id not in node.member.directory for node in swarm.nodes)
        assert all(identity_of(99_999).node_id not in node.member.neighbours.ids for node in swarm.nodes)
        await swarm.close()

    virtual_time.run(main())


def test_a_crawl_that_cannot_begin_says_why():
    async def main() -> None:
        swarm = Swarm()
        node = await swarm.add()
        address = node.address
        with pytest.raises(Exception, match="this is swarm 'main', you are of 'other': set --swarm-id"):
            await look(swarm, address, "other")
        await swarm.remove(node)
        with pytest.raises(PeerUnreachable):
            await look(swarm, address)
        await swarm.close()

    virtual_time.run(main())


def test_status_is_plain_data():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add() for _ in range(3)]
        await asyncio.sleep(30)
        for node in nodes:
            assert json.loads(json.dumps(node.status(), allow_nan=False))["schema_version"] == 1
            assert {peer["direction"] for peer in node.status()["peers"]} <= {"in", "out"}
            assert len(node.status()["peers"]) == node.status()["num_peers"] == 2
        await swarm.close()

    virtual_time.run(main())
