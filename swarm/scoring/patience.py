"""How much of its wall time an answer has had, without the time in which the machine kept its process from running.

A verdict must not depend on what else a machine does. A process that runs or sleeps uses its time up; one that waits
for a processor does not, nor does one whose whole machine stood still, a closed laptop, say.
"""

import math
from pathlib import Path
from typing import Final

__all__ = ["LOOKS", "Patience"]

LOOKS: Final = 4  # at a process, within the limit of an answer, at least


class Patience:
    """Asked again and again how long an answer still has. Times are seconds on the monotonic clock."""

    def __init__(self, pid: int, limit_s: float) -> None:
        """Watch a process whose every answer has `limit_s`. Who asks does so LOOKS times in it, or more often."""
        self._step_s = limit_s / LOOKS
        self._pid, self._limit_s = pid, limit_s
        self._began_s = -math.inf
        self._had_s = 0.0  # and is settled
        self._open_s = 0.0  # since then
        self._asked_s = 0.0
        self._since = (0.0, 0.0)

    def seconds_left(self, began_s: float, now_s: float) -> float:
        """Return what the answer that was begun at `began_s` still has; 0 or less: it has had its time.

        What passed between two calls counts as one look at most, and the first look counts whatever the process did:
        most answers take a thousandth of that, and nobody has to look at their process.
        """
        if now_s - began_s < self._step_s:
            return self._limit_s - (now_s - began_s)
        times = self._times()
        if began_s != self._began_s:
            self._began_s, self._asked_s, self._since = began_s, now_s, times
            self._had_s, self._open_s = self._step_s, 0.0
        self._open_s += min(now_s - self._asked_s, self._step_s)
        self._asked_s = now_s
        ran_s, waited_s = (now - then for now, then in zip(times, self._since, strict=True))
        if self._is_runnable():  # and since when it waits for a processor is not known before it has one
            return self._limit_s - self._had_s - ran_s
        self._had_s += max(0.0, self._open_s - waited_s)
        self._open_s, self._since = 0.0, times
        return self._limit_s - self._had_s

    def _times(self) -> tuple[float, float]:
        """Seconds for which the process ran, and for which it waited for a processor (proc(5), schedstat)."""
        text = self._read("schedstat")
        if text is None:
            return 0.0, 0.0
        ran_ns, waited_ns, _ = text.split()
        return int(ran_ns) / 1e9, int(waited_ns) / 1e9

    def _is_runnable(self) -> bool:
        """Whether it runs or waits for a processor. Where that cannot be known, all time counts."""
        text = self._read("stat")
        return text is not None and text.rpartition(")")[2].split()[0] == "R"

    def _read(self, name: str) -> str | None:
        path = Path(f"/proc/{self._pid}/{name}")
        return path.read_text(errors="replace") if path.exists() else None
