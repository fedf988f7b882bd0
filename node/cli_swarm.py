"""The commands that have to do with other nodes: join, bootstrap, stats, peers, network, demo."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.options import RUNS, in_run_folder, layers_of, with_run

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.display import Display
    from node.exchange import Exchange
    from node.layers import Layer
    from node.run_folder import RunFolder

__all__ = ["add_commands"]

_TRANSPORT = click.option(
    "--transport", type=click.Choice(["hivemind", "libp2p"]), help="What carries the bytes.  [hivemind]"
)
_NETWORK = [
    click.option("--peers", metavar="MADDR", multiple=True, help="A live node to join through; any one is enough."),
    click.option("--listen", metavar="MADDR", multiple=True, help="Where to listen, or a port.  [free ports]"),
    click.option("--announce", metavar="MADDR", multiple=True, help="What others are told instead."),
    click.option("--swarm-id", metavar="NAME", help="Which swarm.  [main]"),
    _TRANSPORT,
]
_WHERE = [
    click.option("--run-dir", type=click.Path(path_type=Path), help="The node's run folder.  [the newest in runs/]"),
    click.option("--socket", type=click.Path(path_type=Path), help="The node's control socket."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema_version."),
]


def _with(options: list[Any], command: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


def add_commands(cli: click.Group) -> None:
    """Add them to the command line."""
    for command in (join, bootstrap, stats, peers, network, demo):
        cli.add_command(command)


def _network_flags(
    peers: tuple[str, ...],
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    swarm_id: str | None,
    transport: str | None,
) -> dict[str, object]:
    from node.addresses import checked_peers, expand_listen

    return {
        "swarm.peers": checked_peers(peers) or None,
        "swarm.swarm_id": swarm_id,
        "network.listen": expand_listen(listen) or None,
        "network.announce": [part.strip() for text in announce for part in text.split(",")] or None,
        "network.transport": transport,
    }


@click.command()
@lambda command: _with(_NETWORK, command)
@click.option("--num-local", type=int, metavar="I", help="Own groups per round.  [4]")
@click.option("--num-external", type=int, metavar="J", help="Groups of others per round.  [4]")
@with_run
def join(
    model: str | None,
    tasks: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    rounds: int | None,
    seed: int | None,
    engine: str | None,
    run_dir: Path | None,
    resume: bool,
    as_json: bool,
    num_local: int | None,
    num_external: int | None,
    peers: tuple[str, ...],
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    swarm_id: str | None,
    transport: str | None,
) -> int:
    """Learn with others: exchange rollouts with the nodes of a swarm.

    Without --peers this node starts a swarm, or returns to the peers that it remembers. It learns alone while
    nobody answers, and never waits.
    """
    from node.layers import Layer
    from node.running import run_node

    flags = {
        "model.name": model,
        "tasks.sources": tasks,
        "rounds": rounds,
        "seed": seed,
        "engine.backend": engine,
        "sapo.num_local": num_local,
        "sapo.num_external": num_external,
        **_network_flags(peers, listen, announce, swarm_id, transport),
    }
    defaults = [Layer("default of join", {"sapo.num_local": 4, "sapo.num_external": 4})]

    def run(config: "RunConfig", folder: "RunFolder") -> int:
        def make_exchange(display: "Display") -> "Exchange":
            from node.join import make_swarm_exchange

            return make_swarm_exchange(config, folder, display)

        return run_node(config, folder, command="join", make_exchange=make_exchange, as_json=as_json)

    layers = layers_of(flags, config_file, assignments)
    return in_run_folder(layers, defaults, run_dir, resume, run, saved_layer=_without_silo_batches)


def _without_silo_batches(saved: "Layer") -> "Layer":
    """Return the settings of a run that goes on in a swarm: what it learned from while it was alone is not kept."""
    from node.layers import Layer

    if saved.values.get("sapo.num_external", 0) != 0:
        return saved
    alone = ("sapo.num_local", "sapo.num_external")
    kept = {name: value for name, value in saved.values.items() if name not in alone}
    return Layer(saved.origin, kept, saved.origins)


@click.command()
@lambda command: _with(_NETWORK, command)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A TOML file with settings.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting; may be repeated.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUNS / "bootstrap", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON now and then.")
def bootstrap(
    config_file: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path,
    as_json: bool,
    peers: tuple[str, ...],
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    swarm_id: str | None,
    transport: str | None,
) -> int:
    """Be a node that others find each other through. It routes and relays, and learns nothing."""
    from node.bootstrap import run_bootstrap
    from node.layers import Layer, read_toml, resolve
    from node.run_folder import RunFolder

    flags = _network_flags(peers, listen, announce, swarm_id, transport)
    layers = layers_of(flags, config_file, assignments)
    if RunFolder(run_dir).config.exists():
        layers.append(read_toml(RunFolder(run_dir).config))
    layers.append(Layer("default of bootstrap", {"network.reachability": "public"}))  # it relays from its start
    config = resolve(layers).config
    with RunFolder(run_dir) as folder:
        folder.refuse_occupied()
        return run_bootstrap(config, folder, as_json=as_json)


@click.command()
@lambda command: _with(_WHERE, command)
@click.option("--watch", is_flag=True, help="Show it again every two seconds.")
def stats(run_dir: Path | None, socket: Path | None, as_json: bool, watch: bool) -> int:
    """What a node does: its round, its peers, what it gives and gets. Of one that has ended, what it said last."""
    from node.stats import show_stats

    return show_stats(run_dir, socket, as_json=as_json, watch=watch)


@click.command()
@lambda command: _with(_WHERE, command)
def peers(run_dir: Path | None, socket: Path | None, as_json: bool) -> int:
    """The nodes that a node is connected to."""
    from node.stats import show_peers

    return show_peers(run_dir, socket, as_json=as_json)


@click.command()
@click.option("--peers", metavar="MADDR", multiple=True, help="A node to begin with.  [the newest in runs/]")
@click.option("--swarm-id", metavar="NAME", help="Which swarm.  [main, or that of the newest node in runs/]")
@_TRANSPORT
@click.option("--run-dir", type=click.Path(path_type=Path), help="Begin with the node of this run folder.")
@click.option("--timeout", "timeout_s", type=float, default=10.0, show_default=True, metavar="S", help="In seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema_version.")
def network(
    peers: tuple[str, ...],
    swarm_id: str | None,
    transport: str | None,
    run_dir: Path | None,
    timeout_s: float,
    as_json: bool,
) -> int:
    """The swarm as a whole, found by asking one node after another."""
    from node.network import show_network

    return show_network(peers, swarm_id, transport, run_dir, timeout_s=timeout_s, as_json=as_json)


@click.command()
@click.option("--nodes", "num_nodes", type=click.IntRange(2, 8), default=3, show_default=True, help="That learn.")
@click.option("--rounds", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N", help="Of each.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the runs are kept.  [runs/demo-TIME]")
def demo(num_nodes: int, rounds: int, run_dir: Path | None) -> int:
    """A swarm on this machine: a bootstrap, and nodes that learn from each other, with the model `tiny`."""
    from node.demo import run_demo

    return run_demo(num_nodes, rounds, run_dir, sys.stdout)
