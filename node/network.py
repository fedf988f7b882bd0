"""`swarm-node network`: the swarm as a whole, as nodes tell of each other, seen by a stranger who joins nothing.

Whom a node knows it says when asked; so any one live node is enough to begin with. What a record says of its node
(model, tasks, rollouts per minute) is the node's own account.
"""

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from node.addresses import checked_peers
from node.config import RunConfig
from node.control import newest_status, read_status
from node.join import make_transport
from node.membership import software
from node.options import RUNS
from node.status import SCHEMA_VERSION
from protocol.about import NO_MODEL, NodeAbout
from protocol.clock import system_clock
from protocol.crawl import Crawled, crawl
from protocol.identity import Identity
from protocol.refusals import Refusal
from protocol.transport.base import Transport, TransportError
from swarm.errors import UserError

__all__ = ["NobodyAnswers", "describe_network", "network_view", "show_network"]

_MAX_NODES: Final = 10_000
_ABOUT: Final = NodeAbout("bootstrap", f"{software()} network", NO_MODEL, ())


class NobodyAnswers(UserError):
    """No node could be begun with."""


def show_network(
    peers: Sequence[str],
    swarm_id: str | None,
    transport: str | None,
    run_dir: Path | None,
    *,
    timeout_s: float,
    as_json: bool,
) -> int:
    """Print the swarm."""
    given: dict[str, str | None] = {"swarm_id": swarm_id, "transport": transport}
    addresses = checked_peers(peers)
    if not addresses:
        addresses, known = _addresses_of(run_dir if run_dir is not None else newest_status(RUNS), transport)
        given = {name: value or known[name] for name, value in given.items()}
    sections = (("swarm", "swarm_id"), ("network", "transport"))
    config = RunConfig.model_validate({section: {name: given[name]} for section, name in sections if given[name]})
    found = asyncio.run(_look(config, addresses, timeout_s))
    network = describe_network(found, config.swarm.swarm_id, time.time())
    if as_json:
        print(json.dumps(network))
    else:
        Console().print(network_view(network))
    return 0


def _addresses_of(run_dir: Path, transport: str | None) -> tuple[list[str], dict[str, str]]:
    """Return the addresses to begin with, the swarm and the transport of a node that runs here, or has run.

    Of a bridge, the side of this transport, or the first.
    """
    status = read_status(run_dir)
    if status["swarm"] is None:
        raise NobodyAnswers(f"{run_dir} is of a node that learns alone; name a node of a swarm with --peers")
    sides = status.get("sides", [status["swarm"]])
    swarm = next((side for side in sides if side["transport"] == transport), sides[0])
    known = {name: str(swarm[name]) for name in ("swarm_id", "transport")}
    return [*swarm["addresses"], *swarm["given_peers"]], known


async def _look(config: RunConfig, addresses: Sequence[str], timeout_s: float) -> list[Crawled]:
    """Walk over the swarm under an identity that is forgotten afterwards."""
    with tempfile.TemporaryDirectory(prefix="swarm-network-") as folder:
        identity = Identity.create(Path(folder) / "identity")
    transport = make_transport(config, identity)
    await transport.start()
    try:
        return await _walk(transport, identity, config.swarm.swarm_id, addresses, timeout_s)
    finally:
        await transport.close()


async def _walk(
    transport: Transport, identity: Identity, swarm_id: str, addresses: Sequence[str], timeout_s: float
) -> list[Crawled]:
    try:
        return await crawl(
            transport,
            identity,
            swarm_id,
            addresses,
            about=_ABOUT,
            clock=system_clock,
            rng=random.Random(),
            timeout_s=timeout_s,
            max_nodes=_MAX_NODES,
        )
    except (TransportError, ValueError, Refusal) as error:
        which = addresses[0] if len(addresses) == 1 else f"none of {len(addresses)} addresses"
        answers = "does not answer" if len(addresses) == 1 else "answers"
        raise NobodyAnswers(f"{which} {answers} ({error}); name a live node with --peers") from error


