"""What nodes in one process share, since it does not change: initial weights, task sources, processes, memory.

    policy    the initial weights are loaded once, each node trains a copy; the tokenizer is one
    tasks     sources, regenerated items and held-out questions are the same; which are asked is each node's own
    scorer    one pool of processes; a reward is a function of question and text, so none is computed twice
    engine    one cache and one copy of packed weights, which are those of the node whose turn it is; only with
              partial rollouts, which stay in the engine from round to round, each node has its own

Nothing here is safe between threads: the nodes of a simulation run in one.
"""

import copy
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, TypeVar

import torch

from node.config import RunConfig
from node.interrupt import InterruptibleEngine
from node.parts import Parts, make_engine, make_rollouts, make_trainer
from protocol.messages import TaskRef
from swarm.engine.base import Engine, EngineStats, Request
from swarm.policy import Policy, load_policy
from swarm.scoring import Outcome, Score, ScoringPool
from swarm.tasks import TaskSet, build_task_set
from swarm.types import Completion, RolloutGroup

__all__ = ["EngineShare", "ScorerShare", "SharedParts"]

_MAX_REMEMBERED: Final = 100_000  # rewards, and encoded texts; more than all nodes ask while a group is fresh
# Under a limit of time or memory an answer may fare differently the next time.
_LASTING: Final[frozenset[Outcome]] = frozenset({"scored", "no_answer", "too_long"})
T = TypeVar("T")


class EncodingMemory:
    """A policy's tokenizer that encodes no text twice: a group is re-encoded by every node that takes it."""

    def __init__(self, policy: Policy) -> None:
        self.encode_prompt = lru_cache(_MAX_REMEMBERED)(policy.encode_prompt)
        self._encode = lru_cache(_MAX_REMEMBERED)(policy.encode_completion)

    def encode_completion(self, text: str, *, finished: bool) -> tuple[int, ...] | None:
        """Return the tokens of an answer."""
        return self._encode(text, finished=finished)


class ScorerShare:
    """One node's use of a pool of scoring processes, with its own counts."""

    def __init__(self, pool: ScoringPool, known: "OrderedDict[tuple[TaskRef, str], Score]") -> None:
        self._pool, self._known = pool, known
        self.counts: Counter[Outcome] = Counter()

    def start(self, *, wait: bool = True) -> None:
        """Nothing: the pool runs."""

    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> list[Score]:
        """Score completions, in their order: those that nobody has asked for yet."""
        fresh = list(dict.fromkeys(job for job in jobs if job not in self._known))
        found = dict(zip(fresh, self._pool.score(fresh), strict=True)) if fresh else {}
        scores = [found[job] if job in found else self._known[job] for job in jobs]
        self._known.update((job, score) for job, score in found.items() if score.outcome in _LASTING)
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
        self.counts.update(score.outcome for score in scores)
        return scores

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Return the groups with their rewards."""
        scores = iter(self.score([(group.task.ref, text) for group in groups for text in group.texts]))
        return [group.with_rewards(tuple(next(scores).reward for _ in group.texts)) for group in groups]

    def prefetch(self, refs: Sequence[TaskRef]) -> None:
        """Let the processes regenerate items."""
        self._pool.prefetch(refs)

    def close(self) -> None:
        """Nothing: others go on."""


class SharedEngine:
    """An engine, and the share whose weights it has."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.owner: EngineShare | None = None


