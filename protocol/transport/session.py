"""What lives and ends with what carries the bytes: a part in the DHT, the streams with peers, and whatever waits."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from protocol.transport.base import ClockSkewed, Record, RequestTimedOut, TransportDown
from protocol.transport.peer_id import peer_bytes_of
from protocol.transport.peer_streams import PeerStreams, Stream

__all__ = ["Carrier", "RecordTable", "Session"]

_T = TypeVar("_T")


class Carrier(Protocol):
    """One life of what carries the bytes. Peers are the bytes of peer ids. What it does may raise TransportDown."""

    what: str  # its name in messages

    def parse(self, address: str) -> Any:
        """Return a multiaddress without its last peer id as `connect` takes it. Raises ValueError."""

    async def connect(self, peer: bytes, addresses: list[Any]) -> None:
        """Connect to a peer. Raises PeerUnreachable."""

    async def open_stream(self, peer: bytes, protocol: str) -> Stream:
        """Open a stream to a peer. Raises PeerUnreachable."""

    async def disconnect(self, peer: bytes) -> None:
        """Close every connection to a peer."""

    async def visible_addresses(self) -> tuple[str, ...]:
        """Return where others can reach this node; which also tells whether the carrier still answers."""

    async def peers(self) -> list[tuple[bytes, list[Any]]]:
        """Return the connected peers, with addresses at which they may be reached."""

    async def wait_ended(self) -> None:
        """Wait until it has ended, whoever ended it."""

    def is_stopped(self) -> bool:
        """Whether it is known that it will not answer."""

    async def end(self, *, at_once: bool = False) -> None:
        """End it, whatever state it is in; `at_once` where it cannot end itself."""


class RecordTable(Protocol):
    """A node's part in the DHT."""

    async def meet(self, peer: bytes) -> None:
        """Get to know a peer that is connected. Raises PeerUnreachable, ClockSkewed."""

    async def fill_routing_table(self) -> None:
        """Learn who is near, so that they learn of this node too."""

    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """As `Transport.store`."""

    async def lookup(self, key: bytes, timeout_s: float) -> Sequence[Record]:
        """As `Transport.lookup`."""


class Session:
    """One life of a carrier, with what uses it. `failed` is called with the task of whatever ends in the background."""

    def __init__(
        self,
        daemon: Carrier,
        dht: RecordTable,
        streams: PeerStreams,
        failed: Callable[["asyncio.Task[Any]"], None],
    ) -> None:
        self.daemon, self.dht, self.streams, self._failed = daemon, dht, streams, failed
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_ended = False

    def parse(self, address: str) -> Any:
        """Return a multiaddress as the carrier reads it. Raises ValueError."""
        return self.daemon.parse(address)

    async def connect(self, node_id: str, target: Any) -> None:
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
        """Await something that uses the carrier. Raises TransportDown when it ends, RequestTimedOut."""
        if self._has_ended:
            work.close()
            raise TransportDown(f"{self.daemon.what} has ended")
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                raise RequestTimedOut(f"no response within {timeout_s:g} s")
            if task.cancelled():
                raise TransportDown(f"{self.daemon.what} has ended")
            return task.result()
        finally:
            task.cancel()
            task.add_done_callback(_forget)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Let something run in the background as long as the carrier lives."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._failed)

    async def end(self, *, at_once: bool = False) -> None:
        """Cancel everything, then end the carrier; `at_once` where it does not listen any more."""
        self._has_ended = True
        for task in list(self._tasks):
            task.cancel()
        await self.streams.end()
        await self.daemon.end(at_once=at_once)


def _forget(task: "asyncio.Task[Any]") -> None:
    """Take note of the outcome of a task that nobody waits for any more."""
    if not task.cancelled():
        task.exception()
