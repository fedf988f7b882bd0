"""Compare the transports: what the same members pay, and how soon they have what others wrote, over each.

    python benchmarks/transports.py [--nodes 2 8 16 48] [--transports hivemind libp2p] [--deliveries-per-s 30]

For each size and transport as many real nodes as that, a process each, with the settings of `swarm-node join`, in a
network namespace of their own where that is allowed. Each publishes groups at moments of its own and wants all groups
of all the others, at so many deliveries a second in the whole swarm (`_transport_nodes.py`). More than
the machine carries shows what the transport costs, in latencies that are then waits for a core.

    latency       from `publish` until the body of a group has been pulled, verified and handed to the verifier
    delivery      groups that came within 45 s after the last was published, of all that were wanted
    duplicates    announcements that told a node nothing new, for each that did; bodies that came twice
    bytes, CPU    of all nodes and their daemons while that goes on, for each completion delivered (eight a group): what
                  the transport has counted, and the interface's own counter, which has everything
    start         from a member's start until it listens, until its first link, the CPU that it takes; two at one time
    memory        of one node with its daemon, in pages of its own; it has no model and no torch
    churn         30 % are killed; how late the survivors have 99 % of what they publish from the next second on, and
                  how long as many new nodes take from their start until they have it too

Scoring costs nothing here: a stand-in gives half of the completions a reward.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from _transport_nodes import DELIVERIES_PER_S
from exchange import isolated
from harness import Bar, PeerError, report, run_peer

__all__: list[str] = []

NODES = Path(__file__).with_name("_transport_nodes.py")
TRANSPORTS = ("hivemind", "libp2p")
MIN_DELIVERED = 0.99
MAX_LATENCY_P50_S = 1.0
MAX_BODIES_TWICE = 0.01
MAX_RECOVERED_S = 30.0
RUN_LIMIT_S = 600.0


def run(transport: str, num_nodes: int, deliveries_per_s: float, *, churn: bool) -> dict[str, Any] | None:
    """Run one swarm; None where it did not come to an end."""
    script = [sys.executable, NODES, transport, f"--nodes={num_nodes}", f"--deliveries-per-s={deliveries_per_s}"]
    try:
        found = run_peer(isolated([*script, *(["--churn"] if churn else [])]), time_limit_s=RUN_LIMIT_S)
    except PeerError as error:
        print(f"{transport}, {num_nodes} nodes: {error}", file=sys.stderr, flush=True)
        return None
    print(f"{transport}, {num_nodes} nodes: {found}", flush=True)
    return found


def bars_of(transport: str, num_nodes: int, found: dict[str, Any] | None) -> list[Bar]:
    """What one swarm is held to."""
    name, found = f"{transport}, {num_nodes} nodes", found or {}
    bars = [
        Bar(f"{name}: share of groups delivered", found.get("delivered"), MIN_DELIVERED),
        Bar(f"{name}: latency p50, s", found.get("latency_p50_s"), MAX_LATENCY_P50_S, at_least=False),
        Bar(f"{name}: bodies that came twice", found.get("bodies_twice"), MAX_BODIES_TWICE, at_least=False),
    ]
    churn = found.get("churn")
    if churn is not None:
        bars.append(Bar(f"{name}: delivered after churn", churn["delivered"], MIN_DELIVERED))
        bars.append(Bar(f"{name}: recovered after churn, s", churn["recovered_s"], MAX_RECOVERED_S, at_least=False))
        bars.append(Bar(f"{name}: delivered to newcomers", churn["newcomers_delivered"], MIN_DELIVERED))
    return bars


def main() -> None:
    """Measure every size over every transport and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8, 16, 48])
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    parser.add_argument("--churn-nodes", type=int, default=16, help="the size at which nodes are killed")
    parser.add_argument("--deliveries-per-s", type=float, default=DELIVERIES_PER_S, help="of groups, in a swarm")
    args = parser.parse_args()
    figures: dict[str, Any] = {transport: {} for transport in args.transports}
    bars: list[Bar] = []
    for num_nodes in args.nodes:
        for transport in args.transports:
            found = run(transport, num_nodes, args.deliveries_per_s, churn=num_nodes == args.churn_nodes)
            figures[transport][f"{num_nodes}_nodes"] = found
            bars += bars_of(transport, num_nodes, found)
    report(figures | {"deliveries_per_s": args.deliveries_per_s}, bars)


if __name__ == "__main__":
    main()
