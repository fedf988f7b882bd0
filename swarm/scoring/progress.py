"""Which answer a scoring process is at, and since when: two numbers in memory that parent and child share.

A message would say the same and cost a system call and a change of process for every answer.
"""

import mmap
import os
import struct
import tempfile
from typing import Final

__all__ = ["IDLE", "Progress"]

IDLE: Final = -1
_LAYOUT: Final = struct.Struct("=qd")  # job, and when it began on the monotonic clock that processes share


class Progress:
    """The shared numbers. The parent makes them, the child attaches and writes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _LAYOUT.size)

    @classmethod
    def create(cls) -> "Progress":
        """Make them, in a file that has no name."""
        with tempfile.TemporaryFile() as file:
            file.write(_LAYOUT.pack(IDLE, 0.0))
            file.flush()
            return cls(os.dup(file.fileno()))

    @classmethod
    def attach(cls, fd: int) -> "Progress":
        """Attach to inherited ones, before the sandbox closes."""
        progress = cls(fd)
        os.close(fd)
        return progress

    def write(self, job: int, began_s: float) -> None:
        """Say which answer is scored from now on."""
        _LAYOUT.pack_into(self._memory, 0, job, began_s)

    def read(self) -> tuple[int, float]:
        """Return (job or IDLE, when it began)."""
        job, began_s = _LAYOUT.unpack_from(self._memory)
        return job, began_s

    def close(self) -> None:
        """Free the parent's side."""
        self._memory.close()
        os.close(self.fd)