class EngineShare(Engine):
    """One node's turn at an engine that several use one after the other: it takes the node's weights first."""

    def __init__(self, shared: SharedEngine, state: Mapping[str, torch.Tensor]) -> None:
        """`state` are live weights: they are taken when they are needed, and may not change before that."""
        self._shared, self._state, self._version = shared, state, 0
        self.max_seq_len = shared.engine.max_seq_len

    @property
    def verifies_drafts(self) -> bool:  # type: ignore[override]
        """Whether the engine does."""
        return self._shared.engine.verifies_drafts

    @property
    def step_cost_tokens(self) -> float:  # type: ignore[override]
        """That of the engine."""
        return self._shared.engine.step_cost_tokens

    @property
    def prefill_cost_tokens(self) -> float:  # type: ignore[override]
        """That of the engine."""
        return self._shared.engine.prefill_cost_tokens

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """That of the engine."""
        return self._shared.engine.num_slots

    @property
    def stats(self) -> EngineStats:  # type: ignore[override]
        """Counters of the engine, all shares together."""
        return self._shared.engine.stats

    @property
    def policy_version(self) -> int:
        """The version of the weights that the next step uses."""
        return self._version

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._shared.engine.num_unfinished if self._shared.owner is self else 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests under this node's weights. Nobody else's may be under way."""
        if self._shared.owner is not self:
            if self._shared.engine.num_unfinished:
                raise RuntimeError("the engine is in the middle of another node's requests")
            self._shared.engine.load_policy(self._state, self._version)
            self._shared.owner = self
        self._shared.engine.submit(requests)

    def step(self) -> list[Completion]:
        """Decode one step."""
        return self._shared.engine.step()

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        """Stop requests and return what they have."""
        return self._shared.engine.abort(request_ids) if self._shared.owner is self else []

    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take new weights, when they are needed."""
        self._state, self._version = state, version
        if self._shared.owner is self:
            if self._shared.engine.num_unfinished:
                self._shared.engine.load_policy(state, version)
            else:
                self._shared.owner = None

    def release_memory(self) -> None:
        """Let the engine give back memory: whoever is next loads a policy first."""
        if self._shared.owner in (self, None):
            self._shared.engine.release_memory()

    def close(self) -> None:
        """Nothing: others go on."""


@dataclass(frozen=True, slots=True)
class _Original:
    """A model as it was loaded, and the tokenizer that all its nodes use."""

    policy: Policy
    encodings: EncodingMemory


class SharedParts:
    """Makes the parts of the nodes of one process. A context manager, which ends the scoring processes."""

    def __init__(self) -> None:
        self._originals: dict[str, _Original] = {}
        self._tasks: dict[str, TaskSet] = {}
        self._pools: dict[str, tuple[ScoringPool, OrderedDict[tuple[TaskRef, str], Score]]] = {}
        self._engines: dict[str, SharedEngine] = {}

    def __enter__(self) -> "SharedParts":
        return self

    def __exit__(self, *_: object) -> None:
        for pool, _known in self._pools.values():
            pool.close()
        for shared in self._engines.values():
            shared.engine.close()

    def build(self, config: RunConfig, stopping: threading.Event) -> Parts:
        """Make the parts of a node, as `node.parts.build_parts` does for a process of its own."""
        torch.manual_seed(config.seed)  # what has no stream of its own: the first values of LoRA adapters
        original = self._original(config).policy
        policy = replace(original, model=copy.deepcopy(original.model))
        trainer = make_trainer(config, policy)
        tasks = self.tasks(config)
        engine: Engine
        if config.rollout.is_partial:  # requests are in flight from one round to the next
            engine = make_engine(config, original, tasks)
        else:
            key = _key(config.model, config.tasks, config.engine, config.rollout.max_new_tokens)
            shared = _once(self._engines, key, lambda: SharedEngine(make_engine(config, original, tasks)))
            engine = EngineShare(shared, trainer.policy_state())
        interruptible = InterruptibleEngine(engine, stopping, engine.max_seq_len)
        rollouts = make_rollouts(config, interruptible, policy, tasks)
        return Parts(policy, tasks, interruptible, rollouts, self.scorer(config), trainer)

    def encodings(self, config: RunConfig) -> EncodingMemory:
        """Return the tokenizer of a node's model, for what others wrote."""
        return self._original(config).encodings

    def tasks(self, config: RunConfig) -> TaskSet:
        """Return a node's tasks."""
        return _once(self._tasks, _key(config.tasks), lambda: build_task_set(config.tasks, 0)).with_seed(config.seed)

    def scorer(self, config: RunConfig) -> ScorerShare:
        """Return a node's use of the processes that score its tasks."""

        def start() -> tuple[ScoringPool, OrderedDict[tuple[TaskRef, str], Score]]:
            pool = ScoringPool(config.tasks, config.scoring)
            pool.start()
            return pool, OrderedDict()

        return ScorerShare(*_once(self._pools, _key(config.tasks, config.scoring), start))

    def _original(self, config: RunConfig) -> _Original:
        def load() -> _Original:
            policy = load_policy(config.model)
            return _Original(policy, EncodingMemory(policy))

        return _once(self._originals, _key(config.model), load)


def _key(*parts: object) -> str:
    return repr(parts)


def _once(made: dict[str, T], key: str, make: Callable[[], T]) -> T:
    if key not in made:
        made[key] = make()
    return made[key]
