"""Simulate swarms of growing size at constant demand, and count what every node pays for what it samples.

    python benchmarks/scale.py [--nodes 100 1000 5000] [--rounds 4] [--round-s 15] [--external 4]

Whole members over the memory transport in virtual time: real keys, signatures, frames, admission; the text stands in
for a model's, and is as long and compresses as well as 600 characters of reasoning do. Every node trains at its own
pace: each round it samples J groups of others and publishes as many of its own. The swarm joins one by one, each
node through a random one that is there; then some rounds warm up, and the rest are measured.

    delivery            groups sampled / groups asked for, and frames that came / frames that were to be pulled
    latency             from a batch's publication until a node has admitted a group of it. Pulls follow demand: most
                        of it is the wait until somebody wants it
    heard               from a batch's publication until another node hears of it, by push or by repair
    duplicates          announcements that told a node nothing new, for each that did
    bytes               everything that a node receives in a round: frames, proofs, announcements, greetings, DHT
    bytes at the start  the same in a node's first 45 seconds, its rounds included: joining and finding its place
    ideal               the frames alone of what it samples

What thousands of nodes share because they are in one process, and would not share if they were not: the signature of
a record in the DHT is verified when the first of them reads it, and not again by the next, nor where the same bytes
come in a greeting (announcements and what a neighbour tells are verified by every node); a group's frame is
compressed once, before the simulation. The garbage collector is off: it would look at every object of every node again
and again, which is a cost of simulating and not of a node; without it memory grows no faster.
"""

import argparse
import asyncio
import gc
import itertools
import random
import statistics
import sys
import time
from typing import Any

import psutil
from _swarm import Node, Swarm, write_group
from harness import Bar, report

from protocol import member
from protocol.messages import SharedGroup
from protocol.transport import virtual_time
from protocol.wire import encode_frame

__all__: list[str] = []

JOINS_PER_S = 100.0
SETTLE_S = 60.0  # with the rounds that warm up: until the last to join has its place and has read of others
AT_START_S = 45.0  # after a node's start: what it receives until then is what joining costs
NUM_GROUPS = 8192
SHARED = ["signatures of records in the DHT", "compression of frames"]  # by the nodes, being in one process


def quantile(values: list[float], share: float) -> float:
    """Return the value below which this share lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Measured:
    """Sums over all nodes, as differences between two moments."""

    KEYS = ("bytes_in", "bytes_out", "groups_sampled", "groups_missing", "frames_pulled", "frames_failed",
            "batches_heard", "batches_published", "pulls_from_neighbours", "pulls_from_strangers",
            "announcements_seen", "requests_out", "requests_failed", "repairs_asked")  # fmt: skip

    def __init__(self, nodes: list[Node]) -> None:
        self.sums = dict.fromkeys(self.KEYS, 0)
        for node in nodes:
            counters, traffic = node.member.local.counters, node.transport.traffic
            for key in self.KEYS:
                if key.startswith("bytes_"):
                    self.sums[key] += getattr(traffic, key)
                elif key == "requests_out":
                    self.sums[key] += traffic.num_requests_out
                else:
                    self.sums[key] += getattr(counters, key)

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


async def weigh_start(node: Node, bytes_at_start: list[int]) -> None:
    """Note what a node has received when it has been there for a while."""
    await asyncio.sleep(AT_START_S)
    bytes_at_start.append(node.transport.traffic.bytes_in)


class Progress:
    """Lines on stderr: where a simulation is, and what it has taken."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes, self._start_s, self._start_cpu_s = num_nodes, time.perf_counter(), time.process_time()

    @property
    def real_s(self) -> float:
        """Seconds since the start of this swarm."""
        return time.perf_counter() - self._start_s

    @property
    def cpu_s(self) -> float:
        """Seconds of them that this process has computed."""
        return time.process_time() - self._start_cpu_s

    def show(self, what: str) -> None:
        """Print one line."""
        virtual_s, gib = asyncio.get_running_loop().time(), resident_gib()
        taken = f"{self.real_s:.0f} s, {self.cpu_s:.0f} s of CPU, {gib:.2f} GiB"
        print(f"{self._num_nodes} nodes, {what}: {virtual_s:.0f} virtual s, {taken}", file=sys.stderr, flush=True)


def resident_gib() -> float:
    """Return the memory of this process."""
    return float(psutil.Process().memory_info().rss) / 2**30


def heard_after_s(nodes: list[Node], since_s: float) -> list[float]:
    """Return how old each batch was when a node heard of it, of those published since a time."""
    ages = []
    for node in nodes:
        announcements = node.member.announcements
        for batch in map(announcements.get, announcements.roots()):
            if batch is not None and batch.author != node.id and batch.created_at_s >= since_s:
                ages.append(batch.heard_at_s - batch.created_at_s)
    return ages


