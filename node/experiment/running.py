"""Runs the units that are still missing, so many side by side, and says how far they are.

What it runs a unit with is given to it: a simulation in a process of its own, or real nodes. Ctrl-C or the failure
of one unit ends those that run; their rounds are lost, and finished units stay.
"""

import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol, TextIO

from rich.console import Console
from rich.live import Live

from node.display import duration
from node.experiment.child import ENVIRONMENT
from node.experiment.record import unit_path
from node.experiment.units import Unit
from node.processes import JsonProcess, end_all
from swarm.errors import TrainingDiverged, UserError

__all__ = ["RunningUnit", "SimulatedUnit", "UnitFailed", "run_units"]

_POLL_S: Final = 0.2
_LINE_INTERVAL_S: Final = 10.0  # at least
_LINES: Final = 50  # about so many lines, from the tenth minute on
_END_WITHIN_S: Final = 3.0


class UnitFailed(RuntimeError):
    """A unit has ended by a bug; its log has the trace."""


class RunningUnit(Protocol):
    """A unit that is being run."""

    unit: Unit

    @property
    def rounds_done(self) -> int:
        """Rounds of all its nodes together."""

    def finished(self) -> bool:
        """Whether its file is written. Raises what it has failed with."""

    def stop(self) -> None:
        """Ask it to end, and return at once."""

    def end(self) -> None:
        """Wait a short while for its end, then see to it; nothing of it is left."""


class SimulatedUnit:
    """A unit in a process of its own."""

    def __init__(self, unit: Unit, folder: Path) -> None:
        self.unit = unit
        self._result = unit_path(folder, unit)
        self._result.parent.mkdir(parents=True, exist_ok=True)
        task = {"unit": unit.dump(), "result": str(self._result)}
        log = self._result.with_suffix(".log")
        self._process = JsonProcess(
            unit.name, "node.experiment.child", (), log, environment=ENVIRONMENT, stdin=json.dumps(task).encode()
        )

    @property
    def rounds_done(self) -> int:
        """Rounds of all its nodes together."""
        return int(self._process.rows[-1]["rounds_done"]) if self._process.rows else 0

    def finished(self) -> bool:
        """Whether it has ended well."""
        status = self._process.status_code
        if status is None:
            return False
        self._process.wait(time.monotonic() + _END_WITHIN_S)
        words = self._process.last_words()
        if status == 2:
            raise UserError(f"{self.unit.name}: {words}")
        if status == 3:
            raise TrainingDiverged(f"{self.unit.name}: {words}")
        if status:
            raise UnitFailed(f"{self.unit.name} has ended with status {status}: {words}; see {self._process.log}")
        self._process.log.unlink()
        return True

    def stop(self) -> None:
        """Ask it to end."""
        self._process.end()

    def end(self) -> None:
        """Wait for its end."""
        end_all([self._process], _END_WITHIN_S)
        self._process.log.unlink()


def run_units(
    units: Sequence[Unit], num_jobs: int, begin: Callable[[Unit], RunningUnit], num_done: int, out: TextIO
) -> None:
    """Run units, the first ones first. `num_done` says how many others were there before. Raises KeyboardInterrupt."""
    waiting, running = list(units), list[RunningUnit]()
    progress = _Progress(units, num_done, Console(file=out))
    # SIGINT as well: a shell starts what it puts in the background with Ctrl-C switched off.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress:
            while waiting or running:
                while waiting and len(running) < num_jobs:
                    running.append(begin(waiting.pop(0)))
                for one in list(running):
                    if one.finished():
                        running.remove(one)
                        progress.finished(one.unit)
                progress.show(running)
                time.sleep(_POLL_S)
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        for one in running:
            one.stop()
        for one in running:
            one.end()
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Progress:
    """What a person sees: lines that stay where they are on a terminal, else one line now and then."""

    def __init__(self, units: Sequence[Unit], num_done: int, console: Console) -> None:
        self._num_units, self._num_done = len(units) + num_done, num_done
        self._rounds_left = {unit.name: _rounds(unit) for unit in units}
        self._rounds_wanted = sum(self._rounds_left.values())
        self._console = console
        self._began_s = self._said_s = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._shows_live = console.is_terminal and not console.is_dumb_terminal

    def __enter__(self) -> "_Progress":
        if self._shows_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shows_live:
            self._live.stop()

    def finished(self, unit: Unit) -> None:
        self._rounds_left[unit.name] = 0
        self._num_done += 1
        self._console.print(f"{unit.name} is done ({self._num_done} of {self._num_units})", highlight=False)

    def show(self, running: Sequence[RunningUnit]) -> None:
        """Show what runs."""
        now_s = time.monotonic()
        for one in running:
            self._rounds_left[one.unit.name] = _rounds(one.unit) - one.rounds_done
        if self._shows_live:
            self._live.update("\n".join([self._summary(now_s), *map(_line, running)]), refresh=True)
        elif now_s - self._said_s >= max(_LINE_INTERVAL_S, (now_s - self._began_s) / _LINES):
            self._said_s = now_s
            text = "   ".join([self._summary(now_s), *map(_line, running)])
            self._console.print(text, highlight=False, soft_wrap=True)

    def _summary(self, now_s: float) -> str:
        num_left = sum(self._rounds_left.values())
        num_run, elapsed_s = self._rounds_wanted - num_left, now_s - self._began_s
        eta = duration(elapsed_s * num_left / num_run) if num_run else "?"
        return f"{self._num_done} of {self._num_units} units done  {duration(elapsed_s)}  eta {eta}"


def _rounds(unit: Unit) -> int:
    return sum(config.rounds for config in unit.configs)


def _line(one: RunningUnit) -> str:
    num_nodes = len(one.unit.configs)
    rounds = _rounds(one.unit) / num_nodes
    return f"{one.unit.arm} seed {one.unit.seed}: round {one.rounds_done / num_nodes:.0f} of {rounds:.0f}"
