"""The process in which a unit is simulated: it reads the unit from stdin and says on stdout how far it is.

One for each unit, with one thread and the same hash seed, so that a unit is the same bits whoever runs it. SIGTERM
ends it at once: an unfinished unit leaves nothing behind. What libraries print goes where errors go.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

__all__ = ["ENVIRONMENT", "main"]

ENVIRONMENT: Final = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
_SAY_EVERY_S = 0.5


def main() -> None:
    """Run the unit on stdin: {"unit": …, "result": the path of its file}."""
    signal.signal(signal.SIGTERM, _leave)
    out = _keep_stdout()
    task = json.load(sys.stdin)
    from node.experiment.units import Unit
    from swarm.errors import TrainingDiverged, UserError

    try:
        _run(Unit.load(task["unit"]), Path(task["result"]), out)
    except (UserError, TrainingDiverged) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(3 if isinstance(error, TrainingDiverged) else 2)


def _run(unit: Any, result: Path, out: TextIO) -> None:
    import torch

    from node.experiment.record import write_unit
    from node.experiment.simulation import simulate

    torch.set_num_threads(unit.configs[0].num_threads or 1)
    rounds = [0] * len(unit.configs)
    said_s = 0.0

    def on_round(number: int, row: Mapping[str, Any]) -> None:
        nonlocal said_s
        rounds[number] = row["round"]
        if time.monotonic() - said_s >= _SAY_EVERY_S:
            said_s = time.monotonic()
            print(json.dumps({"rounds_done": sum(rounds)}), file=out, flush=True)

    run = simulate(unit, on_round)
    write_unit(result, unit, "memory", run.nodes, wall_s=run.wall_s, cpu_s=run.cpu_s)


def _keep_stdout() -> TextIO:
    """Return stdout for the rows that the parent reads; whatever else is printed from now on goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)
