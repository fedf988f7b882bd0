"""Noise and yamux as py-libp2p has them, at less cost for each message: fewer system calls, fewer frames.

    reading    upstream asks the socket for the two bytes of a length, then for what they announce: here it is asked
               once for as much as there is
    windows    upstream returns a stream's window after every read, in a frame of its own, encrypted and sent by itself:
               here by halves, as yamux means it
    writing    one task of the connection's own writes; others queue frames, which go in one write together. Upstream
               lets whoever has a frame write it: cancelled in the middle that leaves the peer's cipher behind, and the
               peer cannot read what follows. The queue is bounded, and a peer that takes nothing for STALL_S is gone
    limits     upstream lets a peer grow each window to 16 MiB of this node's memory, and takes whatever comes beyond a
               window: here a stream holds WINDOW_BYTES, and one that is sent more ends

Importing this module imports libp2p.
"""

import struct
from contextlib import suppress
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer import muxer_multistream
from libp2p.stream_muxer.yamux import yamux

__all__ = ["Connection", "Noise"]

WINDOW_BYTES = 2**20  # of a stream, at most
READ_BYTES = 65_536
QUEUE_BYTES = 65_536  # from which on data waits; the queue and one write may be that and a frame each
DRAIN_S = 1.0  # for what is queued when the connection ends
STALL_S = 30.0  # for one write
END_S = 5.0


class _Buffered:
    """A raw connection that is read in large pieces."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._read, self._offset = b"", 0

    async def read(self, n: int | None = None) -> bytes:
        """Return at most `n` bytes; none where the peer has ended."""
        if self._offset >= len(self._read):
            self._read, self._offset = await self._connection.read(READ_BYTES), 0
        end = len(self._read) if n is None else min(self._offset + n, len(self._read))
        found, self._offset = self._read[self._offset : end], end
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class Noise(Transport):  # type: ignore[misc]  # libp2p has no types that mypy can follow
    """Noise over a connection that is read in large pieces."""

    async def secure_inbound(self, conn: Any) -> Any:
        """Shake hands with whoever has called."""
        return await super().secure_inbound(_Buffered(conn))

    async def secure_outbound(self, conn: Any, peer_id: ID) -> Any:
        """Shake hands with whom this node has called."""
        return await super().secure_outbound(_Buffered(conn), peer_id)


class _Buffer(bytearray):
    """What a stream has been sent and has not been read."""

    def extend(self, data: Any) -> None:
        """Add what has come. Raises BufferError for more than a window: no honest peer sends it."""
        if len(self) + len(data) > WINDOW_BYTES:
            raise BufferError("more than the window")
        super().extend(data)


class _Buffers(dict[int, bytearray]):
    """Bounded buffers, by the stream's number."""

    def __setitem__(self, number: int, buffer: bytearray) -> None:
        super().__setitem__(number, _Buffer(buffer))


class _Stream(yamux.YamuxStream):  # type: ignore[misc]
    """A stream whose window is given back by halves."""

    _pending_recv_release: int  # bytes that were read, and not given back

    async def read(self, n: int | None = -1) -> bytes:
        """Return what is there, at most `n` bytes of it, or else wait."""
        buffer = self.conn.stream_buffers.get(self.stream_id)
        if not buffer or n is None or n < 0 or self.recv_closed or self.closed:
            return bytes(await super().read(n))
        await trio.lowlevel.checkpoint()
        data = bytes(buffer[:n])
        del buffer[: len(data)]
        await self._auto_tune_and_send_window_update(bytes_read=len(data))
        return data

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        self._pending_recv_release += bytes_read
        increment = self._pending_recv_release
        if increment < self.target_recv_window // 2:
            return
        self._pending_recv_release = 0
        self.recv_window += increment
        increment += self._apply_autotune_epoch(len(self.conn.stream_buffers.get(self.stream_id, b"")))
        await self.send_window_update(increment)