def describe_network(found: Sequence[Crawled], swarm_id: str, now_s: float) -> dict[str, Any]:
    """Return the swarm as plain data; the nodes that answer first."""
    nodes: list[dict[str, Any]] = [
        {
            "node_id": one.record.node_id,
            "transport": one.record.transport,
            "reachable": one.reachable,
            "is_beyond": one.is_beyond,
            "rtt_ms": one.rtt_ms,
            "role": one.record.role,
            "model": one.record.model,
            "software": one.record.software,
            "protocol_version": list(one.record.version),
            "tasks": list(one.record.tasks),
            "rollouts_per_minute": one.record.rollouts_per_minute,
            "addresses": list(one.record.addresses),
            "record_age_s": max(0.0, now_s - one.record.created_at_ms / 1000),
        }
        for one in sorted(
            found, key=lambda one: (not one.reachable, not one.is_beyond, one.record.role, one.record.node_id)
        )
        if one.record.software != _ABOUT.software
    ]
    live = [node for node in nodes if node["reachable"] or node["is_beyond"]]  # of the latter a bridge has just told
    trainers = [node for node in live if node["role"] == "trainer"]
    return {
        "schema_version": SCHEMA_VERSION,
        "swarm_id": swarm_id,
        "taken_at": now_s,
        "num_nodes": len(nodes),
        "num_reachable": sum(node["reachable"] for node in nodes),
        "num_beyond": sum(node["is_beyond"] for node in nodes),
        "num_trainers": len(trainers),
        "rollouts_per_minute": sum(node["rollouts_per_minute"] for node in trainers),
        "models": dict(Counter(node["model"] for node in trainers).most_common()),
        "software": dict(Counter(node["software"] for node in live).most_common()),
        "tasks": dict(Counter(task for node in trainers for task in node["tasks"]).most_common()),
        "nodes": nodes,
    }


def _place(one: Crawled) -> tuple[bool, bool, str, str]:
    """Where a node stands in the list."""
    return not one.reachable, not one.is_beyond, one.record.role, one.record.node_id


def network_view(network: dict[str, Any]) -> Group:
    """Draw the swarm."""
    totals = Table.grid(padding=(0, 2))
    totals.add_column(style="dim", justify="right")
    totals.add_column(overflow="fold")
    beyond = f"{network['num_beyond']} are beyond a bridge, " if network["num_beyond"] else ""
    totals.add_row(
        "nodes",
        f"{network['num_nodes']} known, {network['num_reachable']} answer, "
        f"{beyond}{network['num_trainers']} of these learn",
    )
    totals.add_row("rollouts", f"{network['rollouts_per_minute']:,} completions a minute, by their own account")
    for name in ("models", "tasks", "software"):
        totals.add_row(name, "   ".join(f"{key} ({count})" for key, count in network[name].items()) or "none")
    table = Table()
    for name in ("node", "role", "model", "tasks", "rollouts/min", "software", "protocol", "reach"):
        table.add_column(name, justify="right" if name == "rollouts/min" else "left", overflow="fold")
    for node in network["nodes"]:
        table.add_row(
            node["node_id"][:16],
            node["role"],
            node["model"],
            ", ".join(node["tasks"]),
            f"{node['rollouts_per_minute']:,}",
            node["software"],
            ".".join(map(str, node["protocol_version"])),
            _reach(node),
        )
    return Group(Text(f"swarm {network['swarm_id']!r}", style="bold"), totals, table)


def _reach(node: dict[str, Any]) -> Text:
    """Say how a node was reached; of one beyond a bridge, over what others reach it."""
    if node["reachable"]:
        return Text(f"{node['rtt_ms']:.0f} ms", style="green")
    return Text(node["transport"], style="yellow") if node["is_beyond"] else Text("no answer", style="red")