async def fill(swarm: Swarm, num_nodes: int, args: argparse.Namespace, writer: Writer, progress: Progress) -> list[int]:
    """Let nodes join one by one, each of which trains from then on; return the list for their bytes at the start."""
    reserve, bytes_at_start = -(-5 * args.external // 4), list[int]()
    for number in range(num_nodes):
        node = await swarm.add(reserve_groups=reserve)
        node.member.local.tasks.spawn(train(node, args, writer), "train")
        node.member.local.tasks.spawn(weigh_start(node, bytes_at_start), "weigh")
        await asyncio.sleep(1 / JOINS_PER_S)
        if number % 500 == 499:
            progress.show(f"{number + 1} joined")
    return bytes_at_start


async def simulate(num_nodes: int, args: argparse.Namespace, writer: Writer) -> dict[str, Any]:
    """Run one swarm and return its figures."""
    progress = Progress(num_nodes)
    swarm = Swarm(seed=num_nodes)
    bytes_at_start = await fill(swarm, num_nodes, args, writer, progress)
    await asyncio.sleep(SETTLE_S)
    progress.show("settled")
    for number in range(args.warmup):
        await asyncio.sleep(args.round_s)
        progress.show(f"round {number + 1} to warm up")
    for node in swarm.nodes:
        node.member.local.counters.latency_s.values.clear()
        node.member.local.counters.age_of_sampled_s.values.clear()
    moments, begun_s = [Measured(swarm.nodes)], swarm.network.clock()
    for number in range(args.rounds):
        await asyncio.sleep(args.round_s)
        moments.append(Measured(swarm.nodes))
        progress.show(f"round {number + 1} of {args.rounds}")
    swarm.check()
    figures = figures_of(swarm, moments, begun_s, writer) | {
        "num_rounds_measured": args.rounds,
        "bytes_in_at_start": statistics.mean(bytes_at_start),
        "virtual_s": asyncio.get_running_loop().time(),
        "real_s": round(progress.real_s, 1),
        "cpu_s": round(progress.cpu_s, 1),
        "resident_gib": round(resident_gib(), 2),
    }
    print(figures, file=sys.stderr, flush=True)
    return figures


def figures_of(swarm: Swarm, moments: list[Measured], begun_s: float, writer: Writer) -> dict[str, Any]:
    """Return what the measured rounds have shown: `moments` lie before the first one and after each."""
    found = moments[-1].since(moments[0])
    by_round = [later.since(earlier) for earlier, later in itertools.pairwise(moments)]
    latencies = [value for node in swarm.nodes for value in node.member.local.counters.latency_s.values]
    ages = [value for node in swarm.nodes for value in node.member.local.counters.age_of_sampled_s.values]
    heard = heard_after_s(swarm.nodes, begun_s)
    links = [len(node.member.neighbours.ids) for node in swarm.nodes]
    num_nodes = len(swarm.nodes)
    node_rounds = num_nodes * len(by_round)
    ideal = found["groups_sampled"] * writer.frame_bytes
    return {
        "num_nodes": num_nodes,
        "sampled_of_wanted": found["groups_sampled"] / (found["groups_sampled"] + found["groups_missing"]),
        "delivered_of_pulled": found["frames_pulled"] / (found["frames_pulled"] + found["frames_failed"]),
        "latency_p50_s": round(quantile(latencies, 0.5), 3),
        "latency_p99_s": round(quantile(latencies, 0.99), 3),
        "heard_p50_s": round(quantile(heard, 0.5), 3),
        "heard_p99_s": round(quantile(heard, 0.99), 3),
        "age_when_used_p50_s": round(quantile(ages, 0.5), 2),
        "age_when_used_p99_s": round(quantile(ages, 0.99), 2),
        "duplicates_per_batch": found["announcements_seen"] / max(1, found["batches_heard"]) - 1,
        "batches_heard_per_round": found["batches_heard"] / node_rounds,
        "bytes_in_per_round": found["bytes_in"] / node_rounds,
        "bytes_in_by_round": [round(one["bytes_in"] / num_nodes) for one in by_round],
        "bytes_out_per_round": found["bytes_out"] / node_rounds,
        "frame_bytes": writer.frame_bytes,
        "ideal_bytes_per_round": ideal / node_rounds,
        "bytes_over_ideal": found["bytes_in"] / ideal,
        "pulls_from_strangers_share": found["pulls_from_strangers"]
        / max(1, found["pulls_from_strangers"] + found["pulls_from_neighbours"]),
        "requests_per_round": found["requests_out"] / node_rounds,
        "repairs_per_round": found["repairs_asked"] / node_rounds,
        "requests_failed_share": found["requests_failed"] / found["requests_out"],
        "links_mean": statistics.mean(links),
        "links_max": max(links),
    }


def run(num_nodes: int, args: argparse.Namespace, writer: Writer) -> dict[str, Any]:
    """Simulate one swarm without the garbage collector, and leave nothing of it in memory."""
    gc.disable()
    try:
        return virtual_time.run(simulate(num_nodes, args, writer))
    finally:
        gc.enable()
        gc.collect()


def main() -> None:
    """Simulate every size that was asked for and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument("--rounds", type=int, default=4, help="measured")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--round-s", type=float, default=15.0, help="virtual seconds of one round")
    parser.add_argument("--external", type=int, default=4, help="J: groups sampled, and published, in a round")
    args = parser.parse_args()
    start_s = time.perf_counter()
    writer = Writer(NUM_GROUPS)
    member.encode_frame = writer.encode
    sizes = [run(num_nodes, args, writer) for num_nodes in args.nodes]
    first, last = sizes[0], sizes[-1]
    growth = last["bytes_in_per_round"] / first["bytes_in_per_round"] if len(sizes) > 1 else None
    bars = [Bar(f"share of wanted groups sampled, {s['num_nodes']} nodes", s["sampled_of_wanted"], 0.99) for s in sizes]
    bars += [Bar(f"share of pulled frames, {s['num_nodes']} nodes", s["delivered_of_pulled"], 0.99) for s in sizes]
    bars += [
        Bar(f"bytes over the ideal, {s['num_nodes']} nodes", s["bytes_over_ideal"], 1.5, at_least=False) for s in sizes
    ]
    bars.append(Bar("bytes per node and round, largest swarm over smallest", growth, 1.2, at_least=False))
    settings = {"round_s": args.round_s, "external": args.external, "warmup_rounds": args.warmup, "shared": SHARED}
    report(settings | {"swarms": sizes, "real_s": round(time.perf_counter() - start_s, 1)}, bars)


if __name__ == "__main__":
    main()
