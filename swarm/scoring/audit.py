"""A Python audit hook: the layer that every platform has, and the only one that sees `eval`.

It refuses what Python code asks Python for: sockets, processes, files opened to write, changes of the file
system, loading of libraries; and, while an answer is being scored, the compilation of any text. It does not
hold against native code: that is what the kernel's layers are for.
"""

import os
import sys
from typing import Any, Final

__all__ = ["forbid", "scoring"]

_REFUSED_PREFIXES: Final = (
    "socket.",
    "subprocess.",
    "shutil.",
    "ftplib.",
    "smtplib.",
    "urllib.",
    "http.",
    "webbrowser.",
)
_REFUSED: Final = frozenset(
    """
    os.chflags os.chmod os.chown os.exec os.fork os.forkpty os.kill os.killpg os.link os.lockf os.mkdir os.mknod
    os.mkfifo os.posix_spawn os.putenv os.remove os.removexattr os.rename os.rmdir os.setxattr os.spawn
    os.startfile os.symlink os.system os.truncate os.unlink os.unsetenv os.utime pty.spawn tempfile.mkstemp
    tempfile.mkdtemp ctypes.dlopen ctypes.dlsym resource.setrlimit resource.prlimit fcntl.ioctl
    signal.pthread_kill syslog.openlog syslog.syslog sqlite3.connect pickle.find_class
    """.split()
)
_WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _State:
    """Whether an answer is being scored."""

    is_scoring = False


class scoring:
    """A context in which no text is compiled: answers are data."""

    def __enter__(self) -> None:
        _State.is_scoring = True

    def __exit__(self, *exception: object) -> None:
        _State.is_scoring = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _, mode, flags = arguments
        writes = (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or bool(
            (flags or 0) & _WRITE_FLAGS
        )
        if writes:
            raise PermissionError("a scorer may not write files")
    elif event == "compile":
        if _State.is_scoring and str(arguments[1]).startswith("<"):
            raise PermissionError("a scorer may not compile text")
    elif event in _REFUSED or event.startswith(_REFUSED_PREFIXES):
        raise PermissionError(f"a scorer may not use {event}")


def forbid() -> None:
    """Install the hook, for good."""
    sys.addaudithook(_hook)
