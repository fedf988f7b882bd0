"""A bridge's channel between two processes, over one socket pair. Integers are big-endian.

    frame   1 byte   kind: 1 ASK, 2 ANSWER, 3 REFUSAL, 4 CANCEL
            4 bytes  number of the request, which its asker counts up
            4 bytes  length of what follows, at most MAX_CONTENT_BYTES
            n bytes  ASK      4 bytes the most that the answer may have, 1 byte length of the name, name, payload
                     ANSWER   payload
                     REFUSAL  1 byte length of the code, code, detail (UTF-8)
                     CANCEL   nothing: the asker has given up

Both ends are this program, so whatever else comes is a bug or another version, and breaks the channel. What waits to
be written is bounded by the number of requests that may be under way.
"""

import asyncio
import socket
import struct

from protocol.bridge.channel import FAR, MAX_REQUESTS, Channel, ChannelBroken
from protocol.limits import MAX_REFUSAL_DETAIL_CHARS
from protocol.tasks import first_of
from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused, RequestTimedOut, ResponseTooLarge
from protocol.transport.dispatch import MAX_NAME_CHARACTERS

__all__ = ["MAX_CONTENT_BYTES", "PipeChannel"]

ASK, ANSWER, REFUSAL, CANCEL = 1, 2, 3, 4
_HEADER = struct.Struct(">BII")
_ASK = struct.Struct(">IB")
MAX_CONTENT_BYTES = MAX_FRAME_BYTES + _ASK.size + MAX_NAME_CHARACTERS
TOO_LARGE = "response_too_large"  # a refusal: the answer is over what the asker takes


class PipeChannel(Channel):
    """One end of a socket pair."""

    def __init__(self, end: socket.socket) -> None:
        """`end` is this object's from now on."""
        super().__init__()
        self._socket = end
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, asyncio.Future[bytes]] = {}
        self._answering: dict[int, asyncio.Task[None]] = {}
        self._last_number = 0
        self._places = asyncio.Semaphore(MAX_REQUESTS)
        self._reading: asyncio.Task[None] | None = None
        self._is_closed = False
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None

    async def start(self) -> None:
        """Read and answer from now on."""
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        self._reading = asyncio.create_task(self._read(self._reader))
        self._reading.add_done_callback(self._ended)

    async def request(self, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float) -> bytes:
        """Ask the other process; return its response."""
        try:
            async with asyncio.timeout(timeout_s), self._places:
                return await self._ask(name, payload, max_response_bytes)
        except TimeoutError:
            raise RequestTimedOut(f"no response within {timeout_s:g} s") from None

    async def _ask(self, name: str, payload: bytes, max_response_bytes: int) -> bytes:
        if self._writer is None or self._failure is not None or self._is_closed:
            raise ChannelBroken("the other side is gone")
        self._last_number = number = self._last_number % (2**32 - 1) + 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            await self._write(ASK, number, _ASK.pack(max_response_bytes, len(name)) + name.encode() + payload)
            return await future
        except asyncio.CancelledError:
            if not self._writer.is_closing():
                self._writer.write(_HEADER.pack(CANCEL, number, 0))
            raise
        finally:
            del self._asked[number]

    async def _write(self, kind: int, number: int, content: bytes) -> None:
        assert self._writer is not None
        if len(content) > MAX_CONTENT_BYTES:
            raise ValueError(f"{len(content)} bytes are over the limit of {MAX_CONTENT_BYTES}")
        try:
            self._writer.write(_HEADER.pack(kind, number, len(content)) + content)
            await self._writer.drain()
        except OSError as error:
            raise ChannelBroken(f"the other side is gone: {error}") from error

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Take frames until the other side hangs up, which breaks the channel, or `close` cancels this."""
        try:
            while True:
                kind, number, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
                if size > MAX_CONTENT_BYTES:
                    raise ChannelBroken(f"a frame of {size} bytes, over the limit of {MAX_CONTENT_BYTES}")
                self._take(kind, number, await reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError):
            raise ChannelBroken("the other side has hung up") from None

    def _take(self, kind: int, number: int, content: bytes) -> None:
        if kind == ASK:
            task = asyncio.create_task(self._answer(number, content))
            self._answering[number] = task
            task.add_done_callback(lambda task: self._answered(number, task))
            return
        if kind == CANCEL:
            if number in self._answering:
                self._answering[number].cancel()
            return
        future = self._asked.get(number)
        if future is None or future.done():
            return  # given up
        if kind == ANSWER:
            future.set_result(content)
        elif kind == REFUSAL:
            length = content[0]
            code, detail = content[1 : 1 + length].decode(), content[1 + length :].decode()
            error = ResponseTooLarge(detail) if code == TOO_LARGE else RequestRefused(code, detail)
            future.set_exception(error)
        else:
            raise ChannelBroken(f"no frame is of kind {kind}")

    async def _answer(self, number: int, content: bytes) -> None:
        max_response_bytes, length = _ASK.unpack_from(content)
        name = content[_ASK.size : _ASK.size + length].decode()
        payload = content[_ASK.size + length :]
        try:
            with self._dispatcher.admit(FAR, name, len(payload)):
                response = await self._dispatcher.answer(FAR, name, payload)
            if len(response) > max_response_bytes:
                raise RequestRefused(TOO_LARGE, f"{len(response)} bytes, over the cap of {max_response_bytes}")
            await self._write(ANSWER, number, response)
        except RequestRefused as refusal:
            code, detail = refusal.code.encode(), refusal.detail[:MAX_REFUSAL_DETAIL_CHARS].encode()
            await self._write(REFUSAL, number, bytes([len(code)]) + code + detail)

    def _answered(self, number: int, task: "asyncio.Task[None]") -> None:
        del self._answering[number]
        self._ended(task)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Keep what has broken the channel, and let nobody wait for it."""
        error = None if task.cancelled() else task.exception()
        if error is None or self._failure is not None or self._is_closed:
            return
        self._failure = error
        self._failed.set()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ChannelBroken("the other side is gone"))

    async def close(self) -> None:
        """Hang up."""
        if self._is_closed:
            return
        self._is_closed = True
        tasks = [*self._answering.values(), *([self._reading] if self._reading is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # `_ended` has looked at them
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ChannelBroken("the channel was closed"))
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.close()

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug, or ChannelBroken."""
        await first_of(self._dispatcher.wait_failed(), self._failed.wait())
        assert self._failure is not None
        raise self._failure
