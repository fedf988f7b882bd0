"""Real nodes on this machine, for `exchange.py`: a process each, a p2pd each, TCP on the loopback interface.

    python benchmarks/_nodes.py gather [--nodes 8] [--kilobytes 28 256] [--compressed-kilobytes 256] [--rounds 3]
    python benchmarks/_nodes.py sample [--nodes 8] [--rounds 8] [--warmup 6] [--round-s 15] [--external 4]
    python benchmarks/_nodes.py partition [--nodes 6]

gather: all publish at the same moment, and each wants every group of all the others, once they are linked. What
        a node publishes is counted as genrl counts it, before compression, and beside that as it is on the wire.
sample: what nodes that train do. Each takes J groups a round and publishes as many, at its own pace.
partition: each wants everything and publishes now and then; the network is cut in half for a minute, and heals.
        Needs root: every node has a network namespace of its own.

All print one JSON object. Nodes are whole members with the settings of `swarm-node join`, but for what `gather`
has to ask for: a reserve for everything, and announcements to all. In place of the verifier there is one
that gives half of the completions a reward: scoring is not what is timed here. Texts are `texts.json`'s.
In a network namespace of its own, the interface's counter says what crosses the wire with everything around it.
"""

import argparse
import asyncio
import functools
import json
import math
import multiprocessing as mp
import random
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from _namespaces import Namespaces, enter_namespace
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.about import NodeAbout
from protocol.clock import system_clock
from protocol.config import SwarmConfig
from protocol.identity import Identity
from protocol.member import Member, Rescored
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.shards import record_validator
from protocol.transport.base import Transport
from protocol.wire import encode_frame, encode_group

__all__ = ["BenchmarkNode", "BenchmarkNodes", "loopback_bytes", "num_texts", "partition", "quantile", "real_groups"]

TEXTS = Path(__file__).with_name("texts.json")
START_WITHIN_S = 90.0
LINK_WITHIN_S = 60.0
SETTLE_S = 3.0
PARTITION_S = 60.0
PUBLISH_EVERY_S = 5.0
NUM_PUBLISHED = 2  # groups at one time, by each node, before and during the partition


