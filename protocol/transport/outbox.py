"""What one side still has to write to a stream: small frames first, then bodies in turns, a piece of each.

What is queued is bounded by who queues: a body stays with its owner until its last piece is handed to the socket, and
`wait_room` holds back who answers faster than the peer reads. The socket's own buffer holds two pieces or so.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable

from protocol.transport.framing import BODY, HEADER_BYTES, frame_bytes
from protocol.transport.pace import Pace

__all__ = ["Outbox"]

CHUNK_BYTES = 32_768  # of one body, before it is another's turn
MAX_SMALL_FRAMES = 64  # that wait; with more, nothing is read that would bring another


class _Body:
    """A body on its way: `kind` and `head` of the frame that opens it, until that is sent."""

    __slots__ = ("data", "head", "is_begun", "kind", "offset", "sent")

    def __init__(self, kind: int, head: bytes, data: bytes, sent: Callable[[], None]) -> None:
        self.kind, self.head, self.data, self.sent = kind, head, memoryview(data), sent
        self.offset, self.is_begun = 0, False


class Outbox:
    """The writing half of a stream."""

    def __init__(self, writer: asyncio.StreamWriter, pace: Pace, count: Callable[[int], None]) -> None:
        self._writer, self._pace, self._count = writer, pace, count
        self._small: deque[bytes] = deque()
        self._bodies: OrderedDict[int, _Body] = OrderedDict()  # by number of the request; the first is next
        self._filled, self._room = asyncio.Event(), asyncio.Event()
        self._room.set()

    def send(self, frame: bytes) -> None:
        """Queue a small frame."""
        self._small.append(frame)
        if len(self._small) >= MAX_SMALL_FRAMES:
            self._room.clear()
        self._filled.set()

    def send_body(self, number: int, kind: int, head: bytes, data: bytes, sent: Callable[[], None]) -> None:
        """Queue a body behind the frame that opens it; `sent` is called when the last piece is handed over."""
        self._bodies[number] = _Body(kind, head, data, sent)
        self._filled.set()

    def drop(self, number: int) -> tuple[bool, bool]:
        """Send no more of a body. Returns whether it had begun, and whether anything of it was left."""
        body = self._bodies.pop(number, None)
        return (True, False) if body is None else (body.is_begun, True)

    async def wait_room(self) -> None:
        """Wait until the peer has taken most of the small frames."""
        await self._room.wait()

    async def flush(self) -> None:
        """Write until nothing is left. Raises OSError where the stream is gone."""
        while pieces := self._next_pieces():
            num_bytes = sum(map(len, pieces))
            self._count(num_bytes)
            self._pace.run_while(True)
            self._writer.write(b"".join(pieces))
            await self._writer.drain()
            self._pace.gain(num_bytes)
        self._pace.run_while(False)

    async def run(self) -> None:
        """Write whatever is queued, until it is cancelled or the stream is gone (OSError)."""
        while True:
            await self.flush()
            self._filled.clear()
            await self._filled.wait()

    def _next_pieces(self) -> list[bytes | memoryview]:
        """Take at most `CHUNK_BYTES` or so from the queues."""
        pieces: list[bytes | memoryview] = []
        room = CHUNK_BYTES
        while self._small and room > 0:
            pieces.append(self._small.popleft())
            room -= len(pieces[-1])
        if len(self._small) < MAX_SMALL_FRAMES // 2:
            self._room.set()
        while self._bodies and room > 0:
            number, body = next(iter(self._bodies.items()))
            left = len(body.data) - body.offset
            size = min(left, CHUNK_BYTES)
            if pieces and size > room:
                break
            piece = body.data[body.offset : body.offset + size]
            kind, head = (BODY, b"") if body.is_begun else (body.kind, body.head)
            pieces += [frame_bytes(kind, number, head, len(piece)), piece]
            body.is_begun = True
            body.offset += size
            room -= HEADER_BYTES + len(head) + size
            if size == left:
                del self._bodies[number]
                body.sent()
            else:
                self._bodies.move_to_end(number)
        return pieces
