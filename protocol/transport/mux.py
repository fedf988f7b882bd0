"""One stream with many requests under way: what both of its sides have in common.

    framing     the bytes of a frame                  pace       whoever is too slow is cut off
    outbox      what waits to be written              here       reading, counting, the end of a stream
    asking      the side that opened the stream       answering  the other side

Bytes come from asyncio's streams, whatever carries them; nothing here knows a network. A side holds of what its peer
sends no more than one frame beside the bodies that it has admitted, and of what it sends no more than the bodies that
its own caps allow: a peer that reads nothing, sends nothing or sends nonsense costs these bytes until its stream ends,
and its stream alone. Between 64 frames others have their turn on the event loop.
"""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field

from protocol.transport.framing import BrokenStream, Frame, FrameParser
from protocol.transport.outbox import Outbox
from protocol.transport.pace import Pace

__all__ = ["MAX_OPEN_REQUESTS", "Mux", "Tally"]

MAX_OPEN_REQUESTS = 32  # on one stream: begun, and not ended on both sides
READ_BYTES = 65_536
NUM_FRAMES_PER_TURN = 64


@dataclass(slots=True)
class Tally:
    """What has crossed a node's streams, and how some ended."""

    bytes_in: int = 0
    bytes_out: int = 0
    num_requests_in: int = 0
    num_requests_out: int = 0
    own_names: frozenset[str] = frozenset()  # of requests that are the transport's own, and not counted
    broken: Counter[str] = field(default_factory=Counter)  # streams, by what their peers did

    def count_out(self, num_bytes: int) -> None:
        """Count what is written."""
        self.bytes_out += num_bytes


class Mux(ABC):
    """One side of a stream, from its opening to its end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        self._reader, self._writer, self._tally = reader, writer, tally
        self._parser = FrameParser()
        self._reading = Pace(self.cut_off)
        self._writing = Pace(self.cut_off)
        self._outbox = Outbox(writer, self._writing, tally.count_out)
        self._reason: str | None = None  # why the stream is broken
        self._is_aborted = False
        self.has_ended = False
        self._loop = asyncio.get_running_loop()
        self.used_at_s = self._loop.time()  # when the last request began or ended

    async def run(self) -> None:
        """Serve the stream until it ends: by the peer, by `abort`, by its own fault (counted), by cancellation."""
        writing = asyncio.create_task(self._outbox.run())
        reading = asyncio.create_task(self._read())
        tasks = {reading, writing}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.has_ended = True
            self._reading.end()
            self._writing.end()
            self._writer.transport.abort()
            for task in tasks:
                task.cancel()
            self._end()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            self._count_end(outcomes)

    def _count_end(self, outcomes: "list[BaseException | None]") -> None:
        """Count a stream that was broken. Whatever is no peer's fault is raised."""
        for outcome in outcomes:
            if isinstance(outcome, BrokenStream):
                self._reason = self._reason or outcome.reason
            elif isinstance(outcome, OSError | EOFError):
                self._reason = self._reason or "broken_off"
            elif isinstance(outcome, Exception):
                raise outcome
        if self._reason is not None and not self._is_aborted:
            self._tally.broken[self._reason] += 1

    def abort(self) -> None:
        """End the stream at once, by this side's own wish."""
        self.has_ended = self._is_aborted = True
        self._writer.transport.abort()

    def _note_use(self) -> None:
        self.used_at_s = self._loop.time()

    async def _read(self) -> None:
        num_frames = 0
        self._watch()
        while data := await self._reader.read(READ_BYTES):
            self._tally.bytes_in += len(data)
            self._reading.gain(len(data))
            for frame in self._parser.feed(data):
                self._take(frame)
                num_frames += 1
                if num_frames % NUM_FRAMES_PER_TURN == 0:
                    await asyncio.sleep(0)
                    await self._outbox.wait_room()
            self._watch()
        if self._parser.is_within_frame or self._is_owed():
            raise EOFError("in the middle")

    def _watch(self) -> None:
        """Let the time run for what the peer owes."""
        self._reading.run_while(self._parser.is_within_frame or self._is_owed())

    def cut_off(self, reason: str = "too_slow") -> None:
        """End the stream at once, by the peer's fault."""
        self.has_ended, self._reason = True, self._reason or reason
        self._writer.transport.abort()

    @abstractmethod
    def _take(self, frame: Frame) -> None:
        """Do what a frame says. Raises BrokenStream for one that must not come now."""

    @abstractmethod
    def _is_owed(self) -> bool:
        """Whether the peer has to send something now."""

    @abstractmethod
    def _end(self) -> None:
        """Let go of everything: the stream is gone."""
