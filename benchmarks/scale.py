"""Simulate swarms of growing size at constant demand, and count what every node pays for what it samples.

    python benchmarks/scale.py [--nodes 100 1000 5000] [--rounds 8] [--round-s 15] [--external 4]

Whole members over the memory transport in virtual time: real keys, signatures, frames, admission; the text stands in
for a model's, and is as long and compresses as well as 600 characters of reasoning do. Every node trains at its own
pace: each round it samples J groups of others and publishes as many of its own. The swarm joins one by one, each
node through a random one that is there; then some rounds warm up, and the rest are measured.

    delivery            groups sampled / groups asked for, and frames that came / frames that were to be pulled
    latency             from a batch's publication until a node has admitted a group of it. Pulls follow demand: most
                        of it is the wait until somebody wants it. `push` is the time until the announcement is heard
    bytes               everything that a node receives in a round: frames, proofs, announcements, greetings, DHT
    ideal               the frames alone of what it samples
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

from _swarm import Node, Swarm, write_group
from harness import Bar, report

from protocol import member
from protocol.messages import SharedGroup
from protocol.refusals import Reason
from protocol.transport import virtual_time
from protocol.wire import encode_frame

__all__: list[str] = []

JOINS_PER_S = 100.0
SETTLE_S = 45.0
NUM_GROUPS = 16_384


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Measured:
    """Sums over all nodes, as differences between two moments."""

    KEYS = ("bytes_in", "bytes_out", "groups_sampled", "groups_missing", "frames_pulled", "frames_failed",
            "batches_heard", "batches_published", "pulls_from_neighbours", "pulls_from_strangers",
            "announcements_seen", "requests_out", "requests_failed", "repairs_asked")  # fmt: skip

    def __init__(self, nodes: list[Node]) -> None:
        self.sums = dict.fromkeys((*self.KEYS, "duplicates"), 0)
        for node in nodes:
            status = node.status()
            for key in self.KEYS:
                self.sums[key] += status[key]
            self.sums["duplicates"] += node.member.local.refusals[Reason.DUPLICATE]

    def since(self, earlier: "Measured") -> dict[str, int]:
        """Return what has been added since."""
        return {key: value - earlier.sums[key] for key, value in self.sums.items()}


class Writer:
    """Groups written and compressed once: so many that a node seldom meets one twice."""

    def __init__(self, num_groups: int) -> None:
        rng = random.Random("groups")
        self.groups = [write_group(rng) for _ in range(num_groups)]
        self._frames = {id(group): encode_frame(group) for group in self.groups}
        self.frame_bytes = statistics.mean(len(frame) for frame in self._frames.values())

    def encode(self, group: SharedGroup) -> bytes:
        """Stands in for `encode_frame` in every member."""
        return self._frames[id(group)]


async def train(node: Node, args: argparse.Namespace, writer: Writer) -> None:
    """Live a node's rounds: sample, publish, and take a round's time. Ended by cancellation."""
    await asyncio.sleep(node.rng.uniform(0, args.round_s))
    while True:
        node.member.sample(args.external)
        await node.member.publish(node.rng.sample(writer.groups, args.external))
        await asyncio.sleep(args.round_s * node.rng.uniform(0.8, 1.2))


async def simulate(num_nodes: int, args: argparse.Namespace, writer: Writer) -> dict[str, Any]:
    """Run one swarm and return its figures."""
    start_s = time.perf_counter()
    swarm = Swarm(seed=num_nodes)
    trainers = []
    reserve = -(-5 * args.external // 4)
    for _ in range(num_nodes):
        node = await swarm.add(reserve_groups=reserve)
        trainers.append(asyncio.create_task(train(node, args, writer)))
        await asyncio.sleep(1 / JOINS_PER_S)
    await asyncio.sleep(SETTLE_S + args.warmup * args.round_s)
    before = Measured(swarm.nodes)
    for node in swarm.nodes:
        node.member.local.counters.latency_s.values.clear()
        node.member.local.counters.age_of_sampled_s.values.clear()
    print(
        f"{num_nodes} nodes: joined and warm after {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True
    )
    await asyncio.sleep(args.rounds * args.round_s)
    found = Measured(swarm.nodes).since(before)
    latencies = [value for node in swarm.nodes for value in node.member.local.counters.latency_s.values]
    ages = [value for node in swarm.nodes for value in node.member.local.counters.age_of_sampled_s.values]
    links = [len(node.member.neighbours.ids) for node in swarm.nodes]
    swarm.check()
    node_rounds = num_nodes * args.rounds
    ideal = found["groups_sampled"] * writer.frame_bytes
    for trainer in trainers:
        trainer.cancel()
    figures = {
        "num_nodes": num_nodes,
        "sampled_of_wanted": found["groups_sampled"] / (found["groups_sampled"] + found["groups_missing"]),
        "delivered_of_pulled": found["frames_pulled"] / (found["frames_pulled"] + found["frames_failed"]),
        "latency_p50_s": round(quantile(latencies, 0.5), 3),
        "latency_p99_s": round(quantile(latencies, 0.99), 3),
        "age_when_used_p50_s": round(quantile(ages, 0.5), 2),
        "age_when_used_p99_s": round(quantile(ages, 0.99), 2),
        "duplicates_per_batch": found["duplicates"] / max(1, found["batches_heard"]),
        "batches_heard_per_round": found["batches_heard"] / node_rounds,
        "bytes_in_per_round": found["bytes_in"] / node_rounds,
        "bytes_out_per_round": found["bytes_out"] / node_rounds,
        "frame_bytes": writer.frame_bytes,
        "ideal_bytes_per_round": ideal / node_rounds,
        "bytes_over_ideal": found["bytes_in"] / ideal,
        "pulls_from_strangers_share": found["pulls_from_strangers"]
        / max(1, found["pulls_from_strangers"] + found["pulls_from_neighbours"]),
        "repairs_per_round": found["repairs_asked"] / node_rounds,
        "requests_failed_share": found["requests_failed"] / found["requests_out"],
        "links_mean": statistics.mean(links),
        "links_max": max(links),
        "virtual_s": asyncio.get_running_loop().time(),
        "real_s": round(time.perf_counter() - start_s, 1),
    }
    print(figures, file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Simulate every size that was asked for and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=6, help="measured")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--round-s", type=float, default=15.0, help="virtual seconds of one round")
    parser.add_argument("--external", type=int, default=4, help="J: groups sampled, and published, in a round")
    args = parser.parse_args()
    writer = Writer(NUM_GROUPS)
    member.encode_frame = writer.encode
    sizes = [virtual_time.run(simulate(num_nodes, args, writer)) for num_nodes in args.nodes]
    first, last = sizes[0], sizes[-1]
    growth = last["bytes_in_per_round"] / first["bytes_in_per_round"] if len(sizes) > 1 else None
    bars = [Bar(f"share of wanted groups sampled, {s['num_nodes']} nodes", s["sampled_of_wanted"], 0.99) for s in sizes]
    bars += [Bar(f"share of pulled frames, {s['num_nodes']} nodes", s["delivered_of_pulled"], 0.99) for s in sizes]
    bars += [
        Bar(f"bytes over the ideal, {s['num_nodes']} nodes", s["bytes_over_ideal"], 1.5, at_least=False) for s in sizes
    ]
    bars.append(Bar("bytes per node and round, largest swarm over smallest", growth, 1.2, at_least=False))
    report({"round_s": args.round_s, "external": args.external, "rounds": args.rounds, "swarms": sizes}, bars)


if __name__ == "__main__":
    main()
