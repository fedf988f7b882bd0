"""Background tasks of one node: started together, ended together, and none dies unnoticed."""

import asyncio
from collections.abc import Coroutine
from typing import Any

__all__ = ["Tasks", "first_of"]


class Tasks:
    """The tasks that run until `close`. The first exception that escapes one is raised by `wait_failed`."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run a coroutine in the background; after `close` it is dropped."""
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def close(self) -> None:
        """Cancel everything and wait until it has ended."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # failures are kept by `_ended`

    async def wait_failed(self) -> None:
        """Return never; raise what escaped a task."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and self._failure is None:
            self._failure = error
            self._failed.set()


async def first_of(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of them ends, raise what it has raised, and cancel the others."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
