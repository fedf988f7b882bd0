"""The folder of one run: what lies where, who may use it, and whether it holds a run already.

RUN_DIR/config.toml    the resolved configuration
        identity       the node's key pair, made by `swarm-node init` or by the first `join`
        swarm.msgpack  what the node remembers of its swarm: peers, reputation, what it has used
        listen.json    the ports that it was given, so that its address stays what it was
        control.sock   of a running node (`node.control`), and
        status.json    what it said last
        metrics.jsonl  one object a round
        journal/       what finished rounds learned from, since the oldest checkpoint
        checkpoints/   policy and optimizer
        summary.json   what the run came to
        reward.png     the same as a picture
        lock           held by the process that uses the folder
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from node.config import MAY_CHANGE_ON_RESUME, RunConfig, setting_values
from node.layers import shown
from swarm.errors import UserError

__all__ = ["RunFolder", "RunFolderError", "newest_run", "refuse_other_run", "write_atomically"]


class RunFolderError(UserError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """Paths of a run folder; as a context manager, the only user of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.identity = path / "identity"
        self.swarm = path / "swarm.msgpack"
        self.listen = path / "listen.json"
        self.metrics = path / "metrics.jsonl"
        self.journal = path / "journal"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.picture = path / "reward.png"
        self._lock_path = path / "lock"
        self._lock: int | None = None
        self._made: list[Path] = []  # folders that were not there before, the outermost first

    @property
    def occupied(self) -> bool:
        """Whether a run has begun here. Settings or an identity alone do not make a run."""
        return any(path.exists() for path in (self.metrics, self.journal, self.checkpoints, self.summary))

    def __enter__(self) -> "RunFolder":
        """Make the folder and take its lock."""
        try:
            self._made = [path for path in (*reversed(self.path.parents), self.path) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another with --run-dir"
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise RunFolderError(
                f"another swarm-node is using the run folder {self.path}; stop it, or choose another with --run-dir"
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back, which would also end with the process; folders in which nothing has begun go.

        A node joins before its model is loaded: where that fails, nobody needs the identity that was made for it.
        """
        if self._lock is not None:
            of_no_use = {path.name for path in (self._lock_path, self.identity, self.swarm, self.listen)}
            if self.path in self._made and of_no_use.issuperset(os.listdir(self.path)):
                for name in os.listdir(self.path):
                    (self.path / name).unlink()
                for path in reversed(self._made):
                    try:
                        path.rmdir()
                    except OSError:
                        break  # somebody else has put something there
            os.close(self._lock)
            self._lock = None

    def refuse_occupied(self) -> None:
        """Raise if a run has begun here."""
        if self.occupied:
            raise RunFolderError(
                f"{self.path} already holds a run; go on with it: --run-dir {self.path} --resume, "
                "or choose another folder with --run-dir"
            )

    def saved_config(self, resume: bool) -> Path | None:
        """Return the settings to go on with, or None where a run begins: nothing has happened here yet."""
        if not resume:
            return None
        if not self.path.is_dir():
            raise RunFolderError(f"there is no run folder {self.path}; check --run-dir, or leave --resume out")
        if self.occupied and not self.config.exists():
            raise RunFolderError(f"{self.config} is missing: restore it, or start another run with --run-dir")
        return self.config if self.config.exists() else None

    def refuse_missing(self) -> None:
        """Raise if there is no run here to read or to go on with."""
        if not self.config.exists():
            raise RunFolderError(f"{self.path} holds no run: there is no config.toml; check the path")


def refuse_other_run(path: Path, saved: RunConfig, wanted: RunConfig) -> None:
    """Raise, naming the first setting by which `wanted` is another run than the one that was saved."""
    before, now = setting_values(saved), setting_values(wanted)
    for name, value in now.items():
        may_change = any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE_ON_RESUME)
        if value != before[name] and not may_change:
            raise RunFolderError(
                f"{path} was run with {name} = {shown(before[name])}, not {shown(value)}; "
                "leave that setting out to go on with it, or start another run with --run-dir"
            )


def newest_run(folder: Path) -> RunFolder:
    """Return the run in a folder of runs that was written to last."""
    runs = [run for path in folder.glob("*") if (run := RunFolder(path)).occupied]
    if not runs:
        raise RunFolderError(f"there is no run in {folder} to go on with; name one with --run-dir")
    return max(runs, key=lambda run: max(p.stat().st_mtime for p in (run.metrics, run.config) if p.exists()))


def write_atomically(path: Path, data: str) -> None:
    """Replace a file as a whole, so that no reader and no crash sees half of it."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFolderError(f"cannot write {path}: {error.strerror}; free space or mend the folder") from error
