"""Which item is asked when: a weighted mixture of sources, split into train and held-out questions.

The mixture keeps no cursor. What a round asks is a function of (config, seed, round, position), and what is
held out is a function of the question's text and of the held-out fraction alone, so that it is the same on
every node that has the same config, whatever its seed.
"""

import bisect
import copy
import functools
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from protocol.messages import TaskRef
from swarm.errors import InvalidTaskRef, TaskError, UnknownSource
from swarm.tasks.base import SourceSpec, TaskSource, heldout_position, stable_hash
from swarm.tasks.gym import ReasoningGymSource
from swarm.tasks.jsonl import JsonlSource
from swarm.types import Task

if TYPE_CHECKING:  # a scoring process imports this package and has no need of pydantic
    from swarm.config import TasksConfig

__all__ = ["TaskSet", "build_source", "build_task_set"]

_NUM_INDICES: Final = 2**31
_HELDOUT_SEED: Final = stable_hash("held-out stream")
_MAX_TRAIN_TRIES: Final = 10_000  # items looked at before "everything is held out" is believed
_HELDOUT_PATIENCE: Final = 16  # times 1 / fraction: items without a new held-out question that end the search
_MAX_CACHED_ORDERS: Final = 8


def build_source(spec: SourceSpec) -> TaskSource:
    """Build a source again, in this or another process. Raises TaskError if it is no longer the same."""
    source: TaskSource
    if spec.kind == "jsonl":
        source = JsonlSource(Path(spec.target))
    else:
        source = ReasoningGymSource(spec.target, json.loads(spec.config_json))
    if source.digest != spec.digest:
        raise TaskError(f"task source {source.name!r} has changed since the run began; restart the node")
    return source


