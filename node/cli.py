"""The command line, `swarm-node`: reads what was typed, and hands it to the module that does it.

Everything slow is imported by the command that needs it, so that `--help` answers at once. A user's mistake is
one line on stderr and status 2; see `node.silo` for the other exit statuses.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from node.openmp import choose_waiting

if TYPE_CHECKING:
    from node.layers import Layer, ResolvedConfig

__all__ = ["cli", "main", "run"]

USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130
_RUNS = Path("runs")

_settings_options = [
    click.option("--model", metavar="NAME", help="tiny, smollm2-135m, a folder, a .gguf file or a hub id.  [tiny]"),
    click.option("--tasks", metavar="LIST", help="As in products:2,chain_sum or questions.jsonl; weight after colon."),
    click.option("--config", "config_file", type=click.Path(path_type=Path), help="A TOML file with settings."),
    click.option("--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting; may be repeated."),
]


def with_settings(command: Any) -> Any:
    """Add the options that settings come from."""
    for option in reversed(_settings_options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("swarm-node"), prog_name="swarm-node")
def cli() -> None:
    """Train a language model by reinforcement learning on verifiable tasks, alone or in a swarm."""


@cli.command()
@with_settings
@click.option("--rounds", type=int, metavar="N", help="Rounds until the run is finished.")
@click.option("--seed", type=int, metavar="N", help="Fixes everything random.  [0]")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run is kept.  [runs/MODEL-TIME]")
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, or with the newest in runs/.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a round on stdout.")
def silo(
    model: str | None,
    tasks: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    rounds: int | None,
    seed: int | None,
    run_dir: Path | None,
    resume: bool,
    as_json: bool,
) -> int:
    """Learn alone, on this machine."""
    from node.layers import read_toml, resolve
    from node.run_folder import RunFolder, newest_run, refuse_other_run
    from node.silo import run_silo

    if run_dir is None and resume:
        run_dir = newest_run(_RUNS).path
    flags = {"model.name": model, "tasks.sources": tasks, "rounds": rounds, "seed": seed}
    layers = _layers(flags, config_file, assignments)
    saved = RunFolder(run_dir).saved_config(resume) if run_dir is not None else None
    if saved is not None:
        layers.append(read_toml(saved))
    config = resolve(layers).config
    if run_dir is None:
        run_dir = _new_run_dir(config.model.name)
    with RunFolder(run_dir) as folder:
        if saved is not None:
            refuse_other_run(run_dir, resolve([read_toml(saved)]).config, config)
        else:
            folder.refuse_occupied()
        return run_silo(config, folder, as_json=as_json)


@cli.command("eval")
@click.argument("run_dir", required=False, type=click.Path(path_type=Path))
@with_settings
@click.option("--items", type=int, metavar="N", help="Held-out questions.  [256]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def evaluate(
    run_dir: Path | None,
    model: str | None,
    tasks: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    items: int | None,
    as_json: bool,
) -> int:
    """Held-out pass@1 of the run in RUN_DIR, or of a model as it is."""
    from node.layers import read_toml, resolve
    from node.run_folder import RunFolder

    if (run_dir is None) == (model is None):
        raise click.UsageError("name either a RUN_DIR or a --model")
    flags = {"model.name": model, "tasks.sources": tasks, "evaluation.num_items": items}
    layers = _layers(flags, config_file, assignments)
    folder = None
    if run_dir is not None:
        folder = RunFolder(run_dir)
        folder.refuse_missing()
        layers.append(read_toml(folder.config))
    from node.saved import evaluate_policy

    evaluate_policy(resolve(layers).config, folder, as_json=as_json)
    return 0


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def export(run_dir: Path, target: Path) -> int:
    """Write the policy of the run in RUN_DIR to the folder TARGET, for transformers and vLLM."""
    from node.run_folder import RunFolder

    folder = RunFolder(run_dir)
    folder.refuse_missing()
    from node.saved import export_policy

    export_policy(folder, target)
    return 0


@cli.command()
@click.option("--run-dir", type=click.Path(path_type=Path), default=_RUNS / "node", show_default=True)
def init(run_dir: Path) -> int:
    """Make the node's identity, a key pair that is never replaced."""
    from node.run_folder import RunFolder
    from protocol.identity import Identity

    path = RunFolder(run_dir).identity
    existed = path.exists()
    identity = Identity.load_or_create(path)
    click.echo(f"{'identity' if existed else 'new identity'} {identity.node_id} in {path}")
    return 0


