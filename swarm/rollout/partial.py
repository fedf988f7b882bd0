"""Collects groups by partial rollouts: this round's tasks, and those of later rounds ahead of their time.

It asks the scheduler for this round's groups, keeps more in flight as far as that pays, and turns what comes back
into groups of text. How they are written is `scheduler`'s, how many are in flight `over_provision`'s, and what is done
about tokens of an older policy is the trainer's where the engine cannot make them exact.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protocol.messages import TaskRef
from swarm.config import RolloutConfig
from swarm.engine.base import Engine
from swarm.policy import Policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.forecast import Costs
from swarm.rollout.groups import Group, GroupKey
from swarm.rollout.over_provision import OverProvision, saved_tokens
from swarm.rollout.scheduler import GroupScheduler, RunCounts
from swarm.types import RolloutGroup, Task

__all__ = ["PartialRollouts"]

_WITHOUT_DRAW = 0.85  # of what a token takes to prefill, with its logits and its draw; measured for `tiny` on a CPU


class PartialRollouts(RolloutCollector):
    """Writes completions for batches of tasks, and goes on with what a round has left unfinished."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        config: RolloutConfig,
        seed: int,
        ahead: Callable[[int], Sequence[Task]],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """ahead: the tasks that a later round is sure to ask, in order from its first; empty after the last round."""
        super().__init__(engine, policy, config, seed)
        self._ahead, self._clock = ahead, clock
        self._verifies = config.stale_tokens == "verify" and engine.verifies_drafts
        self._scheduler = GroupScheduler(engine, order=config.order, max_age=config.max_age, verifies=self._verifies)
        prefill = engine.prefill_cost_tokens * (1.0 if self._verifies else _WITHOUT_DRAW)
        self._costs = Costs(engine.step_cost_tokens, prefill)
        most = config.max_over_provision if self._verifies else min(config.max_over_provision, config.max_age)
        self._over_provision = OverProvision(
            config.over_provision, most, self._costs,
            num_slots=engine.num_slots, verifies=self._verifies, by_arrival=config.order == "arrival",
        )  # fmt: skip
        self._tasks: dict[GroupKey, Task] = {}  # of the groups in flight
        self._num_submitted: dict[int, int] = {}  # tasks of this round and later ones
        self._row: dict[str, Any] = {}

    def collect(
        self, tasks: Sequence[Task], *, round_index: int, spans: Sequence[range] | None = None
    ) -> list[RolloutGroup]:
        """Return as many groups as there are tasks, oldest first; in order of submission those of the tasks.

        The noise depends on seed, round, task and completion alone, as in a synchronous round. Groups are begun whole,
        some of them a round ahead: there are no `spans`.
        """
        if spans is not None:
            raise ValueError("partial rollouts write the groups of a round in one call")
        begin = self._clock()
        self._num_submitted = {at: num for at, num in self._num_submitted.items() if at >= round_index}
        self._submit(tasks, round_index)
        factor = self._over_provision.factor
        num_wanted, later = math.ceil(factor * len(tasks)), round_index + 1
        while len(self._scheduler) < num_wanted and (more := self._ahead(later)):
            self._submit(more, later, most=num_wanted - len(self._scheduler))
            later += 1
        num_groups = len(tasks)
        if self._config.order == "submission":  # a run that was resumed with fewer groups a round has more begun
            num_groups = sum(key[0] <= round_index for key in self._tasks)
        groups, counts = self._scheduler.run(num_groups)
        version = self._engine.policy_version
        if groups:
            self._observe(groups, counts, factor, version, self._clock() - begin)
        return [self._finished(group, version) for group in groups]

    def describe(self) -> dict[str, Any]:
        """Return what the last round's rollouts were, for its row of metrics."""
        return dict(self._row)

    def state(self) -> dict[str, Any] | None:
        """Return the buffer of partial completions as plain data: what `load_state` goes on from."""
        return {
            "groups": self._scheduler.state(),
            "tasks": [
                [list(key), [task.ref.source, task.ref.digest, task.ref.seed, task.ref.index], task.question]
                for key, task in sorted(self._tasks.items())
            ],
            "num_submitted": [[at, num] for at, num in sorted(self._num_submitted.items())],
            "over_provision": self._over_provision.state(),
        }

    def load_state(self, plain: Mapping[str, Any] | None) -> None:
        """Go on with the buffer of `state`; with an empty one where there was none."""
        if plain is None:
            return
        self._scheduler.load_state(plain["groups"], self._sampling)
        self._tasks = {(at, place): Task(TaskRef(*ref), question) for (at, place), ref, question in plain["tasks"]}
        self._num_submitted = {at: num for at, num in plain["num_submitted"]}
        self._over_provision.load_state(plain["over_provision"])

    def _submit(self, tasks: Sequence[Task], round_index: int, *, most: int | None = None) -> None:
        """Submit those of a round's tasks that have not been, or the first `most` of them."""
        begin = self._num_submitted.get(round_index, 0)
        end = len(tasks) if most is None else min(len(tasks), begin + most)
        for place in range(begin, end):
            task, key = tasks[place], (round_index, place)
            seeds = [self._noise(round_index, place, index) for index in range(self._config.num_completions)]
            self._scheduler.submit(key, self._policy.encode_prompt(task.question), seeds, self._sampling)
            self._tasks[key] = task
        self._num_submitted[round_index] = max(begin, end)

    def _finished(self, group: Group, version: int) -> RolloutGroup:
        """Return what a group is to those who learn from it."""
        completions = tuple(member.written for member in group.members if member.written is not None)
        texts = tuple(self._policy.decode(completion.token_ids) for completion in completions)
        masked: tuple[int, ...] = ()
        if self._config.stale_tokens == "mask":
            masked = tuple(
                max((part.end for part in one.segments if part.policy_version != version), default=0)
                for one in completions
            )
        return RolloutGroup(self._tasks.pop(group.key), group.prompt_ids, completions, texts, num_masked=masked)

    def _observe(self, groups: Sequence[Group], counts: RunCounts, factor: float, version: int, seconds: float) -> None:
        """Choose how many groups are in flight next, and describe the run."""
        completions = [member.written for group in groups for member in group.members if member.written is not None]
        longest = max(len(completion.token_ids) for completion in completions)
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        lengths = [[member.num_tokens for member in group.members] for group in groups]
        self._over_provision.observe(counts, lengths, sum(len(group.prompt_ids) for group in groups))
        authors: Counter[int] = Counter()
        for completion in completions:
            for part in completion.segments:
                authors[part.policy_version] += part.end - part.start
        saved = saved_tokens(counts, longest, self._costs)
        took = self._costs.step * longest + num_tokens - saved
        self._row = {
            "over_provision": factor,
            "num_groups_in_flight": counts.num_groups_in_flight,
            "num_groups_carried": len(self._scheduler),
            "num_groups_recycled": counts.num_groups_recycled,
            "num_tokens_recycled": counts.num_tokens_recycled,
            "num_tokens_resumed": counts.num_tokens_resumed,
            "num_tokens_cut": counts.num_tokens_cut,
            "staleness_mean": sum((version - author) * num for author, num in authors.items()) / num_tokens,
            "staleness_max": version - min(authors),
            "policy_versions": {str(author): num for author, num in sorted(authors.items())},
            "saved_s": seconds * saved / took if took > 0 else 0.0,
        }