def local_transport(name: str, identity: Identity, swarm_id: str, host: str) -> Transport:
    """Make a transport of this machine's own; of two, one process can import only one."""
    listen, validator = (f"/ip4/{host}/tcp/0",), record_validator(swarm_id)
    if name == "libp2p":
        from protocol.transport.libp2p import Libp2pTransport
        from protocol.transport.libp2p_settings import Libp2pSettings

        return Libp2pTransport(identity, validator, Libp2pSettings(swarm_id=swarm_id, listen=listen, mdns=False))
    from protocol.transport.hivemind import HivemindSettings, HivemindTransport

    settings = HivemindSettings(listen=listen, nat_port_map=False, startup_timeout_s=60)
    return HivemindTransport(identity, validator, settings)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share lies."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def loopback_bytes() -> int:
    """Return the bytes that the loopback interface of this network namespace has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[0])
    return 0


def real_groups(author: int, first: int, num: int) -> list[SharedGroup]:
    """Return groups of real text, no two of them of the same task."""
    rows = json.loads(TEXTS.read_text())
    groups = []
    for number in range(first, first + num):
        row = rows[(author + number) % len(rows)]
        # What defines a source is a digest: as random as this, and as hard to compress.
        digest = random.Random(row["task"]).randbytes(16).hex()
        ref = TaskRef(f"reasoning_gym/{row['task']}", digest, author, number)
        groups.append(SharedGroup(ref, tuple(SharedCompletion(text, False) for text in row["texts"])))
    return groups


def num_texts() -> int:
    """How many groups of texts there are."""
    return len(json.loads(TEXTS.read_text()))


def _frame_bytes(group: SharedGroup) -> int:
    return len(encode_frame(group))


def _content_bytes(group: SharedGroup) -> int:
    return len(encode_group(group))


class BenchmarkNode:
    """One node, in a process of its own, told what to do over a pipe."""

    def __init__(self, rank: int, config: SwarmConfig, host: str, transport: str) -> None:
        self.rank = rank
        self.admitted: dict[tuple[int, int], float] = {}  # when, by author and number
        self.wanted = 0
        self.complete = asyncio.Event()
        identity = Identity(Ed25519PrivateKey.generate())
        self._transport = local_transport(transport, identity, config.swarm_id, host)
        self.member = Member(
            identity,
            self._transport,
            config,
            rescore=self._rescore,
            about=lambda: NodeAbout("trainer", "swarm-node/0.1.0", "smollm2-135m", ("reasoning_gym/chain_sum",)),
            state_path=None,
            clock=system_clock,
            rng=random.Random(),
        )

    async def _rescore(self, group: SharedGroup) -> Rescored:
        """Score a group; nothing is awaited between this and its place in the pool."""
        self.admitted[group.task.seed, group.task.index] = time.time()
        if len(self.admitted) == self.wanted:
            self.complete.set()
        return Rescored("scored", tuple(float(number % 2) for number in range(len(group.completions))), True)

    async def start(self) -> None:
        """Join the swarm."""
        await self.member.start()

    def traffic(self) -> dict[str, int]:
        """What the member has counted."""
        status = self.member.status()
        names = ("bytes_in", "bytes_out", "groups_sampled", "groups_missing", "frames_pulled", "frames_failed",
                 "requests_failed", "announcements_seen", "batches_heard")  # fmt: skip
        return {name: status[name] for name in names}

    @property
    def dht_bytes_in(self) -> int:
        """The part of what was received that is DHT calls and their answers, where the transport tells them apart."""
        seen = getattr(self._transport, "_filter", None)
        return 0 if seen is None else int(seen.bytes_in)

    async def gather(self, at_s: float, first: int, num: int, num_wanted: int, limit_s: float) -> dict[str, Any]:
        """Publish at a moment that all share, and wait for what all others publish."""
        groups = real_groups(self.rank, first, num)
        self.admitted.clear()
        self.complete.clear()
        self.wanted = num_wanted
        before = self.traffic()
        await asyncio.sleep(max(0.0, at_s - time.time()))
        start_s = time.time()
        await self.member.publish(groups)
        published_s = time.time()
        try:
            async with asyncio.timeout(limit_s):
                await self.complete.wait()
        except TimeoutError:
            pass  # what is missing then is the figure
        await asyncio.sleep(0.5)  # whoever still lacks something is served
        after = self.traffic()
        self.member.sample(num_wanted)
        return {
            "start_s": start_s,
            "publish_s": published_s - start_s,
            "admitted": [[author, number, at_s] for (author, number), at_s in self.admitted.items()],
            "refusals": self.member.status()["refusals"],
            **{name: after[name] - before[name] for name in after},
        }

    async def publish_for(self, seconds: float, first: int) -> int:
        """Publish now and then; return how many groups."""
        num, start_s = 0, time.monotonic()
        while time.monotonic() < start_s + seconds:
            await self.member.publish(real_groups(self.rank, first + num, NUM_PUBLISHED))
            num += NUM_PUBLISHED
            await asyncio.sleep(PUBLISH_EVERY_S)
        return num

    async def num_admitted(self) -> int:
        """How many groups of others this node has."""
        return int(self.member.status()["groups_admitted"])

    async def sample(self, rounds: int, warmup: int, round_s: float, external: int) -> dict[str, Any]:
        """Live some rounds, and some more that count."""
        rng = random.Random(self.rank)
        await asyncio.sleep(rng.uniform(0, round_s))
        before, dht_before, used_bytes, ages = self.traffic(), self.dht_bytes_in, 0, list[float]()
        for number in range(warmup + rounds):
            if number == warmup:
                before, dht_before, used_bytes, ages = self.traffic(), self.dht_bytes_in, 0, []
            for sampled in self.member.sample(external):
                used_bytes += _frame_bytes(sampled.group)
                ages.append(sampled.age_s)
            await self.member.publish(real_groups(self.rank, number * external, external))
            await asyncio.sleep(round_s * rng.uniform(0.8, 1.2))
        after = self.traffic()
        joining = {"bytes_in_before": before["bytes_in"], "dht_bytes_in": self.dht_bytes_in - dht_before}
        return {
            "used_bytes": used_bytes,
            "ages_s": ages,
            **joining,
            **{name: after[name] - before[name] for name in after},
        }


def _run_node(pipe: Connection, make: Callable[[], BenchmarkNode], namespace: str | None) -> None:
    if namespace is not None:
        enter_namespace(namespace)
    asyncio.run(_serve(pipe, make))


async def _serve(pipe: Connection, make: Callable[[], BenchmarkNode]) -> None:
    """Start, say where, and do what the pipe says until it says no more."""
    node = make()
    await node.start()
    watcher = asyncio.create_task(node.member.wait_failed())
    try:
        pipe.send(node.member.addresses[0])
        while True:
            receiving = asyncio.create_task(asyncio.to_thread(pipe.recv))
            await asyncio.wait({receiving, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                watcher.result()
            name, arguments = await receiving
            if name == "close":
                break
            pipe.send(node.member.status() if name == "status" else await getattr(node, name)(**arguments))
    finally:
        watcher.cancel()
        await node.member.close()


class BenchmarkNodes:
    """All nodes, as their parent sees them. The first one is joined through by the others."""

    def __init__(
        self,
        num: int,
        settings: Callable[[int], dict[str, Any]],
        namespaces: Namespaces | None = None,
        *,
        node_class: type[BenchmarkNode] = BenchmarkNode,
        transport: str = "hivemind",
        num_at_once: int = 64,
    ) -> None:
        self._settings, self._namespaces = settings, namespaces
        self._node_class, self._transport, self._num_at_once = node_class, transport, num_at_once
        self.pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._peers: tuple[str, ...] = ()
        self.add(num)

    def add(self, num: int) -> None:
        """Start so many nodes, some at one time, and wait until they listen."""
        before = len(self.pipes)
        while len(self.pipes) < before + num:
            at_once = min(self._num_at_once, before + num - len(self.pipes)) if self._peers else 1
            pipes = [self._start() for _ in range(at_once)]
            addresses = [self.answer(pipe, START_WITHIN_S) for pipe in pipes]
            self._peers = self._peers or (addresses[0],)

    def _start(self) -> Connection:
        context, rank = mp.get_context("spawn"), len(self.pipes)
        ours, theirs = context.Pipe()
        network = self._namespaces
        host, namespace = ("127.0.0.1", None) if network is None else (network.hosts[rank], network.names[rank])
        config = SwarmConfig(**self._settings(rank), peers=self._peers)
        make = functools.partial(self._node_class, rank, config, host, self._transport)
        process = context.Process(target=_run_node, args=(theirs, make, namespace), daemon=True)
        process.start()
        theirs.close()
        self.pipes.append(ours)
        self._processes.append(process)
        return ours

    def kill(self, ranks: Sequence[int]) -> None:
        """End these nodes without a word, whatever they have started with them; their ranks are free."""
        for rank in sorted(ranks, reverse=True):
            process = psutil.Process(self._processes[rank].pid)
            for one in (process, *process.children(recursive=True)):
                one.kill()
            self._processes.pop(rank).join()
            self.pipes.pop(rank).close()

    def __enter__(self) -> "BenchmarkNodes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.send(("close", {}))
        for process in self._processes:
            process.join(15)
            if process.is_alive():
                process.kill()

    def all_do(self, name: str, limit_s: float, /, **arguments: Any) -> list[Any]:
        """Let every node do the same; return what they answer."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return [self.answer(pipe, limit_s) for pipe in self.pipes]

    def link(self) -> list[int]:
        """Wait until all have as many peers as they choose; return how many."""
        wanted = min(len(self.pipes) - 1, SwarmConfig().num_outbound)
        deadline_s = time.monotonic() + LINK_WITHIN_S
        while True:
            found = [status["num_peers"] for status in self.all_do("status", 10)]
            if min(found) >= wanted or time.monotonic() > deadline_s:
                time.sleep(SETTLE_S)
                return found
            time.sleep(0.5)

    @staticmethod
    def answer(pipe: Connection, limit_s: float) -> Any:
        if not pipe.poll(limit_s):
            raise SystemExit(f"a node does not answer within {limit_s:g} s")
        try:
            return pipe.recv()
        except EOFError:
            raise SystemExit("a node has ended: its own words stand above") from None


