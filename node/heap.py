"""Keeps the process as small as what it uses: freed memory goes back to the system.

A round frees and takes tensors of ever other sizes, in several threads. glibc gives each thread an arena of its own
and keeps what is freed in it, so that a node which runs for days grows although nothing is leaked. On systems without
glibc both functions do nothing.
"""

import ctypes
from functools import cache

__all__ = ["give_back", "limit_arenas"]

_M_ARENA_MAX = -8  # malloc.h
_NUM_ARENAS = 2


@cache
def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def limit_arenas() -> None:
    """Let threads share their arenas. Must run before they start."""
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_ARENA_MAX, _NUM_ARENAS)


def give_back() -> None:
    """Return what is free to the system; takes milliseconds, and may be called in any thread."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)
