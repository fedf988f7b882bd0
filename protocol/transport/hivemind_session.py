"""What lives and ends with one p2pd: its part in the DHT, the streams with peers, and whatever waits for it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from protocol.transport.base import ClockSkewed, RequestTimedOut, TransportDown
from protocol.transport.peer_id import peer_bytes_of

if TYPE_CHECKING:
    from protocol.transport.hivemind_daemon import Daemon
    from protocol.transport.hivemind_dht import Dht
    from protocol.transport.peer_streams import PeerStreams

__all__ = ["Session"]

_T = TypeVar("_T")


class Session:
    """One p2pd with what uses it. `failed` is called with the task of whatever ends in the background."""

    def __init__(
        self, daemon: "Daemon", dht: "Dht", streams: "PeerStreams", failed: Callable[["asyncio.Task[Any]"], None]
    ) -> None:
        self.daemon, self.dht, self.streams, self._failed = daemon, dht, streams, failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_ended = False

    def parse(self, address: str) -> bytes:
        """Return a multiaddress as p2pd reads it. Raises ValueError."""
        return self.daemon.parse(address)

    async def connect(self, node_id: str, target: bytes) -> None:
        """Connect to a peer, and get to know it. Raises PeerUnreachable, ClockSkewed."""
        peer = peer_bytes_of(node_id)
        await self.daemon.connect(peer, [target])
        try:
            await self.dht.meet(peer)
        except ClockSkewed:
            await self.daemon.disconnect(peer)
            raise
        self.spawn(self.dht.fill_routing_table())

    async def run(self, work: Coroutine[Any, Any, _T], timeout_s: float) -> _T:
        """Await something that uses p2pd. Raises TransportDown when it ends, RequestTimedOut."""
        if self._has_ended:
            work.close()
            raise TransportDown("p2pd has ended")
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                raise RequestTimedOut(f"no response within {timeout_s:g} s")
            if task.cancelled():
                raise TransportDown("p2pd has ended")
            return task.result()
        finally:
            task.cancel()
            task.add_done_callback(_forget)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run in the background as long as p2pd."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._failed)

    async def end(self, *, at_once: bool = False) -> None:
        """Cancel everything, then end p2pd; `at_once` where it does not listen any more."""
        self._has_ended = True
        for task in list(self._tasks):
            task.cancel()
        await self.streams.end()
        await self.daemon.end(at_once=at_once)


def _forget(task: "asyncio.Task[Any]") -> None:
    """Take note of the outcome of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
