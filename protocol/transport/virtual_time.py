"""An event loop whose time is virtual: it jumps to the next timer whenever nothing else is left to do.

Four hours of a swarm pass in the time that its computations take, and twice the same, since nothing depends on
how fast the machine is. Sockets and child processes do not live in virtual time: registering one is an error.
Threads do: while `run_in_executor` or `asyncio.to_thread` works, virtual time stands still.
"""

import asyncio
import heapq
import itertools
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple, Unpack

from protocol.clock import Clock
from protocol.errors import ProtocolError

__all__ = ["VirtualDeadlockError", "VirtualTimeLoop", "run", "virtual_clock"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
VIRTUAL_EPOCH_S = 1_800_000_000.0  # unix seconds at loop time 0
ROUNDING_S = 1e-9  # a timer fires when it is due by no more than this
MIN_CANCELLED = 100  # timers that are not worth a search


class VirtualDeadlockError(ProtocolError):
    """Every task waits, and nothing is scheduled that could wake one."""


class _ThreadsOnly(selectors.BaseSelector):
    """Stands where the loop polls its sockets: there are none, and only threads that end are waited for."""

    def __init__(self) -> None:
        self.num_jobs = 0  # in threads
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self._real.get_map():  # the one is the loop's own wake-up pipe
            raise RuntimeError("sockets and child processes do not live in virtual time: use a real event loop")
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return self._real.select(timeout)  # a thread that ends wakes the loop through its pipe

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Any:
        return self._real.get_map()


class _Timer(asyncio.TimerHandle):
    """A timer that knows whether it still waits."""

    __slots__ = ("waits",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.waits = True


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time, which begins at 0.

    Timers are kept here and not by the base class, whose heap compares them in Python: a simulation has a hundred
    thousand of them. Those that are due at one time fire in the order in which they were set.
    """

    _ready: "deque[asyncio.Handle]"  # of the base class, as is whether it is stopping
    _stopping: bool

    def __init__(self) -> None:
        self._now_s = 0.0
        self._threads = _ThreadsOnly()
        self._timers: list[tuple[float, int, _Timer]] = []  # a heap: (when, number, timer)
        self._timer_numbers = itertools.count()
        self._num_cancelled = 0  # of those in the heap
        super().__init__(self._threads)

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._now_s

    def call_at(
        self, when: float, callback: Callable[[Unpack[_Ts]], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """Set a timer."""
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._timer_numbers), timer))
        return timer

    def _timer_handle_cancelled(self, handle: _Timer) -> None:
        self._num_cancelled += handle.waits

    def _run_once(self) -> None:
        """Run what is ready; where nothing is, wait for a thread, or else jump to the next timer."""
        self._drop_cancelled()
        timers, ready = self._timers, self._ready
        if not ready and not self._stopping:
            if self._threads.num_jobs:
                self._process_events(self._threads.select(None))  # type: ignore[attr-defined]
            elif timers:
                self._now_s = max(self._now_s, timers[0][0])
            else:
                raise VirtualDeadlockError("every task waits and no timer is set: nothing can ever happen again")
        due_s = self._now_s + ROUNDING_S
        while timers and timers[0][0] < due_s:
            timer = heapq.heappop(timers)[2]
            timer.waits = False
            self._num_cancelled -= timer.cancelled()
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def _drop_cancelled(self) -> None:
        """Forget cancelled timers that come first, and all of them where they are the most."""
        if self._num_cancelled > max(len(self._timers) // 2, MIN_CANCELLED):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._num_cancelled = 0
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)[2].waits = False
            self._num_cancelled -= 1

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts) -> "asyncio.Future[_T]":
        """Run in a thread, as every loop does; time stands still until it has ended."""
        future = super().run_in_executor(executor, func, *args)
        self._threads.num_jobs += 1
        future.add_done_callback(self._job_ended)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the threads to end, which is no deadlock."""
        self._threads.num_jobs += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._threads.num_jobs -= 1

    def _job_ended(self, _: "asyncio.Future[Any]") -> None:
        self._threads.num_jobs -= 1


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end in virtual time, as `asyncio.run` does in real time.

    Raises VirtualDeadlockError where nothing can happen any more before `main` has ended.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def virtual_clock(offset_s: float = 0.0) -> Clock:
    """Return a clock of the running loop's virtual time: for the nodes of a simulation, each with its own error."""
    loop = asyncio.get_running_loop()
    return lambda: VIRTUAL_EPOCH_S + loop.time() + offset_s