class TaskSet:
    """A weighted mixture of task sources."""

    def __init__(
        self, sources: Sequence[TaskSource], weights: Sequence[float], *, heldout_fraction: float, seed: int
    ) -> None:
        if not sources:
            raise TaskError("there are no tasks; name a reasoning-gym task or a .jsonl file in tasks.sources")
        self._by_key = {(source.name, source.digest): source for source in sources}
        if len(self._by_key) != len(sources):
            raise TaskError("a task source is listed twice; list it once and add up the weights")
        self.sources: tuple[TaskSource, ...] = tuple(sources)
        self._cumulative = list(itertools.accumulate(weights))
        self._heldout_fraction = heldout_fraction
        self._heldout_lists: dict[int, list[Task]] = {}
        self._use_seed(seed)

    def with_seed(self, seed: int) -> "TaskSet":
        """Return the same mixture, asked in the order of another seed; both share what no seed changes."""
        other = copy.copy(self)
        other._use_seed(seed)
        return other

    def _use_seed(self, seed: int) -> None:
        self._seed = seed
        self._train_seed = stable_hash("train stream", seed)
        self._train_order = functools.lru_cache(maxsize=_MAX_CACHED_ORDERS)(self._make_train_order)

    def train_batch(self, round_index: int, num_tasks: int, *, stride: int | None = None) -> list[Task]:
        """Return what a round asks: a function of config, seed and round. No question of it is held out.

        `stride` is the most that any round of the run asks, where rounds ask differently many: a finite source
        has as many items set aside for each round, so that no two rounds of one pass over it ask the same.
        """
        stride = num_tasks if stride is None else stride
        if num_tasks > stride:
            raise ValueError(f"{num_tasks} questions are more than the {stride} that a round asks at most")
        return [self._train_task(round_index, position, stride) for position in range(num_tasks)]

    def heldout(self, num_tasks: int) -> list[Task]:
        """Return up to `num_tasks` distinct held-out questions, the same for every seed.

        The list is shorter where the sources have fewer. Raises TaskError where they have none at all.
        """
        if num_tasks not in self._heldout_lists:
            self._heldout_lists[num_tasks] = self._find_heldout(num_tasks)
        return list(self._heldout_lists[num_tasks])

    def is_heldout(self, question: str) -> bool:
        """Say whether a question, from whichever source or peer, must not be trained on."""
        return heldout_position(question) < self._heldout_fraction

    def resolve(self, ref: TaskRef) -> Task:
        """Regenerate a task. Raises UnknownSource or InvalidTaskRef; both are data, not failures."""
        source = self._by_key.get((ref.source, ref.digest))
        if source is None:
            raise UnknownSource(f"no source {ref.source!r} with digest {ref.digest}")
        if not 0 <= ref.seed < 2**64:
            raise InvalidTaskRef(f"seed {ref.seed} is not an unsigned 64-bit number")
        return source.task(ref.seed, ref.index)

    def _pick_source(self, *purpose: str | int) -> int:
        share = stable_hash("source", *purpose) / 2**64 * self._cumulative[-1]
        return min(bisect.bisect_right(self._cumulative, share), len(self.sources) - 1)

    def _train_task(self, round_index: int, position: int, stride: int) -> Task:
        which = self._pick_source(self._seed, round_index, position)
        source = self.sources[which]
        if source.num_items is not None:
            order = self._train_order(which, 0)
            draw = round_index * stride + position
            epoch, place = divmod(draw, len(order))
            return source.task(0, self._train_order(which, epoch)[place])
        for attempt in range(_MAX_TRAIN_TRIES):
            index = stable_hash("item", self._seed, round_index, position, attempt) % _NUM_INDICES
            task = _task_or_none(source, self._train_seed, index)
            if task is not None and not self.is_heldout(task.question):
                return task
        raise TaskError(
            f"every question of {source.name!r} is held out; lower tasks.heldout_fraction or widen its config"
        )

    def _make_train_order(self, which: int, epoch: int) -> list[int]:
        """Return the trainable items of a finite source in the order of one pass over them."""
        source = self.sources[which]
        order = [index for index in range(source.num_items or 0) if not self.is_heldout(source.question(0, index))]
        if not order:
            raise TaskError(f"every question of {source.name!r} is held out; lower tasks.heldout_fraction or add lines")
        random.Random(stable_hash("order", self._seed, which, epoch)).shuffle(order)
        return order

    def _find_heldout(self, num_tasks: int) -> list[Task]:
        quotas = [0] * len(self.sources)
        for position in range(num_tasks):
            quotas[self._pick_source("held-out", position)] += 1
        seen: set[str] = set()
        found = [
            list(self._heldout_of(source, quota, seen)) for source, quota in zip(self.sources, quotas, strict=True)
        ]
        mixed = [task for row in itertools.zip_longest(*found) for task in row if task is not None]
        if not mixed and num_tasks:
            names = ", ".join(source.name for source in self.sources)
            raise TaskError(f"{names}: no question is held out; raise tasks.heldout_fraction or add questions")
        return mixed

    def _heldout_of(self, source: TaskSource, quota: int, seen: set[str]) -> Iterator[Task]:
        """Yield distinct held-out questions of one source until there are enough, or no new ones turn up."""
        patience = int(_HELDOUT_PATIENCE / self._heldout_fraction) + 1
        num_items = _NUM_INDICES if source.num_items is None else source.num_items
        seed = _HELDOUT_SEED if source.num_items is None else 0
        num_found, last_new = 0, 0
        for index in range(num_items):
            if num_found >= quota or (source.num_items is None and index - last_new > patience):
                return
            task = _task_or_none(source, seed, index)
            if task is not None and self.is_heldout(task.question) and task.question not in seen:
                seen.add(task.question)
                num_found, last_new = num_found + 1, index
                yield task


def _task_or_none(source: TaskSource, seed: int, index: int) -> Task | None:
    """Return an item, or None for one of the few that some generators fail to make."""
    try:
        return source.task(seed, index)
    except InvalidTaskRef:
        return None


def build_task_set(config: "TasksConfig", seed: int) -> TaskSet:
    """Build the mixture that a config names. Raises TaskError for a name, setting or file that cannot be used."""
    sources: list[TaskSource] = []
    for entry in config.sources:
        if entry.name.endswith(".jsonl"):
            if entry.config:
                raise TaskError(f"task file {entry.name!r} takes no config; remove it")
            sources.append(JsonlSource(Path(entry.name)))
        else:
            sources.append(ReasoningGymSource(entry.name, entry.config))
    weights = [entry.weight for entry in config.sources]
    return TaskSet(sources, weights, heldout_fraction=config.heldout_fraction, seed=seed)
