"""The filter's program, interpreted here: what each architecture is told, without a kernel."""

import errno
import os
import struct

import pytest

from swarm.scoring import seccomp

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
PID = 4321
OPENAT = {"x86_64": 257, "aarch64": 56}
CLONE = {"x86_64": 56, "aarch64": 220}
KILL_CALL = {"x86_64": 62, "aarch64": 129}
SOCKET = {"x86_64": 41, "aarch64": 198}
EXECVE = {"x86_64": 59, "aarch64": 221}
READ = {"x86_64": 0, "aarch64": 63}
MMAP = {"x86_64": 9, "aarch64": 222}


def verdict(machine, number, *arguments, audit_arch=None):
    arch = seccomp._ARCHS[machine]
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, audit_arch or arch.audit_arch, 0, *padded)
    instructions = list(struct.iter_unpack("<HBBI", seccomp._program(arch, PID)))
    position, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = instructions[position]
        position += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x06:
            return value
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_verdicts(machine):
    assert verdict(machine, SOCKET[machine]) == EPERM
    assert verdict(machine, EXECVE[machine]) == EPERM
    assert verdict(machine, READ[machine]) == verdict(machine, MMAP[machine]) == ALLOW
    assert verdict(machine, OPENAT[machine], 0, 0, os.O_RDONLY | os.O_CLOEXEC) == ALLOW
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC, os.O_APPEND):
        assert verdict(machine, OPENAT[machine], 0, 0, flags) == EPERM
    assert verdict(machine, CLONE[machine], 0x01200011) == EPERM  # what fork passes
    assert verdict(machine, CLONE[machine], 0x003D0F00) == ALLOW  # what a thread passes
    assert verdict(machine, 435) == verdict(machine, 437) == ENOSYS
    assert verdict(machine, KILL_CALL[machine], PID, 6) == ALLOW
    assert verdict(machine, KILL_CALL[machine], 1, 9) == EPERM
    assert verdict(machine, READ[machine], audit_arch=0x40000003) == KILL  # the 32-bit table has other numbers


def test_the_x32_table_is_closed():
    assert verdict("x86_64", 0x40000000 | SOCKET["x86_64"]) == EPERM
    assert verdict("x86_64", 2, 0, os.O_WRONLY) == EPERM
    assert verdict("x86_64", 2, 0, os.O_RDONLY) == ALLOW