@cli.command()
@with_settings
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def doctor(
    model: str | None, tasks: str | None, config_file: Path | None, assignments: tuple[str, ...], as_json: bool
) -> int:
    """Say whether a node can run here. The exit status is 0 if it can, else 1."""
    from node.doctor import examine
    from node.layers import resolve

    flags = {"model.name": model, "tasks.sources": tasks}
    return examine(resolve(_layers(flags, config_file, assignments)).config, as_json=as_json)


@cli.group()
def config() -> None:
    """Settings."""


@config.command()
@with_settings
@click.option("--rounds", type=int, metavar="N", help="Rounds until the run is finished.")
@click.option("--seed", type=int, metavar="N", help="Fixes everything random.")
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--describe", is_flag=True, help="Say what each setting means.")
def show(
    model: str | None,
    tasks: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    rounds: int | None,
    seed: int | None,
    origin: bool,
    describe: bool,
) -> int:
    """Print the settings that a run would have."""
    from node.config import to_toml
    from node.layers import resolve

    flags = {"model.name": model, "tasks.sources": tasks, "rounds": rounds, "seed": seed}
    resolved = resolve(_layers(flags, config_file, assignments))
    if origin or describe:
        _print_settings(resolved, origin=origin, describe=describe)
    else:
        click.echo(to_toml(resolved.config), nl=False)
    return 0


def _print_settings(resolved: "ResolvedConfig", *, origin: bool, describe: bool) -> None:
    from node.config import setting_values
    from node.layers import setting_fields, shown

    fields = setting_fields()
    for name, value in setting_values(resolved.config).items():
        line = f"{name} = {shown(value)}"
        if origin:
            line = f"{line:<56} {resolved.origins[name]}"
        if describe:
            line = f"{line:<56} # {fields[name].description}"
        click.echo(line.rstrip())


def _layers(flags: Mapping[str, object], config_file: Path | None, assignments: Sequence[str]) -> list["Layer"]:
    """Return the layers that every command reads, strongest first."""
    from node.layers import Layer, read_assignments, read_environment, read_toml

    given = {name: value for name, value in flags.items() if value is not None}
    names = {"model.name": "--model", "tasks.sources": "--tasks", "evaluation.num_items": "--items"}
    origins = {name: names.get(name, f"--{name}") for name in given}
    layers = [Layer("command line", given, origins), read_assignments(assignments), read_environment()]
    return layers if config_file is None else [*layers, read_toml(config_file)]


def _new_run_dir(model_name: str) -> Path:
    """Return a folder that does not exist yet, named after the model and the time."""
    stem = f"{Path(model_name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, count = _RUNS / stem, 1
    while path.exists():
        count += 1
        path = _RUNS / f"{stem}-{count}"
    return path


def run(arguments: Sequence[str]) -> int:
    """Run a command line; return the exit status. The boundary where errors become one line."""
    try:
        status = cli.main(args=list(arguments), prog_name="swarm-node", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except click.ClickException as error:
        return _fail(error.format_message(), USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        return _fail("stopped", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read stdout has left; what Python still flushes at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        status = _expected(error)
        if status is None:
            raise
        return _fail(str(error), status)


def _expected(error: Exception) -> int | None:
    """Return the exit status of an error that somebody raised on purpose; None for a bug."""
    from protocol.errors import ProtocolError
    from swarm.errors import TrainingDiverged, UserError

    if isinstance(error, UserError | ProtocolError):
        return USER_ERROR
    return DIVERGED if isinstance(error, TrainingDiverged) else None


def _fail(message: str, status: int) -> int:
    click.echo(f"swarm-node: {' '.join(message.split())}", err=True)
    return status


def main() -> None:
    """Entry point of `swarm-node`."""
    choose_waiting()
    sys.exit(run(sys.argv[1:]))