def _num_groups(kilobytes: int, size: Callable[[SharedGroup], int]) -> int:
    """How many groups make so many kilobytes."""
    groups = real_groups(0, 0, num_texts())
    return math.ceil(1024 * kilobytes * len(groups) / sum(map(size, groups)))


def gather(args: argparse.Namespace) -> dict[str, Any]:
    """Measure how soon everybody has everything."""
    sizes = {f"{kilobytes}_kb": _num_groups(kilobytes, _content_bytes) for kilobytes in args.kilobytes}
    for kilobytes in args.compressed_kilobytes:
        sizes[f"{kilobytes}_kb_compressed"] = _num_groups(kilobytes, _frame_bytes)
    most = (args.nodes - 1) * max(sizes.values())
    settings = {"reserve_groups": most, "max_rescore_queue": 2 * most, "announce_fanout": args.nodes}
    found: dict[str, Any] = {"num_nodes": args.nodes, "rounds": args.rounds, "limit_s": args.limit_s}
    with BenchmarkNodes(args.nodes, lambda rank: settings) as nodes:
        found["num_peers"] = nodes.link()
        found["first_contact"] = _gather_once(nodes, 0, 1, args)
        first = 1
        for name, num in sizes.items():
            rounds = []
            for _ in range(args.rounds):
                rounds.append(_gather_once(nodes, first, num, args))
                first += num
                print(name, rounds[-1], flush=True)
            found[name] = rounds
    return found


