"""How long real transports take to start and to join, many of them on this machine.

Each node is a `HivemindTransport` with a p2pd process of its own; a process of this benchmark holds several, as far
as one process can. A node has joined when it has connected to the first one, stored its record, and found another's.

    python benchmarks/transports_start.py --nodes 64
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from protocol.identity import Identity
from protocol.transport.hivemind import HivemindSettings, HivemindTransport

LOCAL = HivemindSettings(listen=("/ip4/127.0.0.1/tcp/0",), nat_port_map=False, auto_nat=False)
NUM_AT_ONCE = 4  # nodes that start side by side


async def join_all(num_nodes: int, folder: Path, timeout_s: float = 120.0) -> dict[str, float]:
    """Start and join so many nodes; return seconds and counts. Raises TimeoutError where it takes too long."""
    began_s = time.perf_counter()
    nodes: list[HivemindTransport] = []
    numbers: dict[str, int] = {}
    start_s: list[float] = []
    places = asyncio.Semaphore(NUM_AT_ONCE)

    async def echo(asker: str, request: bytes) -> bytes:
        return request

    async def join(number: int) -> None:
        async with places:
            node = HivemindTransport(
                Identity.create(folder / f"{number}.pem"), lambda key, owner, value, expires_at, now: True, LOCAL
            )
            node.handle("echo", echo, max_request_bytes=1024)
            node_began_s = time.perf_counter()
            await node.start()
            nodes.append(node)
            start_s.append(time.perf_counter() - node_began_s)
            if number:
                await node.connect(nodes[0].addresses[0], timeout_s=30)
            await store(number, node, 300)

    async def store(number: int, node: HivemindTransport, life_s: float) -> None:
        numbers[node.node_id] = number
        await node.store(b"shard %d" % (number % 8), b"here", time.time() + life_s)

    try:
        async with asyncio.timeout(timeout_s):
            await join(0)
            await asyncio.gather(*(join(number) for number in range(1, num_nodes)))
        joined_s = time.perf_counter() - began_s
        for node in nodes:  # as a directory does: what was stored when the swarm was small moves to nearer nodes
            await store(numbers[node.node_id], node, 330)
        shards = await asyncio.gather(*(nodes[-1].lookup(b"shard %d" % shard, timeout_s=10) for shard in range(8)))
        found = {record.owner for shard in shards for record in shard}
        asked_s = []
        for node in nodes[:: max(1, num_nodes // 16)]:
            if node is not nodes[-1]:
                asked_began_s = time.perf_counter()
                await nodes[-1].request(node.node_id, "echo", b"x", max_response_bytes=1, timeout_s=10)
                asked_s.append(time.perf_counter() - asked_began_s)
        daemons = [child for child in psutil.Process().children() if child.name() == "p2pd"]
        return {
            "num_nodes": num_nodes,
            "joined_s": round(joined_s, 2),
            "start_p50_s": round(statistics.median(start_s), 3),
            "first_request_p50_ms": round(1000 * statistics.median(asked_s), 1),
            "found_by_the_last": len(found) / num_nodes,
            "p2pd_rss_mib": round(statistics.mean(daemon.memory_info().rss for daemon in daemons) / 2**20, 1),
        }
    finally:
        await asyncio.gather(*(node.close() for node in nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(asyncio.run(join_all(arguments.nodes, Path(folder)))))


if __name__ == "__main__":
    main()
