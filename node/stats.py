"""Shows what a node does, for people and as JSON: `swarm-node stats` and `swarm-node peers`.

Where the numbers come from is `node.status`'s and `protocol.status`'s; how they are fetched, `node.control`'s.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from node.addresses import best_address
from node.control import newest_status, read_status
from node.display import duration
from node.drafts_shown import drafts_view
from node.options import RUNS
from node.status import SCHEMA_VERSION

__all__ = ["peers_table", "show_peers", "show_stats", "size", "stats_view"]

_WATCH_INTERVAL_S: Final = 2.0


def show_stats(run_dir: Path | None, socket: Path | None, *, as_json: bool, watch: bool) -> int:
    """Print what a node does, once or until Ctrl-C."""
    if run_dir is None and socket is None:
        run_dir = newest_status(RUNS)
    status = read_status(run_dir, socket)
    if not watch:
        _print(status, as_json=as_json)
        return 0
    if as_json or not sys.stdout.isatty():
        while True:
            _print(status, as_json=as_json)
            sys.stdout.flush()
            time.sleep(_WATCH_INTERVAL_S)
            status = read_status(run_dir, socket)
    with Live(stats_view(status), console=Console(), screen=False, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_INTERVAL_S)
            live.update(stats_view(read_status(run_dir, socket)), refresh=True)


def show_peers(run_dir: Path | None, socket: Path | None, *, as_json: bool) -> int:
    """Print the nodes that a node is connected to."""
    if run_dir is None and socket is None:
        run_dir = newest_status(RUNS)
    status = read_status(run_dir, socket)
    peers = [peer for side in _networks(status) for peer in side["peers"]]
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "running": status["running"], "peers": peers}))
        return 0
    console = Console()
    if not status["running"]:
        console.print(_header(status))
    if peers:
        console.print(peers_table(peers))
    else:
        console.print(f"{status['run_dir']}: no peers" + ("" if status["swarm"] else ": the node learns alone"))
    return 0


def _print(status: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(status))
    else:
        Console().print(stats_view(status))


def stats_view(status: Mapping[str, Any]) -> Group:
    """Draw a node's status."""
    parts: list[Any] = [_header(status)]
    training = status["training"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column(overflow="fold")
    if training is not None:
        _add_training(table, training)
    for network in _networks(status):
        _add_swarm(table, network, training)
        if "bridge" in network:
            _add_bridge(table, network["bridge"])
    for warning in status["warnings"]:
        table.add_row("warning", Text(warning, style="yellow"))
    parts.append(table)
    peers = [peer for network in _networks(status) for peer in network["peers"]]
    if peers:
        parts.append(peers_table(peers))
    return Group(*parts)


def _networks(status: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a status says of the networks that its node is in: none, one, or both sides of a bridge."""
    alone = [] if status["swarm"] is None else [status["swarm"]]
    sides: list[dict[str, Any]] = status.get("sides", alone)
    return sides


def _header(status: Mapping[str, Any]) -> Text:
    text = Text(f"{status['command']} · {status['run_dir']}", style="bold")
    if status["running"]:
        return text.append(f"  running for {duration(status['uptime_s'])}", style="not bold green")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status["taken_at"]))
    age = duration(max(0.0, time.time() - status["taken_at"]))
    return text.append(f"  not running: as it was at {when}, {age} ago", style="not bold yellow")


def _add_training(table: Table, training: Mapping[str, Any]) -> None:
    line = f"{training['round']} of {training['rounds']}"
    if training["round_s"] is not None:
        line += f", {training['round_s']:.2f} s each, now: {training['phase']}"
    table.add_row("round", f"{line}   {training['model']} on {training['tasks']}")
    last = f"last {training['num_window_rounds']} rounds"
    if training["reward_own_mean"] is not None:
        own, external = training["reward_own_mean"], training["reward_external_mean"]
        of_others = f"   of others {external:.3f}" if external is not None else ""
        table.add_row("reward", f"own {own:.3f}{of_others}   ({last})")
    if (rollouts := training.get("rollouts")) is not None:
        table.add_row(
            "rollouts",
            f"in flight {rollouts['num_groups_in_flight']:.1f} groups, {rollouts['num_groups_recycled']:.1f} recycled, "
            f"staleness {rollouts['staleness_mean']:.2f} on average, {rollouts['staleness_max']} at most, "
            f"saved {rollouts['saved_s']:.3f} s a round   ({last})",
        )
    if (drafted := training.get("drafts")) is not None:
        each = " a round" if drafted["draft_saved_s"] is not None else ""  # what was saved comes last
        table.add_row("drafts", f"{drafts_view(drafted)}{each}   ({last})")
    if training["pass_at_1_heldout"] is not None:
        table.add_row("held-out pass@1", f"{training['pass_at_1_heldout']:.3f}")
    if training["external_share"] is not None and training["num_external_wanted"]:
        table.add_row(
            "from others",
            f"{training['external_share']:.0%} of groups   nothing missing in {training['full_rounds_share']:.0%} "
            f"of rounds   ({last}; wanted {training['num_local_wanted']} own + {training['num_external_wanted']})",
        )


def _add_swarm(table: Table, swarm: Mapping[str, Any], training: Mapping[str, Any] | None) -> None:
    where = f"{swarm['state']} over {swarm['transport']}"
    table.add_row("node", f"{swarm['node_id']} in swarm {swarm['swarm_id']!r}, {where}")
    if swarm["addresses"]:
        table.add_row("address", best_address(swarm["addresses"]))
    table.add_row(
        "peers",
        f"{swarm['num_peers']} ({swarm['num_outbound']} chosen, {swarm['num_inbound']} came in), "
        f"{swarm['num_known_nodes']} nodes known",
    )
    table.add_row(
        "wire",
        f"{size(swarm['bytes_in'])} in, {size(swarm['bytes_out'])} out   requests {swarm['requests_in']:,} in, "
        f"{swarm['requests_out']:,} out, {swarm['requests_failed']:,} failed   restarts {swarm['transport_restarts']}",
    )
    table.add_row(
        "batches",
        f"{swarm['batches_published']:,} published, {swarm['batches_heard']:,} heard of, "
        f"{swarm['batches_admitted']:,} admitted, {swarm['batches_relayed']:,} relayed, "
        f"{swarm['announcements_duplicate']:,} heard twice",
    )
    details = swarm["transport_details"]
    if "reachability" in details:
        table.add_row(
            "reachable",
            f"{details['reachability']}   relays to this node {details['num_relays']}; relays for "
            f"{details['num_relayed_peers']} peers, {details['num_relayed_circuits']} circuits, "
            f"{size(details['relayed_bytes'])}",
        )
    for topic in details.get("topics", ()):
        _add_topic(table, topic)
    if training is None:
        return
    table.add_row(
        "groups",
        f"{swarm['groups_published']:,} published, {swarm['groups_admitted']:,} admitted, "
        f"{swarm['groups_sampled']:,} used, of {swarm.get('authors_sampled', 0)} authors lately, "
        f"{swarm['groups_missing']:,} missing",
    )
    table.add_row(
        "pool",
        f"{swarm['pool_groups']} of {swarm['pool_reserve']} groups in reserve, {size(swarm['pool_bytes'])}   "
        f"{swarm['rescore_queue']} wait to be scored",
    )
    staleness = swarm["staleness"]
    if staleness["p50_s"] is not None:
        table.add_row("staleness", f"half of what is used is older than {staleness['p50_s']:.1f} s")
    if swarm["refusals"]:
        refused = "  ".join(f"{name} {count:,}" for name, count in swarm["refusals"].items())
        table.add_row("refused", f"{swarm['num_rejected']:,} held against somebody, {swarm['num_ignored']:,} not")
        table.add_row("", refused)


def _add_topic(table: Table, topic: Mapping[str, Any]) -> None:
    """Show a topic of GossipSub: the mesh, what its peers are worth, and what became of messages."""
    scores, messages = sorted(topic["scores"].values()), topic["messages"]
    num_bad = sum(score < 0 for score in scores)
    worth = f", scores {scores[0]:+.1f} to {scores[-1]:+.1f}, {num_bad} below zero" if scores else ""
    table.add_row("mesh", f"{topic['mesh_size']} of {len(scores)} peers of the topic{worth}")
    table.add_row(
        "",
        f"{messages.get('sent', 0):,} messages sent, {messages.get('accept', 0):,} accepted and passed on, "
        f"{messages.get('duplicate', 0):,} heard twice, {messages.get('ignore', 0):,} ignored, "
        f"{messages.get('reject', 0):,} rejected",
    )


def _add_bridge(table: Table, bridge: Mapping[str, Any]) -> None:
    table.add_row(
        "bridge",
        f"{bridge['batches_offered']:,} batches offered across, {bridge['batches_taken']:,} taken from there, "
        f"{bridge['batches_known']:,} known already   {bridge['nodes_beyond']} nodes beyond",
    )
    table.add_row(
        "",
        f"{bridge['frames_fetched']:,} groups fetched for the other side, {bridge['frames_missed']:,} not to be had   "
        f"{bridge['frames_brought']:,} brought from there, {size(bridge['bytes_brought'])}",
    )


def peers_table(peers: list[dict[str, Any]]) -> Table:
    """Draw the nodes that a node is connected to."""
    table = Table(title="peers", title_justify="left", title_style="dim")
    for name in ("node", "way", "rtt", "for", "role", "model", "software", "reputation"):
        table.add_column(name, justify="right" if name in ("rtt", "for", "reputation") else "left")
    for peer in peers:
        table.add_row(
            peer["node_id"][:16],
            peer["direction"],
            "" if peer["rtt_ms"] is None else f"{peer['rtt_ms']:.1f} ms",
            duration(peer["since_s"]),
            peer["role"],
            peer["model"],
            peer["software"],
            f"{peer['reputation']:+.1f}",
        )
    return table


def size(num_bytes: float) -> str:
    """Return a number of bytes as people write it."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
