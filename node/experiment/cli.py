"""The command line of experiments: `swarm-node experiment sapo`, and `plot`, which draws what there is anew."""

import json
from pathlib import Path

import click

from node.options import layers_of, new_run_dir, with_settings

__all__ = ["experiment"]


@click.group()
def experiment() -> None:
    """Compare ways of sharing rollouts, over several seeds."""


@experiment.command()
@with_settings
@click.option("--arms", multiple=True, metavar="LIST", help="I/J, or NAME=I/J+KEY=VALUE.  [8/0,6/2,4/4,2/6]")
@click.option("--nodes", type=int, metavar="N", help="Nodes of each arm.  [8]")
@click.option("--seeds", type=int, metavar="N", help="Seeds of each arm, from 1.  [5]")
@click.option("--rounds", type=int, metavar="N", help="Rounds of each node.  [300]")
@click.option("--node-set", "node_settings", multiple=True, metavar="K.KEY=VALUE", help="A setting of node K alone.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where results are kept.  [runs/sapo-TIME]")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Units side by side.  [cores]")
@click.option("--real", is_flag=True, help="Run `swarm-node join` processes in place of a simulation.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def sapo(
    model: str | None,
    tasks: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    arms: tuple[str, ...],
    nodes: int | None,
    seeds: int | None,
    rounds: int | None,
    node_settings: tuple[str, ...],
    run_dir: Path | None,
    jobs: int | None,
    real: bool,
    as_json: bool,
) -> int:
    """SAPO's comparison: nodes that learn from I own groups and J groups of others in a round.

    Every arm has the same nodes, seeds and tasks. What is finished in --run-dir is not run again.
    """
    from node.experiment.plan import make_plan, node_assignments
    from node.experiment.sapo import run_experiment

    if real and jobs is not None:
        raise click.UsageError("--real runs one unit at a time, whose nodes are as many processes: leave --jobs out")
    flags = {
        "model.name": model,
        "tasks.sources": tasks,
        "rounds": rounds,
        "experiment.arms": [part for text in arms for part in text.split(",")] or None,
        "experiment.nodes": nodes,
        "experiment.seeds": seeds,
    }
    plan = make_plan(layers_of(flags, config_file, assignments), node_assignments(node_settings))
    return run_experiment(plan, run_dir or new_run_dir("sapo"), num_jobs=jobs, real=real, as_json=as_json)


@experiment.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--arms", metavar="NAMES", help="Draw the curves of these alone, with commas.  [all]")
@click.option("--json", "as_json", is_flag=True, help="Print what results.json holds.")
def plot(run_dir: Path, arms: str | None, as_json: bool) -> int:
    """Draw every table and figure of the experiment in RUN_DIR anew."""
    from node.experiment.report import table, write_report

    summary = write_report(run_dir, [name.strip() for name in (arms or "").split(",") if name.strip()])
    print(json.dumps(summary) if as_json else table(summary), end="\n" if as_json else "", flush=True)
    return 0
