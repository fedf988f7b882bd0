"""Swarms over minutes and hours of virtual time: nodes come and go, and nothing grows."""

import asyncio
import gc
import tracemalloc
from collections.abc import Coroutine
from typing import Any

import pytest
from _swarm import Node, Swarm, write_group

from protocol.transport import virtual_time
from protocol.transport.memory import Faults

pytestmark = pytest.mark.no_cover
ROUND_S = 10.0
NUM_EXTERNAL = 4


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


async def train(node: Node, counts: dict[str, int], *, round_s: float = ROUND_S) -> None:
    """Sample and publish every round. A node's first round asks for nothing: it has only just come."""
    while True:
        await node.member.publish([write_group(node.rng, num_completions=4, num_chars=80) for _ in range(NUM_EXTERNAL)])
        await asyncio.sleep(round_s * node.rng.uniform(0.8, 1.2))
        counts["sampled"] += len(node.member.sample(NUM_EXTERNAL))
        counts["wanted"] += NUM_EXTERNAL


async def churn(num_nodes: int, minutes: int, share_per_minute: float) -> dict[str, int]:
    """Replace nodes one by one, without a farewell, at a steady rate; return what those that were there got."""
    swarm, counts = Swarm(seed=7, faults=Faults(loss=0.005)), {"sampled": 0, "wanted": 0}
    tasks: dict[str, asyncio.Task[None]] = {}

    async def join() -> None:
        peers = tuple(node.address for node in swarm.rng.sample(swarm.nodes, min(2, len(swarm.nodes))))
        node = await swarm.add(reserve_groups=5, peers=peers)
        tasks[node.id] = asyncio.create_task(train(node, counts))

    for _ in range(num_nodes):
        await join()
    await asyncio.sleep(60)
    counts.update(sampled=0, wanted=0)
    num_replaced = round(num_nodes * share_per_minute * minutes)
    for _ in range(num_replaced):
        gone = swarm.rng.choice(swarm.nodes)
        tasks.pop(gone.id).cancel()
        await swarm.remove(gone, kill=True)
        await join()
        await asyncio.sleep(60 * minutes / num_replaced)
    for task in tasks.values():
        task.cancel()
    await swarm.close()
    return counts


def test_thirty_percent_replaced_in_a_minute_get_what_they_want():
    async def main() -> None:
        counts = await churn(20, 2, 0.3)
        assert counts["sampled"] >= 0.95 * counts["wanted"] > 0

    simulate(main())


@pytest.mark.soak
def test_thirty_percent_replaced_every_minute_for_ten_minutes():
    async def main() -> None:
        counts = await churn(50, 10, 0.3)
        print(f"\nchurn of 30 % a minute: {counts['sampled'] / counts['wanted']:.4f} of the groups wanted were there")
        assert counts["sampled"] >= 0.95 * counts["wanted"] > 0

    simulate(main())


async def sizes_over_time(num_nodes: int, hours: float, round_s: float) -> list[int]:
    """Run a swarm; return the bytes that Python has allocated, once every twentieth of the time."""
    swarm, counts = Swarm(seed=8), {"sampled": 0, "wanted": 0}
    tasks = []
    for _ in range(num_nodes):
        node = await swarm.add(reserve_groups=5)
        tasks.append(asyncio.create_task(train(node, counts, round_s=round_s)))
    sizes = []
    tracemalloc.start()
    for _ in range(20):
        await asyncio.sleep(hours * 3600 / 20)
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
        assert max(len(node.member.local.tasks) for node in swarm.nodes) < 40
    tracemalloc.stop()
    assert counts["sampled"] >= 0.98 * counts["wanted"]  # but for the first round
    for task in tasks:
        task.cancel()
    await swarm.close()
    return sizes


def assert_flat(sizes: list[int]) -> None:
    """The last quarter needs no more than what was needed when half of the time was over, but for a twentieth.

    By then whatever is remembered for a while (half an hour at most) has been forgotten once.
    """
    settled, later = max(sizes[10:14]), max(sizes[15:])
    assert later <= 1.05 * settled, sizes


def test_memory_is_flat_over_an_hour_and_a_half():
    async def main() -> None:
        assert_flat(await sizes_over_time(2, 1.5, 60.0))

    simulate(main())


@pytest.mark.soak
def test_memory_is_flat_over_four_hours():
    async def main() -> None:
        sizes = await sizes_over_time(8, 4.0, 15.0)
        print(f"\nbytes traced, every 12 virtual minutes: {sizes}")
        assert_flat(sizes)

    simulate(main())
