"""What a run leaves on the disk, and where a resumed run goes on.

Every finished round is appended to the journal at once; its sync overlaps the next round's rollouts. A
checkpoint is written by the disk thread while the next round is generated, which does not touch the trainer's
tensors; the next update waits for it. A resume loads the newest readable checkpoint and trains the journal's
later rounds again, without generating anything: the same batches give the same weights.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from node.heap import give_back
from node.interrupt import Interrupted
from node.metrics import MetricsFile, read_rows
from node.run_folder import RunFolder
from swarm.checkpoint import Checkpoint, Checkpoints
from swarm.config import CheckpointConfig
from swarm.errors import CheckpointError
from swarm.journal import Journal, JournalRecord
from swarm.types import TrainingBatch

if TYPE_CHECKING:
    from torch import Tensor

    from swarm.drafting.drafting import Drafting
    from swarm.trainer import Trainer

__all__ = ["Recorder", "Restored", "RoundKeeper", "drafting_state"]

_MAX_COST = 0.05  # share of the run that writing checkpoints may take
_DRAFTING = "drafting."  # before the names of its tensors
_SLOW_DISK_BYTES_PER_S = 100e6  # what a checkpoint is assumed to be written at before one has been timed


@dataclass(frozen=True, slots=True)
class Restored:
    """Where a run goes on: the last finished round, the rows up to it, and what the user should know."""

    round_index: int
    rows: list[dict[str, Any]]
    notes: list[str]
    rollouts: Mapping[str, Any] | None = None  # what the last round's rollouts have left unfinished


class RoundKeeper(Protocol):
    """What the loop of a round asks of whatever keeps its rounds. `Recorder` keeps them on the disk."""

    @property
    def last_round(self) -> int:
        """The last finished round."""

    def keep_beside(self, drafting: "Drafting") -> None:
        """Restore and keep what drafting has learned as well. Called before `restore`."""

    def restore(self, trainer: "Trainer", interrupted: Callable[[], bool]) -> Restored:
        """Bring the trainer to the last good state."""

    async def append(
        self, round_index: int, batch: TrainingBatch, row: Mapping[str, Any], rollouts: Mapping[str, Any] | None = None
    ) -> None:
        """Put a finished round on record."""

    async def settle(self) -> None:
        """Wait until nothing reads the trainer's tensors."""

    def checkpoint_if_due(self, trainer: "Trainer") -> None:
        """Begin to keep the trainer's state, if it is time."""

    async def final_checkpoint(self, trainer: "Trainer", within_s: float | None = None) -> None:
        """Keep the trainer's state of the last round."""

    async def close(self) -> None:
        """Bring everything to an end."""


