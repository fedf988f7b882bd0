"""One experiment from its plan to its figures, in one folder; an interrupted one goes on where it was."""

import json
import shlex
import sys
from pathlib import Path

from node.experiment.plan import Plan
from node.experiment.real import RealUnit
from node.experiment.record import refuse_other_unit, unit_path
from node.experiment.report import table, write_report
from node.experiment.results import write_plan
from node.experiment.running import RunningUnit, SimulatedUnit, run_units
from node.experiment.units import Unit
from node.run_folder import RunFolder
from swarm.cores import num_cpus

__all__ = ["run_experiment"]

_INTERRUPTED = 130


def run_experiment(plan: Plan, path: Path, *, num_jobs: int | None, real: bool, as_json: bool) -> int:
    """Run what is missing of an experiment and report all of it. Returns the exit status.

    `real` lets the nodes of a unit be processes, one unit at a time.
    """
    out = sys.stderr if as_json else sys.stdout
    mode = "real" if real else "memory"
    with RunFolder(path) as folder:
        folder.refuse_occupied()
        done = [unit for unit in plan.units if unit_path(path, unit).exists()]
        for unit in done:
            refuse_other_unit(unit_path(path, unit), unit, mode)
        write_plan(path, plan, mode)
        missing = [unit for unit in plan.units if unit not in done]
        print(f"{len(missing)} of {len(plan.units)} units are to be run; writing to {path}", file=out, flush=True)

        def begin(unit: Unit) -> RunningUnit:
            return RealUnit(unit, path) if real else SimulatedUnit(unit, path)

        try:
            run_units(missing, 1 if real else num_jobs or num_cpus(), begin, len(done), out)
        except KeyboardInterrupt:
            print(f"stopped; the same command with --run-dir {shlex.quote(str(path))} goes on", file=sys.stderr)
            return _INTERRUPTED
        summary = write_report(path)
    if as_json:
        print(json.dumps(summary, allow_nan=False), flush=True)
    else:
        print(f"\n{table(summary)}\nwritten to {path}: results.md, results.json, and the figures", flush=True)
    return 0
