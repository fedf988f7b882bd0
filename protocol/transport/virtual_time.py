"""An event loop whose time is virtual: it jumps to the next timer whenever nothing else is left to do.

Four hours of a swarm pass in the time that its computations take, and twice the same, since nothing depends on
how fast the machine is. Sockets and child processes do not live in virtual time: registering one is an error.
Threads do: while `run_in_executor` or `asyncio.to_thread` works, virtual time stands still.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, Unpack

from protocol.clock import Clock
from protocol.errors import ProtocolError

__all__ = ["VirtualDeadlockError", "VirtualTimeLoop", "run", "virtual_clock"]

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")
VIRTUAL_EPOCH_S = 1_800_000_000.0  # unix seconds at loop time 0


class VirtualDeadlockError(ProtocolError):
    """Every task waits, and nothing is scheduled that could wake one."""


class _JumpingSelector(selectors.BaseSelector):
    """Stands where the loop polls its sockets: there are none, so that a wait becomes a jump in time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_jobs = 0  # in threads
        self._real = selectors.DefaultSelector()

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        if self._real.get_map():  # the one is the loop's own wake-up pipe
            raise RuntimeError("sockets and child processes do not live in virtual time: use a real event loop")
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return []
        if self.num_jobs:
            return self._real.select(None)  # a thread that ends wakes the loop through its pipe
        if timeout is None:
            raise VirtualDeadlockError("every task waits and no timer is set: nothing can ever happen again")
        self.now_s += timeout
        return []

    def close(self) -> None:
        self._real.close()

    def get_map(self) -> Any:
        return self._real.get_map()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time, which begins at 0."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9  # a timer fires when it is due by no more than rounding

    def time(self) -> float:
        """Return the virtual seconds since the loop was made."""
        return self._jumping.now_s

    def run_in_executor(self, executor: Any, func: Callable[[Unpack[_Ts]], _T], *args: *_Ts) -> "asyncio.Future[_T]":
        """Run in a thread, as every loop does; time stands still until it has ended."""
        future = super().run_in_executor(executor, func, *args)
        self._jumping.num_jobs += 1
        future.add_done_callback(self._job_ended)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the threads to end, which is no deadlock."""
        self._jumping.num_jobs += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._jumping.num_jobs -= 1

    def _job_ended(self, _: "asyncio.Future[Any]") -> None:
        self._jumping.num_jobs -= 1


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
