"""What a person or a program sees of a run while it goes on: plain lines, or JSON. `node.live` has the terminal's.

A display is told what happens and decides what to show and how often; it changes nothing.
"""

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from node.drafts_shown import drafts

__all__ = [
    "Display",
    "JsonDisplay",
    "PlainDisplay",
    "Progress",
    "RunInfo",
    "duration",
    "from_others",
    "partial_rollouts",
]

_ETA_ROUNDS = 50
_LEAST_INTERVAL_S = 2.0
_MOST_INTERVAL_S = 30.0


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is run, where."""

    command: str
    model: str
    tasks: str
    rounds: int
    folder: str


class Progress:
    """How far a run is, and when it will be done."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self._seconds: deque[float] = deque(maxlen=_ETA_ROUNDS)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a finished round."""
        self._seconds.append(row["round_s"] + row["evaluation_s"])

    def eta_s(self, round_index: int) -> float:
        """Seconds left, if rounds go on as the last ones did."""
        if not self._seconds:
            return 0.0
        return max(0, self.rounds - round_index) * sum(self._seconds) / len(self._seconds)


class Display(ABC):
    """Told what happens in a run."""

    @abstractmethod
    def begin(self, info: RunInfo) -> None:
        """The run is about to be loaded; whether it can be is not known yet."""

    @abstractmethod
    def loaded(self) -> None:
        """Model and tasks are there, and the run folder is written to from now on."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something that the user should know, in one line."""

    def phase(self, phase: str) -> None:  # noqa: B027 - only a live display shows it
        """The node begins another part of a round."""

    @abstractmethod
    def evaluated_before(self, pass_at_1: float) -> None:
        """The policy has been evaluated before any training."""

    @abstractmethod
    def resumed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The run goes on after these rounds."""

    @abstractmethod
    def round(self, row: Mapping[str, Any]) -> None:
        """A round is finished."""

    @abstractmethod
    def end(self) -> None:
        """The loop has ended, for whatever reason."""


class JsonDisplay(Display):
    """One JSON object a round on stdout; notes on stderr."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = out
        self._err = err
        self._info = RunInfo("", "", "", 0, "")

    def begin(self, info: RunInfo) -> None:
        """Say on stderr what is loaded."""
        self._info = info
        self.note(f"{info.model} on {info.tasks}")

    def loaded(self) -> None:
        """Say on stderr where the run is written."""
        self.note(f"writing to {self._info.folder}")

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        print(text, file=self._err, flush=True)

    def evaluated_before(self, pass_at_1: float) -> None:
        """Nothing: the first round's object carries it."""

    def resumed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: rounds that were printed before are not printed again."""

    def round(self, row: Mapping[str, Any]) -> None:
        """Print the round's row."""
        print(json.dumps(row, allow_nan=False), file=self._out, flush=True)

    def end(self) -> None:
        """Nothing is left open."""


class PlainDisplay(Display):
    """Lines for logs: the first round, every evaluation, and at most one line every few seconds between."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._begin = clock()
        self._last_line_at: float | None = None
        self._progress = Progress(0)
        self._info = RunInfo("", "", "", 0, "")

    def begin(self, info: RunInfo) -> None:
        """Say what is loaded."""
        self._info = info
        self._progress = Progress(info.rounds)
        self.note(f"{info.model} on {info.tasks}, {info.rounds} rounds")

    def loaded(self) -> None:
        """Say where the run is written."""
        self.note(f"writing to {self._info.folder}")

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._out, flush=True)

    def evaluated_before(self, pass_at_1: float) -> None:
        """Print what the policy can do before it learns."""
        self.note(f"before training: held-out pass@1 {pass_at_1:.3f}")

    def resumed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say where the run goes on."""
        self.note(f"going on after round {rows[-1]['round']}")

    def round(self, row: Mapping[str, Any]) -> None:
        """Print a line if the last one is long enough ago, or the round was evaluated."""
        self._progress.add(row)
        now = self._clock()
        interval_s = min(_MOST_INTERVAL_S, max(_LEAST_INTERVAL_S, (now - self._begin) / 100))
        is_due = self._last_line_at is None or now - self._last_line_at >= interval_s
        if is_due or "pass_at_1_heldout" in row:
            self._last_line_at = now
            self.note(_round_line(row, self._progress))

    def end(self) -> None:
        """Nothing is left open."""


def _round_line(row: Mapping[str, Any], progress: Progress) -> str:
    shown = f"  held-out pass@1 {row['pass_at_1_heldout']:.3f}" if "pass_at_1_heldout" in row else ""
    shown += from_others(row) + partial_rollouts(row) + drafts(row)
    return (
        f"round {row['round']}/{progress.rounds}  reward {row['reward_mean']:.3f} "
        f"(average {row['reward_moving_average']:.3f}){shown}  {row['tokens_per_s']:,.0f} tokens/s  "
        f"rollout {row['rollout_s']:.3f} s  scoring {row['scoring_s']:.3f} s  update {row['update_s']:.3f} s  "
        f"memory {row['peak_rss_bytes'] / 2**20:,.0f} MiB  eta {duration(progress.eta_s(row['round']))}"
    )


def from_others(row: Mapping[str, Any]) -> str:
    """Return how much of a round came from other nodes; nothing where nothing was to come."""
    num_external, num_missing = row.get("num_external", 0), row.get("num_external_missing", 0)
    if not num_external + num_missing:
        return ""
    return f"  from others {num_external} of {num_external + num_missing} (peers {row['num_peers']})"


def partial_rollouts(row: Mapping[str, Any]) -> str:
    """Return what partial rollouts were in flight and what they saved; nothing where rollouts are synchronous."""
    if "num_groups_in_flight" not in row:
        return ""
    stale = f", staleness {row['staleness_mean']:.2f}" if row["staleness_max"] else ""
    return (
        f"  in flight {row['num_groups_in_flight']} groups, {row['num_groups_recycled']} recycled{stale}, "
        f"saved {row['saved_s']:.3f} s"
    )


def duration(seconds: float) -> str:
    """Return hours, minutes and seconds, as in 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
