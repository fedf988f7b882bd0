"""Rewards for completions, from a pool of sandboxed processes.

    completion ──extract_answer──▶ answer ──process──▶ scorer's float ──partial credit──▶ reward in [0, 1]

One bad answer costs only itself: the process that it took down is replaced, and the answers that the process
had not come to are scored by another. What confines a process is `sandbox`'s, what runs in it `child`'s.
"""

import math
import selectors
import signal
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Final, Literal

from protocol.messages import TaskRef
from swarm.config import ScoringConfig, TasksConfig
from swarm.errors import PoolClosed, ScoringError, UnknownSource
from swarm.scoring.child import ChildConfig
from swarm.scoring.folder import WorkFolder
from swarm.scoring.patience import LOOKS
from swarm.scoring.sandbox import sandbox_layers
from swarm.scoring.worker import CHILD_PROGRAM, Job, Worker
from swarm.tasks import build_task_set, extract_answer
from swarm.types import RolloutGroup

__all__ = ["Outcome", "Score", "ScoringPool"]

Outcome = Literal[
    "scored", "no_answer", "too_long", "cpu_limit", "memory_limit", "wall_limit", "crashed", "scorer_error"
]

_MAX_BATCH_JOBS: Final = 256  # answers that a process holds at one time
_MAX_PREFETCH: Final = 512  # items of one prefetch: its frame fits a pipe, so that sending it cannot block
_MAX_FAILED_STARTS: Final = 3
_MAX_BLAMELESS_DEATHS: Final = 3  # in a row, between two answers; then the first of those that wait is blamed


@dataclass(frozen=True, slots=True)
class Score:
    """What one completion earned, and how that was found."""

    reward: float  # in [0, 1]
    outcome: Outcome


