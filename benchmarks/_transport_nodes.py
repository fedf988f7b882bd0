"""Real nodes over one transport, for `transports.py`: a process each, all on this machine.

    python benchmarks/_transport_nodes.py TRANSPORT --nodes 8 [--churn]

Every node publishes small batches at moments of its own within a window, and wants every group of all the others: so
the swarm is kept busy, and not jammed, at each of its sizes. With --churn, after that, 30 % of the nodes are killed;
the survivors publish at once, and as many new nodes start. Prints one JSON object.
"""

import argparse
import asyncio
import json
import random
import time
from typing import Any

import psutil
from _nodes import LINK_WITHIN_S, BenchmarkNode, BenchmarkNodes, loopback_bytes, quantile, real_groups

from protocol.config import SwarmConfig
from protocol.member import Rescored
from protocol.messages import SharedGroup

__all__ = ["DELIVERIES_PER_S", "MeasuredNode", "measure", "moments", "summary"]

DELIVERIES_PER_S = 30.0  # of groups, in the whole swarm: what two cores carry over either transport
MIN_WINDOW_S = 5.0
NUM_GROUPS = {2: 40, 8: 6, 16: 3}  # of each node; of larger swarms 1
NUM_AT_ONCE = 2  # nodes that start side by side: one for each core
LIMIT_S = 45.0  # after the window, until what has not come is missing
CHURN = 0.3
COMPLETIONS_PER_GROUP = 8

Key = tuple[int, int]  # author's rank, number of the group


def moments(rank: int, first: int, num: int, window_s: float) -> list[float]:
    """Return when within the window, in seconds, a node publishes each of its groups."""
    rng = random.Random(f"{rank} {first}")
    return sorted(rng.uniform(0, window_s) for _ in range(num))


class MeasuredNode(BenchmarkNode):
    """A node that says what it has cost."""

    def __init__(self, rank: int, config: SwarmConfig, host: str, transport: str) -> None:
        super().__init__(rank, config, host, transport)
        self._expected: set[Key] = set()
        self._start_s = self._listening_s = 0.0
        self._linked_s: float | None = None
        self.member.neighbours.on_link.append(self._note_link)

    async def start(self) -> None:
        """Join the swarm, and note how long listening takes."""
        self._start_s = time.monotonic()
        await super().start()
        self._listening_s = time.monotonic() - self._start_s

    def _note_link(self, _: object) -> None:
        if self._linked_s is None:
            self._linked_s = time.monotonic() - self._start_s

    async def _rescore(self, group: SharedGroup) -> Rescored:
        rescored = await super()._rescore(group)
        self._look()
        return rescored

    def _look(self) -> None:
        if self._expected <= self.admitted.keys():
            self.complete.set()

    async def usage(self) -> dict[str, Any]:
        """What this process and its children have used since they started, and what the member has counted."""
        family = [psutil.Process(), *psutil.Process().children(recursive=True)]
        times = [one.cpu_times() for one in family]
        return {
            **self.traffic(),
            "groups_admitted": self.member.status()["groups_admitted"],
            "cpu_s": sum(one.user + one.system for one in times),
            "memory_mib": [one.memory_full_info().uss / 2**20 for one in family],
            "listening_s": self._listening_s,
            "linked_s": self._linked_s,
        }

    async def spread(
        self, at_s: float, window_s: float, first: int, num: int, expected: list[Key], limit_s: float
    ) -> dict[str, Any]:
        """Publish so many groups within a window that all share, and wait for what is expected."""
        published: dict[int, float] = {}
        before = await self.usage()
        for number, moment in enumerate(moments(self.rank, first, num, window_s), first):
            await asyncio.sleep(max(0.0, at_s + moment - time.time()))
            published[number] = time.time()
            await self.member.publish(real_groups(self.rank, number, 1))
        await self.expect(expected, at_s + window_s + limit_s - time.time())
        after = await self.usage()
        return {
            "published": list(published.items()),
            "admitted": [[*key, self.admitted[key]] for key in map(tuple, expected) if key in self.admitted],
            "used": {name: after[name] - before[name] for name in (*self.traffic(), "groups_admitted", "cpu_s")},
        }

    async def expect(self, expected: list[Key], limit_s: float) -> float:
        """Wait until these groups are here, or the time is over; return the share that is."""
        self._expected = set(map(tuple, expected))  # type: ignore[arg-type]
        self.complete.clear()
        self._look()
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                await self.complete.wait()
        except TimeoutError:
            pass  # what is missing then is the figure
        return len(self._expected & self.admitted.keys()) / len(self._expected)


