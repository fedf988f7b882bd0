"""What several commands of the command line share: their options, and how a run folder and its settings are found."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.torchrun import launch

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.layers import Layer
    from node.run_folder import RunFolder

__all__ = ["RUNS", "in_run_folder", "layers_of", "new_run_dir", "with_run", "with_settings"]

RUNS = Path("runs")

_SETTINGS = [
    click.option("--model", metavar="NAME", help="tiny, smollm2-135m, a folder, a .gguf file or a hub id.  [tiny]"),
    click.option("--tasks", metavar="LIST", help="As in products:2,chain_sum or questions.jsonl; weight after colon."),
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="A TOML file with settings."),
    click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting; may be repeated."),
]
_RUN = [
    click.option("--rounds", type=int, metavar="N", help="Rounds until the run is finished."),
    click.option("--seed", type=int, metavar="N", help="Fixes everything random.  [0]"),
    click.option("--engine", type=click.Choice(["auto", "torch", "vllm"]), help="What writes rollouts.  [auto]"),
    click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run is kept.  [runs/MODEL-TIME]"),
    click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, or with the newest in runs/."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object a round on stdout."),
]
_FLAG_OF = {
    "model.name": "--model",
    "engine.backend": "--engine",
    "tasks.sources": "--tasks",
    "evaluation.num_items": "--items",
    "sapo.num_local": "--num-local",
    "sapo.num_external": "--num-external",
    "swarm.peers": "--peers",
    "swarm.swarm_id": "--swarm-id",
    "network.listen": "--listen",
    "network.announce": "--announce",
    "network.transport": "--transport",
}


def with_settings(command: Any) -> Any:
    """Add the options that settings come from."""
    for option in reversed(_SETTINGS):
        command = option(command)
    return command


def with_run(command: Any) -> Any:
    """Add the options of a command that runs a node, settings included."""
    for option in reversed(_RUN):
        command = option(command)
    return with_settings(command)


def layers_of(flags: Mapping[str, object], config_file: Path | None, assignments: Sequence[str]) -> "list[Layer]":
    """Return the layers that every command reads, strongest first. A flag that was not given is None."""
    from node.layers import Layer, read_assignments, read_environment, read_toml

    given = {name: value for name, value in flags.items() if value is not None}
    origins = {name: _FLAG_OF.get(name, f"--{name}") for name in given}
    layers = [Layer("command line", given, origins), read_assignments(assignments), read_environment()]
    return layers if config_file is None else [*layers, read_toml(config_file)]


def in_run_folder(
    layers: "list[Layer]",
    defaults: "list[Layer]",
    run_dir: Path | None,
    resume: bool,
    run: "Callable[[RunConfig, RunFolder], int]",
    *,
    saved_layer: "Callable[[Layer], Layer]" = lambda layer: layer,
) -> int:
    """Find the settings and the folder of a run, take the folder's lock, and run.

    `defaults` are weaker than what a resumed run was saved with, which `saved_layer` may change. Where another process
    is the node, and has the folder, this one trains with it.
    """
    if launch().follows:
        from node.ranks import follow

        return follow()
    from node.layers import read_toml, resolve
    from node.run_folder import RunFolder, newest_run, refuse_other_run

    if run_dir is None and resume:
        run_dir = newest_run(RUNS).path
    saved = RunFolder(run_dir).saved_config(resume) if run_dir is not None else None
    if saved is not None:
        layers = [*layers, saved_layer(read_toml(saved))]
    config = resolve([*layers, *defaults]).config
    if run_dir is None:
        run_dir = new_run_dir(config.model.name)
    with RunFolder(run_dir) as folder:
        if saved is not None:
            refuse_other_run(run_dir, resolve([read_toml(saved)]).config, config)
        else:
            folder.refuse_occupied()
        return run(config, folder)


def new_run_dir(name: str) -> Path:
    """Return a folder that does not exist yet, named after the model and the time."""
    stem = f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = RUNS / stem, 1
    while path.exists():
        count += 1
        path = RUNS / f"{stem}-{count}"
    return path