class ScoringPool:
    """Scores completions in sandboxed processes. A context manager; one call at a time, from any thread.

    `niceness` lets its processes give way to others: what somebody else waits for less must not slow the rest. The
    first ones start without it, since on a machine that is fully used they would not be ready for minutes; those that
    replace them, because of what an answer did, start with it.
    """

    def __init__(
        self, tasks: TasksConfig, scoring: ScoringConfig, *, niceness: int = 0, program: str = CHILD_PROGRAM
    ) -> None:
        self._tasks = tasks
        self._scoring = scoring
        self._niceness = niceness
        self._program = program
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._workers: list[Worker] = []
        self._folder: WorkFolder | None = None
        self._num_failed_starts = 0
        self._num_blameless_deaths = 0
        self.counts: Counter[Outcome] = Counter()
        self.num_replaced = 0  # processes that died or were killed, and were replaced
        sources = build_task_set(tasks, seed=0).sources
        self._source_number = {(source.name, source.digest): number for number, source in enumerate(sources)}
        self._config = ChildConfig(
            specs=[list(map(str, asdict(source.spec).values())) for source in sources],
            layers=list(sandbox_layers()),
            memory_limit_mb=scoring.memory_limit_mb,
            cpu_limit_s=scoring.cpu_limit_s,
            progress_fd=-1,
        )

    def __enter__(self) -> "ScoringPool":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the processes that live now."""
        return tuple(worker.pid for worker in self._workers)

    def start(self, *, wait: bool = True) -> None:
        """Start the processes and wait until they are confined. Raises ScoringError where that fails.

        Without `wait` they get ready while the caller does something else, and `score` waits for them.
        """
        with self._lock:
            self._closing.clear()
            if self._folder is None:
                self._folder = WorkFolder()
                self._workers = [self._new_worker(is_first=True) for _ in range(self._scoring.num_workers)]
            try:
                self._run(deque(), {}, until_ready=wait)
            except BaseException:
                self._end_all()
                raise

    def close(self) -> None:
        """End the processes. A call that scores in another thread raises PoolClosed soon."""
        self._closing.set()
        with self._lock:
            self._end_all()

    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> list[Score]:
        """Score completions, in their order. Raises UnknownSource for a reference to a source of nobody here."""
        with self._lock:
            scores: list[Score | None] = [None] * len(jobs)
            waiting: dict[tuple[TaskRef, str], list[int]] = {}
            for position, (ref, text) in enumerate(jobs):
                answer = extract_answer(text, self._tasks.answer)
                if answer is None:
                    scores[position] = Score(0.0, "no_answer")
                elif len(answer) > self._scoring.max_answer_chars:
                    scores[position] = Score(0.0, "too_long")
                else:
                    waiting.setdefault((ref, answer), []).append(position)
            todo = [
                Job(number, self._number_of(ref), ref.seed, ref.index, answer)
                for number, (ref, answer) in enumerate(waiting)
            ]
            done: dict[int, Score] = {}
            self._run(deque(todo), done)
            for number, positions in enumerate(waiting.values()):
                for position in positions:
                    scores[position] = done[number]
            found = [score for score in scores if score is not None]
            self.counts.update(score.outcome for score in found)
            return found

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Return the groups with their rewards."""
        scores = iter(self.score([(group.task.ref, text) for group in groups for text in group.texts]))
        return [group.with_rewards(tuple(next(scores).reward for _ in group.texts)) for group in groups]

    def prefetch(self, refs: Sequence[TaskRef]) -> None:
        """Let the processes regenerate items, so that scoring their answers later is quick. Returns at once."""
        with self._lock:
            items = [(self._number_of(ref), ref.seed, ref.index) for ref in dict.fromkeys(refs)]
            idle = [worker for worker in self._workers if worker.is_idle]
            share = max(1, min(_MAX_PREFETCH, math.ceil(len(items) / max(len(idle), 1))))
            for number, worker in enumerate(idle):
                if part := items[number * share : (number + 1) * share]:
                    worker.prepare(part)

    def _number_of(self, ref: TaskRef) -> int:
        number = self._source_number.get((ref.source, ref.digest))
        if number is None:
            raise UnknownSource(f"no source {ref.source!r} with digest {ref.digest}")
        return number

    def _new_worker(self, *, is_first: bool = False) -> Worker:
        if self._folder is None:
            raise ScoringError("the scoring pool is closed; start it first")
        return Worker(
            self._config,
            folder=str(self._folder.path),
            program=self._program,
            wall_limit_s=self._scoring.wall_limit_s,
            niceness=self._niceness,
            is_nice_at_start=not is_first,
        )

    def _run(self, todo: deque[Job], done: dict[int, Score], *, until_ready: bool = False) -> None:
        """Run the processes until every job is done, or until every process is ready."""
        if todo and not self._workers:
            raise ScoringError("the scoring pool is not running; start it first")
        share = max(1, min(_MAX_BATCH_JOBS, math.ceil(len(todo) / max(len(self._workers), 1))))
        while todo or any(worker.jobs for worker in self._workers) or (until_ready and not self._are_ready()):
            if self._closing.is_set():
                raise PoolClosed("the scoring pool has been closed")
            for worker in self._workers:
                if todo and worker.is_idle:
                    worker.score([todo.popleft() for _ in range(min(share, len(todo)))])
            self._wait(todo, done)

    def _are_ready(self) -> bool:
        return all(worker.is_ready for worker in self._workers)

    def _wait(self, todo: deque[Job], done: dict[int, Score]) -> None:
        """Wait for news of any process that is at work, take it in, and replace the dead and the stuck."""
        with selectors.DefaultSelector() as selector:
            busy = [worker for worker in self._workers if worker.jobs or not worker.is_ready]
            for worker in busy:
                selector.register(worker, selectors.EVENT_READ)
            soonest_s = min(worker.seconds_left for worker in busy)
            selector.select(min(max(0.0, soonest_s), self._scoring.wall_limit_s / LOOKS))
        for worker in busy:
            if worker.has_news():
                results = worker.receive()
                if results is None:
                    self._replace(worker, None, todo, done)
                else:
                    self._num_failed_starts = 0 if worker.is_ready else self._num_failed_starts
                    done.update((job.number, self._judge(reward, outcome)) for job, reward, outcome in results)
            elif worker.seconds_left <= 0:
                self._replace(worker, "wall_limit", todo, done)

    def _judge(self, reward: float | None, outcome: str) -> Score:
        """Turn what a scorer gave into a reward."""
        if reward is None:
            return Score(0.0, "memory_limit" if outcome == "memory_limit" else "scorer_error")
        if math.isnan(reward):
            return Score(0.0, "scored")
        if self._tasks.partial_credit == "none":
            return Score(1.0 if reward >= 1.0 else 0.0, "scored")
        return Score(min(max(reward, 0.0), 1.0), "scored")

    def _replace(self, worker: Worker, outcome: Outcome | None, todo: deque[Job], done: dict[int, Score]) -> None:
        """Bury a process: the answer that it was at, if any, has lost; the others wait for another process."""
        status = worker.end()
        if not worker.is_ready:
            self._count_failed_start(worker)
        culprit = worker.current
        if culprit is None and worker.jobs:  # killed from outside, or by an item that it regenerated
            self._num_blameless_deaths += 1
            if self._num_blameless_deaths >= _MAX_BLAMELESS_DEATHS:
                culprit = next(iter(worker.jobs.values()))
        worker.forget()
        if culprit is not None:
            self._num_blameless_deaths = 0
            del worker.jobs[culprit.number]
            done[culprit.number] = Score(0.0, outcome or ("cpu_limit" if status == -signal.SIGPROF else "crashed"))
        todo.extendleft(reversed(worker.jobs.values()))
        self.num_replaced += 1
        self._workers[self._workers.index(worker)] = self._new_worker()

    def _count_failed_start(self, worker: Worker) -> None:
        self._num_failed_starts += 1
        if self._num_failed_starts >= _MAX_FAILED_STARTS:
            words = worker.last_words()
            reason = words.rpartition("\n")[2] or "it did not get ready in time"
            raise ScoringError(f"scoring processes do not start: {reason}; its last words:\n{words}")

    def _end_all(self) -> None:
        for worker in self._workers:
            worker.end()
            worker.forget()
        self._workers = []
        if self._folder is not None:
            self._folder.close()
            self._folder = None