def _gather_once(nodes: BenchmarkNodes, first: int, num: int, args: argparse.Namespace) -> dict[str, Any]:
    others = range(args.nodes)
    on_wire = loopback_bytes()
    answers = nodes.all_do(
        "gather",
        args.limit_s + 20,
        at_s=time.time() + 1.0,
        first=first,
        num=num,
        num_wanted=num * (args.nodes - 1),
        limit_s=args.limit_s,
    )
    on_wire = loopback_bytes() - on_wire
    latencies = []
    for answer in answers:
        latencies += [at_s - answers[author]["start_s"] for author, _, at_s in answer["admitted"]]
    num_wanted = num * args.nodes * (args.nodes - 1)
    published = [sum(map(_frame_bytes, real_groups(rank, first, num))) for rank in others]
    ideal = sum(published) * (args.nodes - 1)
    return {
        "groups_per_node": num,
        "frame_bytes_per_node": sum(published) / args.nodes,
        "completions_per_node": 8 * num,
        "delivered": len(latencies) / num_wanted,
        "latency_p50_s": round(quantile(latencies, 0.5), 3),
        # Of all that were wanted: what never came is later than anything that did.
        "latency_p95_s": round(quantile([*latencies, *[math.inf] * (num_wanted - len(latencies))], 0.95), 3)
        if len(latencies) >= 0.96 * num_wanted
        else None,
        "latency_max_s": round(max(latencies), 3),
        "publish_s": round(max(answer["publish_s"] for answer in answers), 3),
        "bytes_in_over_ideal": sum(answer["bytes_in"] for answer in answers) / ideal,
        "loopback_over_ideal": on_wire / ideal,
        "requests_failed": sum(answer["requests_failed"] for answer in answers),
        "refusals": answers[0]["refusals"],
    }


