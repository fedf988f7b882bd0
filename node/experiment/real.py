"""Runs one unit with real nodes: a bootstrap and a `swarm-node join` for each node, all on this machine.

What they leave in their run folders is read into the same record that a simulated unit has, and then removed.
"""

import resource
import shutil
import time
from pathlib import Path
from typing import Final

from node.config import to_toml
from node.experiment.record import unit_path, write_unit
from node.experiment.running import UnitFailed
from node.experiment.units import Unit
from node.metrics import read_rows
from node.processes import NodeProcess, end_all
from swarm.errors import UserError

__all__ = ["RealUnit"]

_LISTEN: Final = "/ip4/127.0.0.1/tcp/0"
_END_WITHIN_S: Final = 5.0  # what they would still save is thrown away


class RealUnit:
    """A unit whose nodes are processes. Nothing of it waits: `finished` is asked again and again."""

    def __init__(self, unit: Unit, folder: Path) -> None:
        self.unit = unit
        self._result = unit_path(folder, unit)
        self._folder = self._result.with_suffix(".nodes")
        shutil.rmtree(self._folder, ignore_errors=True)  # what an interrupted one has left
        self._folder.mkdir(parents=True)
        self._began_s, self._began_cpu_s = time.monotonic(), _children_cpu_s()
        self._bootstrap = NodeProcess("bootstrap", self._folder, "bootstrap", "--listen", _LISTEN)
        self._nodes: list[NodeProcess] = []

    @property
    def rounds_done(self) -> int:
        """Rounds of all its nodes together."""
        return sum(len(node.rows) for node in self._nodes)

    def finished(self) -> bool:
        """Start the nodes once the bootstrap listens; when they are done, write the unit's file."""
        for process in (self._bootstrap, *self._nodes):
            if process.status_code not in (None, 0):
                raise _failure(self.unit, process)
        if not self._nodes:
            if self._bootstrap.address is not None:
                self._nodes = [self._start(number, self._bootstrap.address) for number in range(len(self.unit.configs))]
            return False
        if any(node.status_code is None for node in self._nodes):
            return False
        end_all([self._bootstrap, *self._nodes], _END_WITHIN_S)
        rows = [read_rows(node.run_dir / "metrics.jsonl") for node in self._nodes]
        wall_s, cpu_s = time.monotonic() - self._began_s, _children_cpu_s() - self._began_cpu_s
        write_unit(self._result, self.unit, "real", rows, wall_s=wall_s, cpu_s=cpu_s)
        shutil.rmtree(self._folder)
        return True

    def stop(self) -> None:
        """Ask all of them to end."""
        for process in (self._bootstrap, *self._nodes):
            process.end()

    def end(self) -> None:
        """Wait for their end, and remove what they have left."""
        end_all([self._bootstrap, *self._nodes], _END_WITHIN_S)
        shutil.rmtree(self._folder)

    def _start(self, number: int, address: str) -> NodeProcess:
        name = f"node-{number + 1}"
        settings = self._folder / f"{name}.toml"
        settings.write_text(to_toml(self.unit.configs[number]), encoding="utf-8")
        arguments = ("join", "--config", str(settings), "--peers", address, "--listen", _LISTEN)
        return NodeProcess(name, self._folder, *arguments)


def _failure(unit: Unit, process: NodeProcess) -> Exception:
    words = f"{unit.name}, {process.name}: {process.last_words()}"
    return UserError(words) if process.status_code == 2 else UnitFailed(f"{words} (status {process.status_code})")


def _children_cpu_s() -> float:
    """Return the processor time of all child processes that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