class Recorder:
    """Journal, checkpoints and metrics of one run. Used from one asyncio loop, except for `restore`."""

    def __init__(
        self, folder: RunFolder, config: CheckpointConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.folder = folder
        self._config = config
        self._clock = clock
        self._checkpoints = Checkpoints(folder.checkpoints, config.keep)
        self._journal = Journal(folder.journal)
        self._metrics = MetricsFile(folder.metrics)
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="disk")
        self._sync: asyncio.Future[None] | None = None
        self._checkpoint: asyncio.Future[None] | None = None
        self._last_checkpoint_at = clock()
        self._last_checkpoint_round = 0
        self._rollouts: Mapping[str, Any] | None = None  # of the last finished round
        self._write_s: float | None = None
        self._drafting: Drafting | None = None

    @property
    def last_round(self) -> int:
        """The last finished round."""
        return self._journal.last_round

    def keep_beside(self, drafting: "Drafting") -> None:
        """See RoundKeeper."""
        self._drafting = drafting

    def restore(self, trainer: "Trainer", interrupted: Callable[[], bool]) -> Restored:
        """Bring the trainer to the last good state and make journal and metrics end there.

        Raises Interrupted if `interrupted` says so between two updates; the disk is as it was then.
        """
        self._checkpoints.remove_partial()
        checkpoint, damaged = self._checkpoints.newest()
        round_index = 0
        if checkpoint is not None:
            trainer.load_state(checkpoint.tensors, checkpoint.meta)
            if self._drafting is not None:
                self._drafting.load_state(*drafting_state(checkpoint))
            round_index = checkpoint.round_index
        records = self._journal.read_after(round_index)
        if checkpoint is None and damaged and not records:
            raise CheckpointError(f"{damaged[0]}, and nothing older is left; start another run with --run-dir")
        for record in records:
            if interrupted():
                raise Interrupted
            if record.batch.groups:
                trainer.update(record.batch)
        last = records[-1].round_index if records else round_index
        rows = {row["round"]: row for row in read_rows(self.folder.metrics) if row["round"] <= last}
        rows.update({index: dict(row) for index, row in self._journal.rows().items() if index <= last})
        ordered = [rows[index] for index in sorted(rows)]
        self._rollouts = records[-1].rollouts if records else (checkpoint.meta.get("rollouts") if checkpoint else None)
        self._journal.start_after(last)
        self._metrics.start(ordered)
        self._last_checkpoint_round = round_index
        notes = [f"{line}; going back to {_described(checkpoint)}" for line in damaged]
        if len(ordered) < last:
            notes.append(f"{self.folder.metrics} has lost {last - len(ordered)} of {last} rounds; training is intact")
        return Restored(last, ordered, notes, self._rollouts)

    async def append(
        self, round_index: int, batch: TrainingBatch, row: Mapping[str, Any], rollouts: Mapping[str, Any] | None = None
    ) -> None:
        """Put a finished round on record. A kill from now on does not lose it."""
        await self._settle_sync()
        self._journal.append(JournalRecord(round_index, batch, row, rollouts))
        self._rollouts = rollouts
        self._metrics.append(row)
        self._sync = asyncio.get_running_loop().run_in_executor(self._disk, self._journal.sync)

    async def settle(self) -> None:
        """Wait until nothing reads the trainer's tensors; raises what a write has failed with."""
        await self._settle_sync()
        if self._checkpoint is not None:
            checkpoint, self._checkpoint = self._checkpoint, None
            await checkpoint

    def checkpoint_if_due(self, trainer: "Trainer") -> None:
        """Begin to write a checkpoint if the last one is long enough ago."""
        interval_s = max(self._config.interval_s, (self._write_s or 0.0) / _MAX_COST)
        if self._checkpoint is None and self._clock() - self._last_checkpoint_at >= interval_s:
            self._begin_checkpoint(trainer)

    async def final_checkpoint(self, trainer: "Trainer", within_s: float | None = None) -> None:
        """Write a checkpoint of the last round, unless it has one, or it would take longer than `within_s`."""
        await self.settle()
        if self._last_checkpoint_round == self.last_round:
            return
        if within_s is not None and self._expected_write_s(trainer) > within_s:
            return
        self._begin_checkpoint(trainer)
        await self.settle()

    async def close(self) -> None:
        """Wait for the disk thread, and close the files."""
        self._disk.shutdown(wait=True)
        self._journal.close()
        self._metrics.close()

    async def _settle_sync(self) -> None:
        if self._sync is not None:
            sync, self._sync = self._sync, None
            await sync

    def _expected_write_s(self, trainer: "Trainer") -> float:
        if self._write_s is not None:
            return self._write_s
        return trainer.num_state_bytes() / _SLOW_DISK_BYTES_PER_S

    def _begin_checkpoint(self, trainer: "Trainer") -> None:
        meta: dict[str, Any] = {**trainer.state_meta(), "rollouts": self._rollouts}
        beside: dict[str, Tensor] = {}
        if self._drafting is not None:
            meta["drafting"] = self._drafting.state_meta()
            beside = {_DRAFTING + name: tensor for name, tensor in self._drafting.state_tensors().items()}
        write = partial(self._write_checkpoint, self.last_round, trainer, beside, meta)
        self._checkpoint = asyncio.get_running_loop().run_in_executor(self._disk, write)

    def _write_checkpoint(
        self, round_index: int, trainer: "Trainer", beside: "Mapping[str, Tensor]", meta: Mapping[str, Any]
    ) -> None:
        """Runs in the disk thread; no round is appended meanwhile, because the next update waits for this.

        So does whatever else would ask the trainer: its tensors may have to be gathered from several processes.
        """
        begin = self._clock()
        self._metrics.sync()
        self._checkpoints.write(Checkpoint(round_index, {**trainer.state_tensors(), **beside}, meta))
        self._journal.rotate()
        self._journal.drop_through(self._checkpoints.oldest_needed())
        self._last_checkpoint_at = self._clock()
        self._last_checkpoint_round = round_index
        self._write_s = self._last_checkpoint_at - begin
        give_back()  # now and then, and beside the round


def drafting_state(checkpoint: Checkpoint) -> "tuple[dict[str, Tensor], Mapping[str, Any] | None]":
    """Return what a checkpoint holds of drafting: its tensors, and the rest, None where there is nothing."""
    held = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(_DRAFTING)}
    return {name.removeprefix(_DRAFTING): tensor for name, tensor in held.items()}, checkpoint.meta.get("drafting")


def _described(checkpoint: Checkpoint | None) -> str:
    return "the beginning" if checkpoint is None else f"round {checkpoint.round_index}"