def summary(answers: list[dict[str, Any]], ranks: list[int], num_expected: int, since_s: float) -> dict[str, Any]:
    """Return what `spread` has shown. `num_expected` is of groups, by one node; `since_s` when the window began."""
    published = {
        (rank, number): at_s
        for rank, answer in zip(ranks, answers, strict=True)
        for number, at_s in answer["published"]
    }
    admitted = [(published[author, number], at_s) for answer in answers for author, number, at_s in answer["admitted"]]
    latencies = [at_s - published_s for published_s, at_s in admitted]
    used = {name: sum(answer["used"][name] for answer in answers) for name in answers[0]["used"]}
    num_wanted, num_completions = num_expected * len(answers), COMPLETIONS_PER_GROUP * len(admitted)
    return {
        "num_groups_wanted": num_wanted,
        "delivered": len(admitted) / num_wanted,
        "latency_p50_s": round(quantile(latencies, 0.5), 3),
        "latency_p99_s": round(quantile(latencies, 0.99), 3),
        "latency_max_s": round(max(latencies), 3),
        "last_after_s": round(max(at_s for _, at_s in admitted) - since_s, 2),
        "announcements_heard_again": used["announcements_seen"] / max(1, used["batches_heard"]) - 1,
        "bodies_twice": used["frames_pulled"] / max(1, used["groups_admitted"]) - 1,
        "bytes_in_per_rollout": used["bytes_in"] / num_completions,
        "cpu_ms_per_rollout": 1000 * used["cpu_s"] / num_completions,
        "requests_failed": used["requests_failed"],
    }


def measure(transport: str, num_nodes: int, deliveries_per_s: float, *, churn: bool) -> dict[str, Any]:
    """Run one swarm."""
    num = NUM_GROUPS.get(num_nodes, 1)
    most = 4 * num_nodes * num
    settings = {
        "reserve_groups": most,
        "max_rescore_queue": 2 * most,
        "max_author_share": 1.0,
        "max_rescore_share": 1.0,
    }
    start_s = time.monotonic()
    with BenchmarkNodes(
        num_nodes, lambda rank: settings, node_class=MeasuredNode, transport=transport, num_at_once=NUM_AT_ONCE
    ) as nodes:
        all_started_s, peers = time.monotonic() - start_s, nodes.link()
        usages = nodes.all_do("usage", 30)
        found = {
            "num_nodes": num_nodes,
            "all_started_s": round(all_started_s, 1),
            "listening_p50_s": round(quantile([usage["listening_s"] for usage in usages], 0.5), 2),
            "linked_p50_s": round(quantile([usage["linked_s"] or LINK_WITHIN_S for usage in usages[1:]], 0.5), 2),
            "cpu_s_to_join": round(sum(usage["cpu_s"] for usage in usages) / num_nodes, 2),
            "memory_mib": round(quantile([sum(usage["memory_mib"]) for usage in usages], 0.5), 1),
            "num_peers": [min(peers), max(peers)],
        }
        ranks = list(range(num_nodes))
        found |= _spread(nodes, ranks, 0, num, deliveries_per_s)
        if churn:
            found["churn"] = _churn(nodes, ranks, num, deliveries_per_s)
    return found


def _spread(nodes: BenchmarkNodes, ranks: list[int], first: int, num: int, deliveries_per_s: float) -> dict[str, Any]:
    """Let all publish and wait, and weigh what the wire has carried."""
    num_expected = (len(ranks) - 1) * num
    window_s = max(MIN_WINDOW_S, num_expected * len(ranks) / deliveries_per_s)
    at_s, on_wire = time.time() + 1, loopback_bytes()
    for pipe, rank in zip(nodes.pipes, ranks, strict=True):
        wanted = [(other, number) for other in ranks if other != rank for number in range(first, first + num)]
        given = {"at_s": at_s, "window_s": window_s, "first": first, "num": num, "expected": wanted}
        pipe.send(("spread", given | {"limit_s": LIMIT_S}))
    answers = [nodes.answer(pipe, window_s + LIMIT_S + 20) for pipe in nodes.pipes]
    found = summary(answers, ranks, num_expected, at_s)
    num_completions = COMPLETIONS_PER_GROUP * found["delivered"] * found["num_groups_wanted"]
    return found | {
        "window_s": round(window_s, 1),
        "loopback_per_rollout": (loopback_bytes() - on_wire) / num_completions,
    }


def _churn(nodes: BenchmarkNodes, ranks: list[int], num: int, deliveries_per_s: float) -> dict[str, Any]:
    """Kill some, let the survivors publish at once, and let as many new nodes come."""
    gone = ranks[1 : 1 + max(1, round(CHURN * len(ranks)))]
    nodes.kill(gone)
    killed_s = time.time()
    survivors = [rank for rank in ranks if rank not in gone]
    found = _spread(nodes, survivors, num, num, deliveries_per_s)
    found["recovered_s"] = round(found["last_after_s"] + 1, 2)  # the window begins a second after the deaths
    began_s = time.time()
    nodes.add(len(gone))
    wanted = [(rank, number) for rank in survivors for number in range(num, 2 * num)]
    new = nodes.pipes[len(survivors) :]
    for pipe in new:
        pipe.send(("expect", {"expected": wanted, "limit_s": LIMIT_S}))
    shares = [nodes.answer(pipe, LIMIT_S + 20) for pipe in new]
    return found | {
        "num_killed": len(gone),
        "newcomers_delivered": min(shares),
        "newcomers_after_s": round(time.time() - began_s, 1),
        "began_after_s": round(began_s - killed_s, 1),
    }


def main() -> None:
    """Run one swarm and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("transport", choices=("hivemind", "libp2p"))
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--deliveries-per-s", type=float, default=DELIVERIES_PER_S, help="of groups, in the swarm")
    parser.add_argument("--churn", action="store_true", help="kill some in the end")
    args = parser.parse_args()
    print(json.dumps(measure(args.transport, args.nodes, args.deliveries_per_s, churn=args.churn)))


if __name__ == "__main__":
    main()
