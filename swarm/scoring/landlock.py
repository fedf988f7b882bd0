"""Landlock for Linux: no path can be written, made, removed or executed, and no TCP port used.

It says by path what `seccomp` says by system call, so that a gap in one is closed by the other.
"""

import ctypes
import os
import platform
import struct
from typing import Final

__all__ = ["landlock_version", "restrict_writing"]

_CREATE_RULESET: Final = 444  # the same numbers on every architecture
_RESTRICT_SELF: Final = 446
_VERSION_FLAG: Final = 1
_EXECUTE: Final = 1 << 0
_WRITE_FILE: Final = 1 << 1
_REMOVE_AND_MAKE: Final = 0b1_1111_1111 << 4  # remove_dir … make_sym
_REFER: Final = 1 << 13  # since version 2
_TRUNCATE: Final = 1 << 14  # since version 3
_TCP: Final = 0b11  # bind and connect, since version 4
_PR_SET_NO_NEW_PRIVS: Final = 38


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    converted = [
        ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_void_p(argument)
        for argument in arguments
    ]
    return int(libc.syscall(ctypes.c_long(number), *converted))


def landlock_version() -> int:
    """Return the kernel's Landlock version; 0 where there is none."""
    if platform.system() != "Linux":
        return 0
    return max(_syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG), 0)


def restrict_writing() -> None:
    """Close the calling thread for good. Raises OSError where the kernel refuses."""
    version = landlock_version()
    file_rights = _EXECUTE | _WRITE_FILE | _REMOVE_AND_MAKE
    file_rights |= _REFER if version >= 2 else 0
    file_rights |= _TRUNCATE if version >= 3 else 0
    attributes = struct.pack("<QQ", file_rights, _TCP) if version >= 4 else struct.pack("<Q", file_rights)
    ruleset = _syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or _syscall(_RESTRICT_SELF, ruleset, 0) != 0:
            raise OSError(ctypes.get_errno(), f"landlock: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(ruleset)
