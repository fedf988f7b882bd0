"""A trio loop in a thread of its own, and the two bridges between it and the node's asyncio loop.

    call    from asyncio: run an async function on trio, and wait for it; cancelling the wait cancels it there
    ask     from trio: run a plain function on asyncio, and wait for what it returns
    tell    from trio: run a plain function on asyncio some time soon

What waits to cross is bounded: at most MAX_CALLS calls and MAX_QUESTIONS questions are under way, and whoever wants one
more waits on its own side. `tell` is for what is bounded by other means.

Needs trio alone, and is imported with `libp2p_host`.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from protocol.transport.base import TransportDown

__all__ = ["TrioThread"]

MAX_CALLS = 128
MAX_QUESTIONS = 64
_T = TypeVar("_T")


class TrioThread:
    """Runs one async function on trio until it returns, raises or is ended."""

    def __init__(self, what: str) -> None:
        """`what` names it in messages."""
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self._waiting: set[asyncio.Future[Any]] = set()
        self.ended: asyncio.Future[None] = self._loop.create_future()  # raises what the function has raised
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._token: trio.lowlevel.TrioToken
        self._nursery: trio.Nursery
        self._questions: trio.Semaphore

    async def start(self, main: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Run `main(ready)`; return when it has called `ready`. Raises what it raises before."""
        thread = threading.Thread(target=self._run, args=(main,), name=self._what, daemon=True)
        thread.start()
        await asyncio.wait({self._ready, self.ended}, return_when=asyncio.FIRST_COMPLETED)
        if self.ended.done():
            self.ended.result()
            raise TransportDown(f"{self._what} has ended")

    async def end(self) -> None:
        """Cancel everything on trio, and wait until the thread has ended."""
        if not self.ended.done():
            self._on_trio(lambda: self._nursery.cancel_scope.cancel())
            await asyncio.wait({self.ended})
        if not self.ended.cancelled():
            self.ended.exception()

    async def call(self, work: Callable[..., Awaitable[_T]], *args: object) -> _T:
        """Run an async function on trio. Raises what it raises, or TransportDown where the loop ends before."""
        async with self._calls:
            if self.ended.done():
                raise TransportDown(f"{self._what} has ended")
            future: asyncio.Future[_T] = self._loop.create_future()
            self._waiting.add(future)
            scope = trio.CancelScope()

            async def run() -> None:
                try:
                    with scope:
                        result = await work(*args)
                        self.tell(_set_result, future, result)
                except Exception as error:  # the boundary: it goes on in whoever waits
                    self.tell(_set_error, future, error)

            try:
                self._on_trio(lambda: self._nursery.start_soon(run))
                return await future
            finally:
                self._waiting.discard(future)
                if not future.done() or future.cancelled():
                    self._on_trio(scope.cancel)

    async def ask(self, work: Callable[..., _T], *args: object) -> _T:
        """From trio: run a plain function on the node's loop, and wait for what it returns."""
        answered, answers = trio.Event(), list[_T]()

        def answer() -> None:
            answers.append(work(*args))
            self._on_trio(answered.set)

        async with self._questions:
            self.tell(answer)
            await answered.wait()
        return answers[0]

    def tell(self, work: Callable[..., object], *args: object) -> None:
        """From trio: run a plain function on the node's loop. Nothing where that loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(work, *args)

    def spawn(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """From trio: let something run as long as the thread."""
        self._nursery.start_soon(work, *args)

    def _on_trio(self, work: Callable[[], object]) -> None:
        try:
            self._token.run_sync_soon(work)
        except trio.RunFinishedError:
            return  # `ended` tells whoever waits

    def _run(self, main: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        error: BaseException | None = None
        try:
            trio.run(self._main, main)
        except BaseException as raised:  # the boundary: it goes on in whoever asks for `ended`
            error = raised
        self.tell(self._end, error)

    async def _main(self, main: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._token, self._questions = trio.lowlevel.current_trio_token(), trio.Semaphore(MAX_QUESTIONS)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await main(lambda: self.tell(_set_result, self._ready, None))
            nursery.cancel_scope.cancel()

    def _end(self, error: BaseException | None) -> None:
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
        for future in list(self._waiting):
            _set_error(future, TransportDown(f"{self._what} has ended"))


def _set_result(future: "asyncio.Future[Any]", result: object) -> None:
    if not future.done():
        future.set_result(result)


def _set_error(future: "asyncio.Future[Any]", error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
