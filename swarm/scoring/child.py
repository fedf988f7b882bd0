"""Inside a scoring process: build the sources, close the sandbox, score answers until the pipe ends.

Speaks MessagePack over pipes. Receives lists, in order:

    [config]                                                     once; see `ChildConfig`
    ["prepare", [[source, seed, index], …]]                      make items ready; no reply
    ["score", [[job, source, seed, index, answer], …]]           answered by ["results", …], in one or more parts

and sends ["ready"] once, or ["failed", message] where the sources cannot be built. A result is [job, reward,
"scored"] or [job, None, outcome]. Results go out together, at most FLUSH_S late; which answer the process is
at stands in `progress`, which the parent reads when the process has died or takes too long.

Starts in a moment because it imports little: never torch, never pydantic.
"""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypedDict

import msgpack

from swarm.errors import TaskError, TaskRefError
from swarm.scoring import audit
from swarm.scoring.progress import IDLE, Progress
from swarm.scoring.sandbox import lock_down
from swarm.tasks.base import SourceSpec, TaskSource
from swarm.tasks.mixture import build_source

__all__ = ["ChildConfig", "main", "serve"]

FLUSH_S: Final = 0.005
_READ_BYTES: Final = 65536


class ChildConfig(TypedDict):
    """What the parent sends first."""

    specs: list[list[str]]  # fields of SourceSpec
    layers: list[str]
    memory_limit_mb: int
    cpu_limit_s: float
    progress_fd: int  # inherited; see `Progress`


def main() -> None:
    """Run a production scoring process."""
    serve(build_source)


def serve(build: Callable[[SourceSpec], TaskSource]) -> None:
    """Serve the parent until the pipe ends. `build` makes the sources."""
    requests_fd, results_fd = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # what a library prints must not mix with the results
    frames = _frames(requests_fd)
    config: ChildConfig = next(frames)[0]
    try:
        sources = [build(SourceSpec(*fields)) for fields in config["specs"]]
    except TaskError as error:
        _send(results_fd, ["failed", str(error)])
        return
    _prepare(sources, [(which, 0, 0) for which in range(len(sources))])
    gc.collect()
    gc.freeze()
    _silence()
    progress = Progress.attach(config["progress_fd"])
    lock_down(config["memory_limit_mb"], config["layers"])
    _send(results_fd, ["ready"])
    for kind, jobs in frames:
        if kind == "prepare":
            _prepare(sources, jobs)
        else:
            _prepare(sources, [job[1:4] for job in jobs])
            _score_all(sources, jobs, config["cpu_limit_s"], progress, results_fd)


def _score_all(
    sources: Sequence[TaskSource], jobs: Sequence[Any], cpu_limit_s: float, progress: Progress, results_fd: int
) -> None:
    results: list[list[Any]] = []
    flushed_s = time.monotonic()
    for job, which, seed, index, answer in jobs:
        now_s = time.monotonic()
        if results and now_s - flushed_s > FLUSH_S:
            _send(results_fd, ["results", results])
            results, flushed_s = [], now_s
        progress.write(job, now_s)
        results.append([job, *_score(sources[which], seed, index, answer, cpu_limit_s)])
    progress.write(IDLE, 0.0)
    _send(results_fd, ["results", results])


def _silence() -> None:
    """Send what libraries print to nowhere: the file that held it may not grow from here on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)


def _frames(fd: int) -> Iterator[Any]:
    unpacker = msgpack.Unpacker(unicode_errors="surrogatepass")
    while data := os.read(fd, _READ_BYTES):
        unpacker.feed(data)
        yield from unpacker


def _send(fd: int, message: Sequence[Any]) -> None:
    data = memoryview(msgpack.packb(message, unicode_errors="surrogatepass"))
    while data:
        data = data[os.write(fd, data) :]


def _prepare(sources: Sequence[TaskSource], items: Sequence[Sequence[int]]) -> None:
    """Regenerate items ahead of scoring, outside the limits of any answer."""
    for which, seed, index in items:
        try:
            sources[which].prepare(seed, index)
        except TaskRefError:
            continue  # scoring meets the same error and counts it


def _score(source: TaskSource, seed: int, index: int, answer: str, cpu_limit_s: float) -> tuple[float | None, str]:
    """Score one answer. This is the boundary at which whatever a scorer raises becomes an outcome.

    The timer's signal keeps its default action, so that the kernel ends the process even inside native code.
    """
    signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
    try:
        with audit.scoring():
            return float(source.score(seed, index, answer)), "scored"
    except MemoryError:
        return None, "memory_limit"
    except BaseException:
        return None, "scorer_error"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
