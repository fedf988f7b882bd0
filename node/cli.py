"""The command line, `swarm-node`: reads what was typed, and hands it to the module that does it.

Everything slow is imported by the command that needs it, so that `--help` answers at once. A user's mistake is
one line on stderr and status 2; see `node.running` for the other exit statuses. What belongs to a swarm is in
`node.cli_swarm`.
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from node.cli_bridge import bridge
from node.cli_swarm import add_commands
from node.experiment.cli import experiment
from node.heap import limit_arenas
from node.importing import importing
from node.openmp import choose_waiting
from node.options import RUNS, in_run_folder, layers_of, with_run, with_settings
from node.torchrun import launch

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.layers import ResolvedConfig
    from node.run_folder import RunFolder

__all__ = ["cli", "main", "run"]

USER_ERROR = 2
DIVERGED = 3
INTERRUPTED = 130
_SHARED = ("silo", "join")  # the commands that several processes can be one node of


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("swarm-node"), prog_name="swarm-node")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train a language model by reinforcement learning on verifiable tasks, alone or in a swarm."""
    if launch().is_shared and context.invoked_subcommand not in _SHARED:
        raise click.UsageError(
            f"torchrun starts {' and '.join(_SHARED)} alone: run {context.invoked_subcommand} by itself"
        )


@cli.command()
@with_run
def silo(
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
) -> int:
    """Learn alone, on this machine."""
    from node.exchange import SiloExchange
    from node.running import run_node

    flags = {"model.name": model, "tasks.sources": tasks, "rounds": rounds, "seed": seed, "engine.backend": engine}

    def run(config: "RunConfig", folder: "RunFolder") -> int:
        return run_node(config, folder, command="silo", make_exchange=lambda _: SiloExchange(), as_json=as_json)

    return in_run_folder(layers_of(flags, config_file, assignments), [], run_dir, resume, run)


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
    layers = layers_of(flags, config_file, assignments)
    folder = None
    if run_dir is not None:
        folder = RunFolder(run_dir)
        folder.refuse_missing()
        layers.append(read_toml(folder.config))
    with importing():
        from node.saved import evaluate_policy

    evaluate_policy(resolve(layers).config, folder, as_json=as_json)
    return 0


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--drafter", is_flag=True, help="write the learned drafter instead, as an EAGLE checkpoint")
def export(run_dir: Path, target: Path, drafter: bool) -> int:
    """Write the policy of the run in RUN_DIR to the folder TARGET, for transformers and vLLM."""
    from node.run_folder import RunFolder

    folder = RunFolder(run_dir)
    folder.refuse_missing()
    with importing():
        from node.saved import export_drafter, export_policy

    (export_drafter if drafter else export_policy)(folder, target)
    return 0


@cli.command()
@click.option("--run-dir", type=click.Path(path_type=Path), default=RUNS / "node", show_default=True)
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
    return examine(resolve(layers_of(flags, config_file, assignments)).config, as_json=as_json)


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
    resolved = resolve(layers_of(flags, config_file, assignments))
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


add_commands(cli)
cli.add_command(bridge)
cli.add_command(experiment)


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
    if not launch().follows:  # whatever is wrong with the command line, the node itself says
        click.echo(f"swarm-node: {' '.join(message.split())}", err=True)
    return status


def main() -> None:
    """Entry point of `swarm-node`."""
    choose_waiting()
    limit_arenas()
    if launch().follows:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(run(sys.argv[1:]))
