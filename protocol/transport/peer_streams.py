"""A node's streams: one for each peer that it asks, opened when it is needed, and those that peers have opened.

A stream of this side is closed when it has been idle for long, and opened anew after whatever ended it. Of those that
peers have opened there is a largest number; where a new one comes and there is no room, the one that has been idle
longest is closed, and its peer asks on another when it needs one.

How a stream is opened is the caller's: nothing here knows a network. All streams end with one carrier, and so does
this.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from protocol.transport.answering import Answerer, AnswerSpace
from protocol.transport.asking import Asker, NotTaken
from protocol.transport.base import PeerUnreachable, TransportError
from protocol.transport.dispatch import Dispatcher
from protocol.transport.mux import Tally

__all__ = ["PeerStreams", "Stream"]

_T = TypeVar("_T")
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

IDLE_S = 600.0  # after which a stream is closed: long, since p2pd loses some quota of a QUIC connection at each end
SWEEP_S = 60.0
MAX_OWN_STREAMS = 128  # to ask on; of more, those that have been idle longest are closed
MAX_STREAMS = 256  # that peers have open
MAX_CLOSING_STREAMS = 64  # and on top of these, that they have been told to close
MAX_STREAMS_PER_PEER = 2  # one is enough; another comes where the first one's end is still on its way
NUM_ATTEMPTS = 3  # at a request that a closing stream did not take


class _Own:
    """A stream to ask one peer on: it is being opened, or open, or has ended."""

    def __init__(self, opening: "asyncio.Task[Asker]") -> None:
        self.opening = opening
        self.num_waiting = 0  # for it to be opened

    @property
    def asker(self) -> Asker | None:
        """None where it is not open, or cannot be."""
        is_open = self.opening.done() and not self.opening.cancelled() and self.opening.exception() is None
        return self.opening.result() if is_open else None

    @property
    def is_usable(self) -> bool:
        """Whether a request may be put on it, now or when it is open."""
        asker = self.asker
        return not self.opening.done() if asker is None else asker.takes_requests

    @property
    def is_idle(self) -> bool:
        """Whether it is open and nobody needs it."""
        return self.asker is not None and self.asker.is_idle and not self.num_waiting


class PeerStreams:
    """All streams of one node."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        tally: Tally,
        open_stream: Callable[[str], Awaitable[Stream]],
    ) -> None:
        """`open_stream` takes a node id and raises a TransportError. A bug in a stream's work fails the dispatcher."""
        self._dispatcher, self._tally, self._open_stream = dispatcher, tally, open_stream
        self._space = AnswerSpace()
        self._loop = asyncio.get_running_loop()
        self._own: dict[str, _Own] = {}  # by node id
        self._answerers: list[Answerer] = []  # the oldest first
        self._tasks: set[asyncio.Task[Any]] = set()
        self._spawn(self._sweep())

    @property
    def num_taken(self) -> int:
        """How many streams peers have open."""
        return len(self._answerers)

    @property
    def num_own(self) -> int:
        """How many streams there are to ask on."""
        return len(self._own)

    async def request(self, node_id: str, name: str, payload: bytes, max_response_bytes: int) -> bytes:
        """Ask a peer. Raises a TransportError."""
        for _ in range(NUM_ATTEMPTS):
            asker = await self._asker(node_id)
            try:
                return await asker.request(name, payload, max_response_bytes)
            except NotTaken:
                continue
        raise PeerUnreachable("the peer closes every stream at once")

    async def _asker(self, node_id: str) -> Asker:
        """Return an open stream to a peer. An opening that nobody waits for any more is given up."""
        own = self._own.get(node_id)
        if own is None or not own.is_usable:
            self._close_idle_own(MAX_OWN_STREAMS - 1)
            own = self._own[node_id] = _Own(self._spawn(self._open(node_id)))
        elif own.asker is not None:
            return own.asker
        own.num_waiting += 1
        try:
            await asyncio.wait({own.opening})
        finally:
            own.num_waiting -= 1
            if not own.num_waiting:
                own.opening.cancel()
            if own.asker is None and self._own.get(node_id) is own and not own.num_waiting:
                del self._own[node_id]
        if own.opening.cancelled():
            raise PeerUnreachable(f"{node_id} was disconnected from here")
        return own.opening.result()

    async def _open(self, node_id: str) -> Asker:
        reader, writer = await self._open_stream(node_id)
        asker = Asker(reader, writer, self._tally)
        running = self._spawn(asker.run())
        running.add_done_callback(lambda _: self._forget(node_id, asker))
        return asker

    def _forget(self, node_id: str, asker: Asker) -> None:
        own = self._own.get(node_id)
        if own is not None and own.asker is asker:
            del self._own[node_id]

    def _close_idle_own(self, num_kept: int, idle_s: float = 0.0) -> None:
        """Close the streams to ask on that have been idle for so long, the longest first, until so many are left."""
        now_s = self._loop.time()
        idle = [(own.asker, node_id) for node_id, own in self._own.items() if own.asker is not None and own.is_idle]
        idle.sort(key=lambda item: item[0].used_at_s)
        for asker, node_id in idle[: max(0, len(self._own) - num_kept)]:
            if now_s - asker.used_at_s >= idle_s:
                asker.close()
                del self._own[node_id]

    async def take(self, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer on a stream that a peer has opened, until it ends."""
        if not self._make_room(peer):
            self._tally.broken["too_many_streams"] += 1
            writer.transport.abort()
            return
        answerer = Answerer(peer, reader, writer, self._tally, self._dispatcher, self._space)
        self._answerers.append(answerer)
        try:
            await asyncio.wait({self._spawn(answerer.run())})  # so that cancelling it is no error of the caller's
        finally:
            self._answerers.remove(answerer)

    def _make_room(self, peer: str) -> bool:
        """Return whether one more stream may be taken, after the end of one that its peer or nobody needs."""
        of_peer = [answerer for answerer in self._answerers if answerer.asker == peer and not answerer.has_ended]
        if len(of_peer) >= MAX_STREAMS_PER_PEER:
            of_peer[0].cut_off("too_many_streams")
            return len(self._answerers) < MAX_STREAMS + MAX_CLOSING_STREAMS
        if sum(not answerer.is_closing for answerer in self._answerers) < MAX_STREAMS:
            return True
        idle = [answerer for answerer in self._answerers if answerer.is_idle]
        if not idle or len(self._answerers) >= MAX_STREAMS + MAX_CLOSING_STREAMS:
            return False
        min(idle, key=lambda answerer: answerer.used_at_s).close()
        return True

    async def _sweep(self) -> None:
        """Close idle streams now and then. Ends by `end`."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._close_idle_own(0, IDLE_S)
            for answerer in self._answerers:
                if answerer.is_idle and self._loop.time() - answerer.used_at_s >= 2 * IDLE_S:
                    answerer.close()

    def end_peer(self, node_id: str) -> None:
        """End the streams with one peer."""
        own = self._own.pop(node_id, None)
        if own is not None and own.asker is not None:
            own.asker.abort()
        elif own is not None:
            own.opening.cancel()
        for answerer in self._answerers:
            if answerer.asker == node_id:
                answerer.abort()

    async def end(self) -> None:
        """End everything."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> "asyncio.Task[_T]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TransportError):  # which who waited for an opening has heard
            self._dispatcher.fail(error)
