"""Does small steps of work while there is nothing better to do, in a thread of its own.

    with idle:          the thread works, once a moment has passed
        wait()
                        here it does not: leaving waits for the part of a step that is under way

What is over in that moment has begun nothing, and so waits for nothing.
What is raised in the thread is raised where its time ends.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType

__all__ = ["IdleTime"]

_MOMENT_S = 0.02


class IdleTime:
    """Lets `step` run again and again while the context is entered. `step` is given a function that says when to stop.

    `step` returns whether it did anything; where it did not, the rest of that time is left alone. The thread is
    started when it is first of use, or by `start`, and ends with `close`.
    """

    def __init__(
        self,
        step: Callable[[Callable[[], bool]], bool],
        clock: Callable[[], float] = time.perf_counter,
        *,
        moment_s: float = _MOMENT_S,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """moment_s: how long it waits before it begins. prepare: what its thread does first of all."""
        self._step, self._clock, self._moment_s, self._prepare = step, clock, moment_s, prepare
        self._changed = threading.Condition()
        self._wanted = self._busy = self._closed = self._is_prepared = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self.worked_s = 0.0

    def __enter__(self) -> "IdleTime":
        """Begin to work."""
        self.start()
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
        return self

    def start(self) -> None:
        """Start the thread, if it has not been, and wait until it is prepared."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="idle", daemon=True)
            self._thread.start()
            with self._changed:
                self._changed.wait_for(lambda: self._is_prepared)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and wait for the part that is under way."""
        with self._changed:
            self._wanted = False
            self._changed.wait_for(lambda: not self._busy)
            failed, self._error = self._error, None
        if failed is not None and error is None:
            raise failed

    def _run(self) -> None:
        self._prepare()
        with self._changed:
            self._is_prepared = True
            self._changed.notify_all()
        is_new = True
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                is_new |= not self._wanted
                self._changed.wait_for(lambda: self._wanted or self._closed)
                if is_new and self._changed.wait_for(lambda: not self._wanted or self._closed, self._moment_s):
                    if self._closed:
                        return
                    continue
                is_new, self._busy = False, True
            begin = self._clock()
            try:
                did = self._step(lambda: not self._wanted)
            except BaseException as failure:  # the boundary of the thread: it is raised where the time ends
                with self._changed:
                    self._error, did = failure, False
            self.worked_s += self._clock() - begin
            if not did:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: not self._wanted or self._closed)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._wanted, self._closed = False, True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