def sample(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what nodes pay for what they train on."""
    settings = {"reserve_groups": max(SwarmConfig().reserve_groups, 2 * args.external)}  # as `swarm-node join`
    with BenchmarkNodes(args.nodes, lambda rank: settings) as nodes:
        peers = nodes.link()
        limit_s = (args.rounds + args.warmup + 2) * args.round_s * 1.2 + 30
        on_wire, start_s = loopback_bytes(), time.monotonic()
        answers = nodes.all_do(
            "sample", limit_s, rounds=args.rounds, warmup=args.warmup, round_s=args.round_s, external=args.external
        )
        on_wire, seconds = loopback_bytes() - on_wire, time.monotonic() - start_s
    sums = {name: sum(answer[name] for answer in answers) for name in answers[0] if name != "ages_s"}
    ages = [age for answer in answers for age in answer["ages_s"]]
    return {
        "num_nodes": args.nodes,
        "num_peers": peers,
        "rounds": args.rounds,
        "round_s": args.round_s,
        "external": args.external,
        "sampled_of_wanted": sums["groups_sampled"] / (sums["groups_sampled"] + sums["groups_missing"]),
        "age_when_used_p50_s": round(quantile(ages, 0.5), 2),
        "frame_bytes": sums["used_bytes"] / sums["groups_sampled"],
        "bytes_in_per_completion": sums["bytes_in"] / (8 * sums["groups_sampled"]),
        "bytes_in_over_ideal": sums["bytes_in"] / sums["used_bytes"],
        "dht_over_ideal": sums["dht_bytes_in"] / sums["used_bytes"],  # a part of the line above
        "bytes_in_per_node_before": sums["bytes_in_before"] / args.nodes,  # joining, and the rounds of the warm-up
        "bytes_per_node_and_round": sums["bytes_in"] / args.nodes / args.rounds,
        "loopback_bytes_per_node_and_s": on_wire / args.nodes / seconds,  # warm-up included
        **{name: sums[name] for name in ("frames_pulled", "frames_failed", "requests_failed", "batches_heard")},
    }


def partition(num_nodes: int, within_s: float = 60.0) -> dict[str, Any]:
    """Cut a network in half for a minute; measure how soon after that everybody has nearly everything."""
    settings = {"reserve_groups": 4000, "max_rescore_queue": 4000, "max_author_share": 1.0}
    half = range(num_nodes // 2)
    with Namespaces(num_nodes) as network, BenchmarkNodes(num_nodes, lambda rank: settings, network) as nodes:
        found: dict[str, Any] = {"num_nodes": num_nodes, "num_peers": nodes.link()}
        before = nodes.all_do("publish_for", 30, seconds=2 * PUBLISH_EVERY_S, first=0)
        network.cut_off(half)
        during = nodes.all_do("publish_for", PARTITION_S + 20, seconds=PARTITION_S, first=before[0])
        num = [a + b for a, b in zip(before, during, strict=True)]  # groups of each node; all of them are live
        others = [sum(num) - own for own in num]

        def shares() -> list[float]:
            return [has / of for has, of in zip(nodes.all_do("num_admitted", 10), others, strict=True)]

        found["groups"], found["shares_parted"] = sum(num), shares()
        network.heal()
        start_s, found["shares_after_s"] = time.monotonic(), {}
        while (after_s := time.monotonic() - start_s) < within_s:
            found["shares_after_s"][round(after_s, 1)] = min(now := shares())
            if min(now) >= 0.99:
                break
            time.sleep(0.5)
        found["healed_s"] = round(after_s, 1) if min(now) >= 0.99 else None
    return found


def main() -> None:
    """Run one of them and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gather", "sample", "partition"))
    parser.add_argument("--nodes", type=int, help="8; 6 of partition")
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[28, 256], help="of groups, by each node")
    parser.add_argument("--compressed-kilobytes", type=int, nargs="*", default=[256], help="of frames")
    parser.add_argument("--rounds", type=int, help="measured: 3 of gather, 8 of sample")
    parser.add_argument("--warmup", type=int, default=6, help="rounds of sample before those")
    parser.add_argument("--round-s", type=float, default=15.0)
    parser.add_argument("--external", type=int, default=4)
    parser.add_argument("--limit-s", type=float, default=60.0, help="for one round of `gather`")
    args = parser.parse_args()
    args.nodes = args.nodes or (6 if args.what == "partition" else 8)
    args.rounds = args.rounds or (3 if args.what == "gather" else 8)
    measure = {"gather": gather, "sample": sample, "partition": lambda args: partition(args.nodes)}[args.what]
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
