"""What stands in a simulated node where a process has threads and a disk: nothing that could come in another order."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from node.display import Display, RunInfo
from node.recorder import Restored
from swarm.drafting.drafting import Drafting
from swarm.trainer import Trainer
from swarm.types import TrainingBatch

__all__ = ["InlineExecutor", "RoundCount", "RoundDisplay"]

P = ParamSpec("P")
T = TypeVar("T")


class InlineExecutor(Executor):
    """Does each job at once, in the thread that hands it in, and adds up how long that took."""

    def __init__(self) -> None:
        self.wall_s = 0.0
        self.cpu_s = 0.0  # of this process; the scorer's processes have their own

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Return a future that is done."""
        future: Future[T] = Future()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # the boundary of every executor: whoever waits for the future gets it
            future.set_exception(error)
        finally:
            self.wall_s += time.perf_counter() - wall_s
            self.cpu_s += time.process_time() - cpu_s
        return future


class RoundCount:
    """Keeps the number of the last round and nothing else: a unit of an experiment is done whole or not at all."""

    def __init__(self) -> None:
        self._last_round = 0

    @property
    def last_round(self) -> int:
        """The last finished round."""
        return self._last_round

    def keep_beside(self, drafting: Drafting) -> None:
        """Nothing is kept."""

    def restore(self, trainer: Trainer, interrupted: Callable[[], bool]) -> Restored:
        """Begin at the beginning."""
        return Restored(0, [], [])

    async def append(
        self, round_index: int, batch: TrainingBatch, row: Mapping[str, Any], rollouts: Mapping[str, Any] | None = None
    ) -> None:
        """Count the round."""
        self._last_round = round_index

    async def settle(self) -> None:
        """Nothing is under way."""

    def checkpoint_if_due(self, trainer: Trainer) -> None:
        """Nothing is kept."""

    async def final_checkpoint(self, trainer: Trainer, within_s: float | None = None) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is open."""


class RoundDisplay(Display):
    """Passes the finished rounds of one node on; shows nothing."""

    def __init__(self, on_round: Callable[[Mapping[str, Any]], None]) -> None:
        self._on_round = on_round

    def begin(self, info: RunInfo) -> None:
        """Nothing."""

    def loaded(self) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing: what a node says of its connection is in its rows."""

    def evaluated_before(self, pass_at_1: float) -> None:
        """Nothing: the first row carries it."""

    def resumed(self, rows: object) -> None:
        """Nothing: no simulated run is resumed."""

    def round(self, row: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._on_round(row)

    def end(self) -> None:
        """Nothing."""
