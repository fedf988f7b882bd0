"""Makes the parts of a node that learn, from its settings.

Everything here imports torch, so that it is imported late and in the thread that does the torch work.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from node.config import RunConfig
from node.interrupt import InterruptibleEngine
from node.torchrun import launch
from protocol.messages import TaskRef
from swarm.drafting.drafting import Drafting, make_drafting
from swarm.engine import choice
from swarm.engine.base import Engine
from swarm.policy import Policy, load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.scoring import Outcome, Score, ScoringPool
from swarm.tasks import TaskSet, build_task_set
from swarm.trainer import Trainer
from swarm.types import RolloutGroup, Task

if TYPE_CHECKING:
    from node.ranks import Ranks

__all__ = ["Parts", "Scorer", "build_parts", "make_engine", "make_rollouts", "make_trainer"]

_NUM_LOOKED_AT = 64
_ROOM = 1.5


class Scorer(Protocol):
    """What a node asks of whatever scores its completions: a `ScoringPool` of its own, or one that it shares."""

    counts: Counter[Outcome]

    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> list[Score]:
        """Score completions, in their order."""

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Return the groups with their rewards."""

    def prefetch(self, refs: Sequence[TaskRef]) -> None:
        """Make ready what scoring needs of these items."""

    def close(self) -> None:
        """End whatever scores."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What learns. One thread calls them, except for `scorer.close`."""

    policy: Policy
    tasks: TaskSet
    engine: Engine
    rollouts: RolloutCollector
    scorer: Scorer
    trainer: Trainer
    drafting: Drafting = field(default_factory=Drafting)
    ranks: "Ranks | None" = None  # the processes that train with this one


def build_parts(config: RunConfig, stopping: threading.Event, say: Callable[[str], None] = lambda _: None) -> Parts:
    """Load the policy and the tasks, and start the engine, the trainer and the scoring processes.

    `say` is told which engine was chosen, and why.
    """
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    ranks = None
    if launch().is_shared:
        from node.ranks import Ranks, lead  # FSDP takes a while to import

        ranks = Ranks()
        config = ranks.placed(config)
    torch.manual_seed(config.seed)  # what has no stream of its own: the first values of LoRA adapters
    tasks = build_task_set(config.tasks, config.seed)
    scorer = ScoringPool(config.tasks, config.scoring)
    with ThreadPoolExecutor(max_workers=1) as beside:
        scorer_started = beside.submit(scorer.start)
        try:
            policy = load_policy(config.model)
            chosen = choice.choose_for(config.engine, policy.model.device)
            say(f"engine: {chosen.backend}: {chosen.reason}")
            engine = make_engine(config, policy, tasks)
            trainer = make_trainer(config, policy) if ranks is None else lead(ranks, config, policy)
            drafting = make_drafting(config.engine, engine, policy, trainer)
            scorer_started.result()
        except BaseException:
            beside.shutdown(wait=True)
            scorer.close()
            raise
    interruptible = InterruptibleEngine(engine, stopping, engine.max_seq_len)
    rollouts = make_rollouts(config, interruptible, policy, tasks)
    if ranks is not None:
        say(f"trainer: {ranks.num_ranks} processes, {policy.model.device.type}")
    return Parts(policy, tasks, interruptible, rollouts, scorer, trainer, drafting, ranks)


def make_rollouts(config: RunConfig, engine: Engine, policy: Policy, tasks: TaskSet) -> RolloutCollector:
    """Return what writes groups: round by round, or with later rounds' groups in flight."""
    if not config.rollout.is_partial:
        return RolloutCollector(engine, policy, config.rollout, config.seed)

    def ahead(round_index: int) -> list[Task]:
        """Own questions that a round asks whoever else is there, and whatever they ask."""
        num_sure, most = config.sapo.num_local - config.sapo.num_broad, config.sapo.num_local + config.sapo.num_external
        return tasks.train_batch(round_index, num_sure, stride=most) if round_index <= config.rounds else []

    return PartialRollouts(engine, policy, config.rollout, config.seed, ahead)


def make_engine(config: RunConfig, policy: Policy, tasks: TaskSet) -> Engine:
    """Start the engine that suits, with a cache for sequences as long as this run needs."""
    max_seq_len = config.engine.max_seq_len or _needed_seq_len(config, policy, tasks)
    return choice.make_engine(policy, config.engine, max_seq_len=max_seq_len)


def _needed_seq_len(config: RunConfig, policy: Policy, tasks: TaskSet) -> int:
    """Look at some questions, and leave room for longer ones."""
    looked_at = tasks.heldout(_NUM_LOOKED_AT) + tasks.train_batch(1, _NUM_LOOKED_AT)
    longest = max(len(policy.encode_prompt(task.question)) for task in looked_at)
    return int(longest * _ROOM) + config.rollout.max_new_tokens


def make_trainer(config: RunConfig, policy: Policy, kind: type[Trainer] = Trainer) -> Trainer:
    """Start a trainer that owns the policy's model."""
    return kind(
        policy.model,
        config.trainer,
        temperature=config.rollout.temperature,
        max_completion_tokens=config.rollout.max_new_tokens,
    )
