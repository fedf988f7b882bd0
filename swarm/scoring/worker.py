"""The parent's side of one scoring process: start it, speak to it, know what it is at, kill it.

Which answers it gets, and what becomes of them when it dies, is `pool`'s.
"""

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Final

import msgpack

from swarm.errors import TaskError
from swarm.scoring.child import ChildConfig
from swarm.scoring.patience import Patience
from swarm.scoring.progress import IDLE, Progress

__all__ = ["CHILD_PROGRAM", "Job", "Worker"]

CHILD_PROGRAM: Final = "from swarm.scoring.child import main; main()"
_PREPARE_LIMIT_S: Final = 120.0  # for starting and for regenerating items, which is not an answer's fault
_READ_BYTES: Final = 65536
_KEPT_ENVIRONMENT: Final = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR")
_ENVIRONMENT: Final = {
    "PYTHONHASHSEED": "0",  # a scorer that iterates over a set gives every process the same score
    "PYTHONUTF8": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One distinct answer to score."""

    number: int
    source: int
    seed: int
    index: int
    answer: str


class Worker:
    """One scoring process."""

    def __init__(
        self,
        config: ChildConfig,
        *,
        folder: str,
        program: str,
        wall_limit_s: float,
        niceness: int = 0,
        is_nice_at_start: bool = True,
    ) -> None:
        """Start it. Without `is_nice_at_start` it gives way to others only once it is ready."""
        self._niceness = niceness
        self._progress = Progress.create()
        self._errors: IO[bytes] = tempfile.TemporaryFile()
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ} | _ENVIRONMENT
        bootstrap = f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}; {program}"
        self._process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-B", "-c", bootstrap],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=folder,
            env=environment,
            start_new_session=True,
            pass_fds=(self._progress.fd,),
        )
        self._patience = Patience(self._process.pid, wall_limit_s)
        if is_nice_at_start:
            self._give_way()
        self._unpacker = msgpack.Unpacker(unicode_errors="surrogatepass")
        self.is_ready = False
        self.jobs: dict[int, Job] = {}  # by number: sent and not reported, in the order of the process
        self._busy_since_s = time.monotonic()
        self._send([{**config, "progress_fd": self._progress.fd}])

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def fileno(self) -> int:
        """Where results arrive, for a selector."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    @property
    def is_idle(self) -> bool:
        """Whether it can take jobs: a process has one batch of jobs at a time, so that neither side can block."""
        return self.is_ready and not self.jobs

    @property
    def seconds_left(self) -> float:
        """Until the answer that it is at has had its time."""
        job, began_s = self._progress.read()
        if job == IDLE:
            return self._busy_since_s + _PREPARE_LIMIT_S - time.monotonic()
        return self._patience.seconds_left(began_s, time.monotonic())

    @property
    def current(self) -> Job | None:
        """The answer that it is at; None while it is idle, starts or regenerates items."""
        return self.jobs.get(self._progress.read()[0])

    def prepare(self, items: Sequence[Sequence[int]]) -> None:
        """Let it regenerate items while it is idle."""
        self._send(["prepare", items])

    def score(self, jobs: Sequence[Job]) -> None:
        """Give it jobs; it must be idle."""
        self.jobs = {job.number: job for job in jobs}
        self._busy_since_s = time.monotonic()
        self._send(["score", [[job.number, job.source, job.seed, job.index, job.answer] for job in jobs]])

    def receive(self) -> list[tuple[Job, float | None, str]] | None:
        """Return (job, reward or None, outcome) of what has been scored; None when the process has ended."""
        data = os.read(self.fileno(), _READ_BYTES)
        if not data:
            return None
        results: list[tuple[Job, float | None, str]] = []
        self._unpacker.feed(data)
        for kind, *rest in self._unpacker:
            if kind == "ready":
                self.is_ready = True
                self._give_way()
            elif kind == "failed":
                raise TaskError(rest[0])
            else:
                results.extend((self.jobs.pop(number), reward, outcome) for number, reward, outcome in rest[0])
        return results

    def _give_way(self) -> None:
        if self._niceness and self._process.poll() is None:
            os.setpriority(os.PRIO_PROCESS, self.pid, os.getpriority(os.PRIO_PROCESS, 0) + self._niceness)

    def has_news(self) -> bool:
        """Say, without waiting, whether `receive` has something to return."""
        return bool(select.select([self.fileno()], [], [], 0)[0])

    def end(self) -> int:
        """Kill it if it lives, wait for its end, and return its exit status (negative: a signal)."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        status = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # closing flushes, and nobody reads any more
        return status

    def last_words(self) -> str:
        """Return the end of what it wrote to standard error before it was ready."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(size - 4000, 0))
        return self._errors.read().decode("utf-8", "replace").strip()

    def forget(self) -> None:
        """Close what `current` and `last_words` read."""
        self._errors.close()
        self._progress.close()

    def _send(self, message: Sequence[object]) -> None:
        """Write one frame. A process that has died is noticed by `receive`."""
        assert self._process.stdin is not None
        data = memoryview(msgpack.packb(message, unicode_errors="surrogatepass"))
        try:
            while data:
                data = data[os.write(self._process.stdin.fileno(), data) :]
        except BrokenPipeError:
            return
