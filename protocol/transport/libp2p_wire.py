"""Noise and yamux as py-libp2p has them, at less cost for each message: fewer system calls, fewer frames.

    reading    upstream asks the socket for the two bytes of a length, then for what they announce: here it is asked
               once for as much as there is
    windows    upstream returns a stream's window after every read, in a frame of its own, encrypted and sent by itself:
               here by halves, as yamux means it
    writing    frames that wait for the connection go in one write together. A write that is cut short has left the
               peer's cipher behind, and ends the connection: upstream goes on, and the peer cannot read what follows
    limits     upstream lets a peer grow each window to 16 MiB of this node's memory, and takes whatever comes beyond a
               window: here a stream holds WINDOW_BYTES, and one that is sent more ends

Importing this module imports libp2p.
"""

from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.security.noise.transport import Transport
from libp2p.stream_muxer.yamux import yamux

__all__ = ["Connection", "Noise"]

WINDOW_BYTES = 2**20  # of a stream, at most
READ_BYTES = 65_536


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
    """A connection on which frames that wait are written together."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stream_buffers = _Buffers()
        self._unsent = bytearray()
        self._num_queued = self._num_sent = 0  # frames
        self._is_cut_short = False

    async def _write_frame(self, data: bytes) -> None:
        """Write a frame, after those that were queued before it. Raises ConnectionClosedError."""
        self._unsent += data
        self._num_queued += 1
        number = self._num_queued
        async with self._write_lock:
            if self._is_cut_short:
                raise ConnectionClosedError("the connection has ended")
            if self._num_sent < number:
                await self._write_all()

    async def _write_all(self) -> None:
        frames, num = bytes(self._unsent), self._num_queued
        self._unsent.clear()
        self._is_cut_short = True
        try:
            await self.secured_conn.write(frames)
            self._num_sent, self._is_cut_short = num, False
        finally:
            if self._is_cut_short:
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await self.secured_conn.close()


yamux.MAX_WINDOW_SIZE = WINDOW_BYTES
yamux.YamuxStream = _Stream
