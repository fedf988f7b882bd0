"""Cuts off a peer that sends or takes too little while it has something to send or to take."""

import asyncio
from collections.abc import Callable

__all__ = ["Pace"]

MIN_BYTES_PER_S = 65_536
GRACE_S = 5.0  # before the first byte counts
MAX_STALL_S = 15.0  # for which bytes that came fast may pay


class Pace:
    """A deadline that moves with every byte. Runs only while something is owed; costs one timer, not one a byte."""

    def __init__(self, late: Callable[[], None]) -> None:
        self._late = late
        self._loop = asyncio.get_running_loop()
        self._is_running = False
        self._deadline_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def run_while(self, owed: bool) -> None:
        """Say whether anything is owed now."""
        if owed and not self._is_running:
            self._deadline_s = self._loop.time() + GRACE_S
            if self._timer is None:
                self._timer = self._loop.call_at(self._deadline_s, self._look)
        self._is_running = owed

    def gain(self, num_bytes: int) -> None:
        """Take note of bytes that have been sent or taken."""
        if self._is_running:
            latest_s = max(self._deadline_s, self._loop.time() + MAX_STALL_S)
            self._deadline_s = min(self._deadline_s + num_bytes / MIN_BYTES_PER_S, latest_s)

    def end(self) -> None:
        """Stop for good."""
        self._is_running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if not self._is_running:
            return
        if self._loop.time() >= self._deadline_s:
            self._late()
        else:
            self._timer = self._loop.call_at(self._deadline_s, self._look)
