"""Lets other programs of the same user see what a node does: a socket while it runs, a snapshot when it does not.

RUN_DIR/control.sock   mode 0600; asked one line ("status"), it answers one line of JSON and closes
RUN_DIR/status.json    the same, as it was a few seconds ago, or when the node ended

Where the path of the socket would be longer than the system allows, it lies under XDG_RUNTIME_DIR, or in a folder
of the user's own in the system's folder for temporary files; its name is a function of the run folder.
"""

import asyncio
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from node.run_folder import RunFolderError, write_atomically
from swarm.errors import UserError

__all__ = ["Monitor", "NoStatus", "newest_status", "read_status", "socket_path"]

_MAX_SOCKET_PATH_BYTES: Final = 100  # 104 on macOS, 108 on Linux, each with its final zero
_SNAPSHOT_INTERVAL_S: Final = 10.0
_TIMEOUT_S: Final = 5.0
_MAX_REQUEST_BYTES: Final = 1024
_MAX_STATUS_BYTES: Final = 64 * 2**20
_SOCKET: Final = "control.sock"
_SNAPSHOT: Final = "status.json"


class NoStatus(UserError):
    """There is no node to be seen where one was looked for."""


def socket_path(run_dir: Path) -> Path:
    """Return where the socket of a run folder lies."""
    path = run_dir.resolve() / _SOCKET
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    name = hashlib.blake2b(os.fsencode(path), digest_size=12).hexdigest()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        path = Path(runtime) / "swarm-node" / f"{name}.sock"
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
            return path
    return Path(tempfile.gettempdir()) / f"swarm-node-{os.geteuid()}" / f"{name}.sock"


class Monitor:
    """Serves the socket and keeps the snapshot of one run folder, whose lock the process holds."""

    def __init__(self, run_dir: Path, make_status: Callable[[], dict[str, Any]]) -> None:
        self._path = socket_path(run_dir)
        self._snapshot = run_dir / _SNAPSHOT
        self._make_status = make_status
        self._server: asyncio.Server | None = None
        self._writer: asyncio.Task[None] | None = None
        self._ending = asyncio.Event()

    async def __aenter__(self) -> "Monitor":
        """Listen. Raises RunFolderError where that is impossible."""
        try:
            listening = _listen(self._path)
        except OSError as error:
            raise RunFolderError(f"cannot make the control socket {self._path}: {error.strerror}") from error
        self._server = await asyncio.start_unix_server(self._answer, sock=listening, limit=_MAX_REQUEST_BYTES)
        self._writer = asyncio.ensure_future(self._write_now_and_then())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last snapshot, of a node that does not run."""
        assert self._server is not None
        assert self._writer is not None
        self._server.close()
        self._path.unlink(missing_ok=True)
        self._ending.set()
        await asyncio.wait([self._writer])
        if error is None:
            self._writer.result()  # raises what the disk has said
        if self._is_begun:
            write_atomically(self._snapshot, json.dumps(self._make_status() | {"running": False}))

    @property
    def _is_begun(self) -> bool:
        """Whether the folder holds more than a lock: a node that could not start leaves nothing behind."""
        return (self._snapshot.parent / "config.toml").exists()

    async def _write_now_and_then(self) -> None:
        """Keep the snapshot of a node that may be killed, until the node ends, or the disk takes no more."""
        while not self._ending.is_set():
            if self._is_begun:
                await asyncio.to_thread(write_atomically, self._snapshot, json.dumps(self._make_status()))
            try:
                async with asyncio.timeout(_SNAPSHOT_INTERVAL_S):
                    await self._ending.wait()
            except TimeoutError:
                continue

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request. Whoever is slow, or leaves early, has no answer; it is nobody else's concern."""
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                asked = (await reader.readline()).strip()
                known = asked == b"status"
                answer = self._make_status() if known else {"error": "ask for: status"}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ConnectionError, ValueError):
            return  # ValueError: a line over the limit
        finally:
            writer.close()


def _listen(path: Path) -> socket.socket:
    """Return a listening socket that only its owner can reach. A dead process's is in nobody's use, and goes."""
    if path.name != _SOCKET:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.parent.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(1, f"{path.parent} is not a folder of this user's own with mode 0700")
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # for the moment between bind and chmod
    try:
        listening.bind(str(path))
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(before)
    path.chmod(0o600)
    listening.setblocking(False)
    return listening


def newest_status(runs: Path) -> Path:
    """Return the run folder in a folder of runs whose node was alive last."""
    found = [path for path in runs.glob("*") if (path / _SNAPSHOT).exists() or socket_path(path).exists()]
    if not found:
        raise NoStatus(f"no node has run in {runs}; name a run folder with --run-dir, or a socket with --socket")
    return max(found, key=_last_seen)


def _last_seen(run_dir: Path) -> float:
    paths = [path for path in (run_dir / _SNAPSHOT, socket_path(run_dir)) if path.exists()]
    return max((path.stat().st_mtime for path in paths), default=0.0)


def read_status(run_dir: Path | None, path: Path | None = None) -> dict[str, Any]:
    """Return the status of the node in a run folder or behind a socket, live or as it was last seen."""
    if path is None:
        assert run_dir is not None
        path = socket_path(run_dir)
    try:
        return _ask(path)
    except (ConnectionError, FileNotFoundError):
        if run_dir is None:
            raise NoStatus(f"no node listens at {path}; name its run folder with --run-dir") from None
    except (OSError, ValueError) as error:
        raise NoStatus(f"cannot read the status from {path}: {error}; is the node stuck?") from error
    try:
        status: dict[str, Any] = json.loads((run_dir / _SNAPSHOT).read_text())
    except FileNotFoundError:
        raise NoStatus(f"no node runs in {run_dir}, and none has left a status there; check --run-dir") from None
    except (OSError, ValueError) as error:
        raise NoStatus(f"cannot read {run_dir / _SNAPSHOT}: {error}") from error
    return status | {"running": False}


def _ask(path: Path) -> dict[str, Any]:
    deadline_s = time.monotonic() + _TIMEOUT_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(path))
        connection.sendall(b"status\n")
        data = bytearray()
        while part := connection.recv(65536):
            data += part
            if len(data) > _MAX_STATUS_BYTES or time.monotonic() > deadline_s:
                raise ValueError("an answer without end")
    status: dict[str, Any] = json.loads(data)
    return status