class Connection(yamux.Yamux):  # type: ignore[misc]
    """A connection with one writer: callers queue frames, and what waits goes in one write."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream_buffers = _Buffers()
        self._queued = bytearray()  # frames that the writer has not taken
        self._num_queued = self._num_written = 0  # bytes so far
        self._turns = trio.Lock()  # data waits for room in the order in which it came
        self._has_frames, self._has_room, self._has_written = (trio.lowlevel.ParkingLot() for _ in range(3))
        self._failure: BaseException | None = None  # why nothing is written any more

    async def start(self) -> None:
        """Run until the connection ends; upstream leaves the socket of one that is cancelled to the garbage collector.

        Until that comes the peer holds the connection for good.
        """
        try:
            await super().start()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(END_S), suppress(BaseLibp2pError, OSError):
                await self.secured_conn.close()

    async def _handle_incoming_with_ready_signal(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Read what comes, with the writer beside it: they end together."""
        self._nursery.start_soon(self._write_queued)
        await super()._handle_incoming_with_ready_signal(task_status)

    async def _write_frame(self, data: bytes) -> None:
        """Queue a frame. Raises ConnectionClosedError. What is cancelled is queued whole, or not at all.

        Data and the end of it wait for room; of other frames, twelve bytes each, there may be more before they wait as
        well. GO_AWAY waits until it is written, for a while.
        """
        _, kind, flags, number, num_bytes = struct.unpack(yamux.YAMUX_HEADER_FORMAT, data[: yamux.HEADER_SIZE])
        is_bulk = kind == yamux.TYPE_DATA or flags & yamux.FLAG_FIN
        if len(self._queued) < (1 if is_bulk else 2) * QUEUE_BYTES and not (is_bulk and self._turns.locked()):
            self._queue(data)
        else:
            try:
                await self._queue_in_turn(data)
            except trio.Cancelled:
                self._take_back(kind, flags, number, num_bytes)
                raise
        if kind == yamux.TYPE_GO_AWAY:
            with trio.CancelScope(shield=True), trio.move_on_after(DRAIN_S):
                await self._drain()

    async def _queue_in_turn(self, data: bytes) -> None:
        async with self._turns:
            while len(self._queued) >= QUEUE_BYTES and self._failure is None:
                await self._has_room.park()
            self._queue(data)

    def _take_back(self, kind: int, flags: int, number: int, num_bytes: int) -> None:
        """Undo what upstream has noted of a frame that was not queued: window that it took, a stream that it began."""
        stream = self.streams.get(number)
        if stream is not None and kind == yamux.TYPE_DATA:
            stream.send_window += num_bytes
        elif stream is not None and flags & yamux.FLAG_SYN:
            self._finalize_stream_locked(stream, fully_closed=True)

    def _queue(self, data: bytes) -> None:
        if self._failure is not None:
            raise ConnectionClosedError("the connection has ended") from self._failure
        self._queued += data
        self._num_queued += len(data)
        self._has_frames.unpark_all()

    async def _drain(self) -> None:
        """Wait until what is queued now has been written, or never will be."""
        until = self._num_queued
        while self._num_written < until and self._failure is None:
            await self._has_written.park()

    async def _write_queued(self) -> None:
        """Write what is queued. Ends with the connection; where a write fails or stands still, it ends that."""
        try:
            while True:
                while not self._queued:
                    await self._has_frames.park()
                frames = bytes(self._queued)
                self._queued.clear()
                self._has_room.unpark_all()
                with trio.fail_after(STALL_S):
                    await self.secured_conn.write(frames)
                self._num_written += len(frames)
                self._has_written.unpark_all()
        except Exception as error:  # the boundary: whoever waits to write has it as a cause
            self._fail(error)
            with trio.CancelScope(shield=True), trio.move_on_after(END_S):
                await self._cleanup_on_error()
            self._nursery.cancel_scope.cancel()
        finally:
            self._fail(ConnectionClosedError("nobody reads or writes it any more"))

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._queued.clear()
        self._has_room.unpark_all()
        self._has_written.unpark_all()


yamux.MAX_WINDOW_SIZE = WINDOW_BYTES
yamux.YamuxStream = _Stream
muxer_multistream.Yamux = Connection  # upstream makes this one for yamux, whatever class it was given
