"""Messages between a node and its engine process: MessagePack over two pipes, each with its length before it."""

import os
import struct
from typing import Any

import msgpack

__all__ = ["Pipe"]

_LENGTH = struct.Struct("<Q")
_READ_BYTES = 1 << 20


class Pipe:
    """One end of a pair of pipes. One thread reads and one writes at a time."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd

    def send(self, message: Any) -> None:
        """Write one message. Raises BrokenPipeError where the other end is gone."""
        body = msgpack.packb(message)
        left = memoryview(_LENGTH.pack(len(body)) + body)
        while left:
            left = left[os.write(self._write_fd, left) :]

    def receive(self) -> Any:
        """Wait for one message. Raises EOFError where the other end is gone."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return msgpack.unpackb(self._read(length), use_list=True)

    def _read(self, num_bytes: int) -> bytes:
        parts = []
        while num_bytes:
            part = os.read(self._read_fd, min(num_bytes, _READ_BYTES))
            if not part:
                raise EOFError("the other end of the pipe was closed")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Close both pipes."""
        os.close(self._read_fd)
        os.close(self._write_fd)
