"""A seccomp filter for Linux: the kernel refuses what a scorer has no use for, whatever code asks for it.

Refused with EPERM: sockets, opening files to write, every change of the file system, new processes and
programs, signals to and memory of other processes, limits, namespaces, mounts, modules and keys. Reading
files, memory and threads stay. Other layers are `sandbox`'s.
"""

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["install_filter", "is_supported"]

_EPERM: Final = 0x00050000 | errno.EPERM  # SECCOMP_RET_ERRNO
_ENOSYS: Final = 0x00050000 | errno.ENOSYS
_ALLOW: Final = 0x7FFF0000
_KILL: Final = 0x80000000
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CLONE_THREAD: Final = 0x00010000
_X32_BIT: Final = 0x40000000
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1


@dataclass(frozen=True, slots=True)
class _Arch:
    """Numbers of one architecture."""

    audit_arch: int
    seccomp: int
    open: int | None
    openat: int
    clone: int
    kill: int
    tgkill: int
    denied: tuple[int, ...]


# The same on both: pidfd_*, io_uring_*, the mount API, process_madvise, mount_setattr, fchmodat2.
_COMMON_DENIED: Final = (424, 425, 426, 427, 428, 429, 430, 431, 432, 433, 434, 438, 440, 442, 452)

_ARCHS: Final = {
    "x86_64": _Arch(
        audit_arch=0xC000003E,
        seccomp=317,
        open=2,
        openat=257,
        clone=56,
        kill=62,
        tgkill=234,
        denied=(
            *(41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 53, 54, 288, 299, 307),  # socket … recvmmsg, sendmmsg
            *(57, 58, 59, 322, 101, 310, 311, 312, 129, 200, 297),  # fork, vfork, exec, ptrace, process_vm, signals
            *(76, 77, 82, 83, 84, 85, 86, 87, 88, 90, 91, 92, 93, 94, 132, 133, 235, 258, 259, 260, 261),
            *(263, 264, 265, 266, 268, 280, 285, 316),  # truncate, rename, mkdir, link, chmod, chown, utime, *at
            *(188, 189, 190, 197, 198, 199, 303, 304, 319),  # extended attributes, file handles, memfd
            *(29, 30, 31, 64, 65, 66, 68, 69, 70, 71, 240, 241, 242),  # System V and POSIX shared objects
            *(105, 106, 109, 112, 113, 114, 116, 117, 119, 122, 123, 126, 135, 141, 144, 160, 203, 302),  # ids, limits
            *(103, 154, 155, 159, 161, 163, 164, 165, 166, 167, 168, 169, 170, 171, 172, 173, 175, 176, 227),
            *(246, 248, 249, 250, 272, 298, 300, 305, 308, 313, 320, 321, 323),  # mounts, modules, keys, bpf
        ),
    ),
    "aarch64": _Arch(
        audit_arch=0xC00000B7,
        seccomp=277,
        open=None,
        openat=56,
        clone=220,
        kill=129,
        tgkill=131,
        denied=(
            *(198, 199, 200, 201, 202, 203, 206, 207, 208, 210, 211, 212, 242, 243, 269),
            *(221, 281, 117, 270, 271, 272, 130, 138, 240),
            *(33, 34, 35, 36, 37, 38, 45, 46, 47, 52, 53, 54, 55, 88, 276),
            *(5, 6, 7, 14, 15, 16, 264, 265, 279),
            *(180, 181, 182, 186, 187, 188, 189, 190, 191, 192, 193, 194, 195, 196),
            *(91, 92, 119, 122, 140, 143, 144, 145, 146, 147, 149, 151, 152, 154, 157, 159, 164, 261),
            *(39, 40, 41, 51, 89, 104, 105, 106, 112, 116, 142, 161, 162, 170, 171, 224, 225),
            *(97, 217, 218, 219, 241, 262, 266, 268, 273, 280, 282, 294),
        ),
    ),
}
_CLONE3: Final = 435  # flags are behind a pointer, which a filter cannot read: libc falls back to clone
_OPENAT2: Final = 437


def is_supported() -> bool:
    """Say whether this is a platform that the filter is written for."""
    return platform.system() == "Linux" and platform.machine() in _ARCHS and struct.calcsize("P") == 8


def _statement(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06
_NUMBER: Final = 0  # offsets in struct seccomp_data
_AUDIT_ARCH: Final = 4
_ARGS: Final = 16


def _when(number: int, *body: bytes) -> bytes:
    """Run `body`, which returns, for one system call. The number is in the accumulator before and after."""
    return _statement(_EQUAL, number, 0, len(body)) + b"".join(body)


def _program(arch: _Arch, own_pid: int) -> bytes:
    def refuse(number: int, value: int = _EPERM) -> bytes:
        return _when(number, _statement(_RETURN, value))

    def unless_writing(number: int, argument: int) -> bytes:
        test = _statement(_ANY_BIT, _WRITE_FLAGS, 0, 1)
        return _when(number, _load_argument(argument), test, _statement(_RETURN, _EPERM), _statement(_RETURN, _ALLOW))

    def own_process_only(number: int) -> bytes:
        test = _statement(_EQUAL, own_pid, 0, 1)
        return _when(number, _load_argument(0), test, _statement(_RETURN, _ALLOW), _statement(_RETURN, _EPERM))

    threads_only = _when(
        arch.clone,
        _load_argument(0),
        _statement(_ANY_BIT, _CLONE_THREAD, 0, 1),
        _statement(_RETURN, _ALLOW),
        _statement(_RETURN, _EPERM),
    )
    parts = [
        _statement(_LOAD, _AUDIT_ARCH),
        _statement(_EQUAL, arch.audit_arch, 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD, _NUMBER),
        _statement(_AT_LEAST, _X32_BIT, 0, 1),
        _statement(_RETURN, _EPERM),
        *(refuse(number) for number in (*arch.denied, *_COMMON_DENIED)),
        refuse(_CLONE3, _ENOSYS),
        refuse(_OPENAT2, _ENOSYS),
        threads_only,
        unless_writing(arch.openat, 2),
        unless_writing(arch.open, 1) if arch.open is not None else b"",
        own_process_only(arch.kill),
        own_process_only(arch.tgkill),
        _statement(_RETURN, _ALLOW),
    ]
    return b"".join(parts)


def _load_argument(position: int) -> bytes:
    return _statement(_LOAD, _ARGS + 8 * position)  # the lower half, little endian


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install_filter() -> None:
    """Close the process for good, all its threads included. Raises OSError where the kernel refuses."""
    arch = _ARCHS[platform.machine()]
    code = _program(arch, os.getpid())
    program = _FilterProgram(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(
        ctypes.c_long(arch.seccomp),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        ctypes.byref(program),
    )
    if result != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")
