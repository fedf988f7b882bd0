"""Child processes of this program that say what they do in lines of JSON.

Each is in a session of its own: Ctrl-C reaches this process alone, which ends the others. Should this process be
killed, the kernel asks the others to stop (Linux), or they find their pipe broken at the next line.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGTERM
from typing import Any, Final

from node.control import NoStatus, read_status

__all__ = ["JsonProcess", "NodeProcess", "child_command", "end_all"]

_END_WITHIN_S: Final = 15.0
_PROGRAM: Final = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
from {module} import main
main()
"""


def child_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs the `main` of a module of this program, which is stopped if this process dies."""
    return [sys.executable, "-P", "-c", _PROGRAM.format(module=module), *arguments]


class JsonProcess:
    """The `main` of a module of this program, whose lines of JSON are read by a thread until it ends."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> None:
        """What it writes for people goes to `log`; `stdin` is given to it at once."""
        self.name, self.log = name, log
        self.rows: list[dict[str, Any]] = []
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                child_command(module, *arguments),
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if stdin is not None:
            self._feed(stdin)

    @property
    def status_code(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """Ask it to stop."""
        if self._process.poll() is None:
            self._process.send_signal(SIGTERM)

    def wait(self, deadline_s: float) -> None:
        """Wait for its end until this monotonic time; kill it where that takes longer."""
        try:
            self._process.wait(max(0.1, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def last_words(self) -> str:
        """The last line that it wrote for people."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word"

    def _feed(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.close()
        except BrokenPipeError:
            return  # it has ended, which its exit status says

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.rows.append(json.loads(line))


class NodeProcess(JsonProcess):
    """One `swarm-node` with a run folder of its own."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self.run_dir = folder / name
        self.status: dict[str, Any] | None = None
        given = [*arguments, "--run-dir", str(self.run_dir), "--json"]
        super().__init__(name, "node.cli", given, folder / f"{name}.log")

    @property
    def address(self) -> str | None:
        """Where a bootstrap can be joined; None before it has said so."""
        return str(self.rows[0]["swarm"]["addresses"][0]) if self.rows else None

    def ask(self) -> None:
        """Fetch the status over the control socket, if it is there by now."""
        try:
            status = read_status(self.run_dir)
        except NoStatus:
            return
        if status["running"] or self.status is None:
            self.status = status


def end_all(processes: Sequence[JsonProcess], within_s: float = _END_WITHIN_S) -> None:
    """Stop every process and wait for its end; what takes longer is killed."""
    for process in processes:
        process.end()
    deadline_s = time.monotonic() + within_s
    for process in processes:
        process.wait(deadline_s)
