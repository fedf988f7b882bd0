"""The empty folder that scoring processes run in, and the end of those that a killed node has left behind.

Whoever uses a folder holds a lock on it, which ends with the process. So a folder whose lock can be had is
nobody's, whatever became of process ids meanwhile, in this container or another.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["WorkFolder"]

_PREFIX: Final = "swarm-scoring-"


class WorkFolder:
    """A new folder of this process's own. Making one removes those of dead processes of the same user."""

    def __init__(self) -> None:
        _remove_stale()
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            lock = _locked(self.path)
            if lock is not None and self.path.exists():
                self._lock = lock
                return
            if lock is not None:  # between its making and its lock another process took it for stale
                os.close(lock)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path)
        os.close(self._lock)


def _remove_stale() -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        lock = _locked(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)  # two nodes that start at one time may both be at it
            os.close(lock)


def _locked(path: Path) -> int | None:
    """Return a file descriptor that holds the folder's lock; None where somebody else has it or it is not ours."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(folder).st_uid == os.geteuid():
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder
    except BlockingIOError:
        pass
    os.close(folder)
    return None
