"""The run's numbers: one JSON object a round in metrics.jsonl, and totals over the run.

The journal is what survives; this file is mended from it on resume, so that its rounds are unique, in order
and whole.
"""

import json
import os
import resource
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from swarm.errors import CheckpointError

__all__ = ["MetricsFile", "MovingAverage", "peak_rss_bytes", "read_rows"]


class MovingAverage:
    """The mean of the last `window` values."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """Take a value and return the mean with it."""
        self._values.append(value)
        return sum(self._values) / len(self._values)


class MetricsFile:
    """Appends rows to metrics.jsonl, each in one write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    def start(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rewrite the file as exactly these rows if it is anything else, and go on after them."""
        text = "".join(_line(row) for row in rows)
        if not self._path.exists() or self._path.read_text(encoding="utf-8", errors="replace") != text:
            beside = self._path.with_name(f".{self._path.name}.partial")
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises CheckpointError where the disk does not take it."""
        if self._file is None:
            raise ValueError("start() comes first")
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self._path}: {error.strerror}; free space, then go on with --resume"
            ) from error

    def sync(self) -> None:
        """Wait until every row is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in front of the first that is torn, missing or out of order."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(row, dict) or row.get("round") != len(rows) + 1:
            break
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")) + "\n"


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
