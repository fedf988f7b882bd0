"""The walls around a scoring process, in layers, so that a gap in one is closed by another.

    rlimits   no file may grow, no core, no new process (where the user is not root), memory bounded (Linux)
    landlock  no path may be written or executed (Linux 5.13 or newer)
    seccomp   the kernel refuses sockets, writing, processes (Linux on x86_64 and aarch64)
    audit     Python refuses the same, and compiling text while an answer is scored (everywhere)

Time is bounded elsewhere: a timer in the process counts processor time (`child`), the parent counts wall
time and kills (`pool`).
"""

import os
import platform
import resource
from collections.abc import Collection
from typing import Final

from swarm.scoring import audit, landlock, seccomp

__all__ = ["lock_down", "sandbox_layers"]

_MAX_OPEN_FILES: Final = 64


def sandbox_layers() -> tuple[str, ...]:
    """Return the layers that every scoring process on this platform must establish."""
    layers = ["rlimits"]
    if landlock.landlock_version() > 0:
        layers.append("landlock")
    if seccomp.is_supported():
        layers.append("seccomp")
    return (*layers, "audit")


def lock_down(memory_limit_mb: int, layers: Collection[str]) -> None:
    """Confine this process for good. Raises OSError or ValueError where a layer cannot be established."""
    if "rlimits" in layers:
        _set_limits(memory_limit_mb)
    if "landlock" in layers:
        landlock.restrict_writing()
    if "seccomp" in layers:
        seccomp.install_filter()
    if "audit" in layers:
        audit.forbid()


def _set_limits(memory_limit_mb: int) -> None:
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    if platform.system() == "Linux":  # others do not enforce a limit on address space
        with open("/proc/self/statm", encoding="ascii") as statm:
            used_bytes = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, used_bytes + memory_limit_mb * 2**20)


def _limit(which: int, value: int) -> None:
    """Set a limit, or leave it where it is already lower."""
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
