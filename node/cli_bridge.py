"""The command `bridge`: which two networks, and where each side listens."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.options import RUNS, layers_of

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.run_folder import RunFolder

__all__ = ["bridge"]

_PLACES = [
    click.option("--first-listen", metavar="MADDR", multiple=True, help="Where the first side listens, or a port."),
    click.option("--first-announce", metavar="MADDR", multiple=True, help="What others are told instead."),
    click.option("--second-listen", metavar="MADDR", multiple=True, help="The same of the second side."),
    click.option("--second-announce", metavar="MADDR", multiple=True, help="The same of the second side."),
]


def _with_places(command: Any) -> Any:
    for option in reversed(_PLACES):
        command = option(command)
    return command


@click.command()
@click.argument("sides", nargs=-1, metavar="SIDE SIDE")
@_with_places
@click.option("--swarm-id", metavar="NAME", help="Which swarm, on both sides.  [main]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A TOML file with settings, of both.")
@click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting, of both; may be repeated.")
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUNS / "bridge", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON now and then.")
def bridge(
    sides: tuple[str, ...],
    first_listen: tuple[str, ...],
    first_announce: tuple[str, ...],
    second_listen: tuple[str, ...],
    second_announce: tuple[str, ...],
    swarm_id: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    run_dir: Path,
    as_json: bool,
) -> int:
    """Join two networks into one swarm, be they of different transports or of one.

    A SIDE is TRANSPORT@MADDR with the address of any live node of that network, as in
    hivemind@/ip4/192.0.2.1/tcp/7000/p2p/12D3KooW…, several addresses with commas, or TRANSPORT alone: then it starts a
    network, or returns to the peers that it remembers. Without any, the bridge that ran in --run-dir goes on.
    """
    from node.bridge import run_bridge, second_folder
    from node.run_folder import RunFolder

    if sides and len(sides) != 2:
        raise click.UsageError(f"a bridge has two sides, not {len(sides)}: name each as TRANSPORT or TRANSPORT@MADDR")
    places = ((first_listen, first_announce), (second_listen, second_announce))
    with RunFolder(run_dir) as folder:
        folder.refuse_occupied()
        folders = (folder, second_folder(folder))
        if not sides and not folder.config.exists():
            raise click.UsageError(f"no bridge has run in {run_dir}: name two sides, as hivemind@MADDR libp2p")
        first, second = (
            _side_config(sides[number] if sides else "", *places[number], swarm_id, config_file, assignments, saved)
            for number, saved in enumerate(folders)
        )
        return run_bridge((first, second), folder, as_json=as_json)


def _side_config(
    side: str,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    swarm_id: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    saved: "RunFolder",
) -> "RunConfig":
    """Return the settings of one side: what was typed, over what it ran with before, over those of a bootstrap."""
    from node.addresses import checked_peers, expand_listen
    from node.layers import Layer, read_toml, resolve

    transport, _, peers = side.partition("@")
    flags = {
        "network.transport": transport or None,
        "swarm.peers": checked_peers([peers], f"{transport}@") or None,
        "swarm.swarm_id": swarm_id,
        "network.listen": expand_listen(listen) or None,
        "network.announce": [part.strip() for text in announce for part in text.split(",")] or None,
    }
    layers = layers_of(flags, config_file, assignments)
    if saved.config.exists():
        layers.append(read_toml(saved.config))
    layers.append(Layer("default of bridge", {"network.reachability": "public"}))  # it relays from its start
    return resolve(layers).config
