"""The node: one round after another, until the run is finished or somebody stops it.

    Node        the loop of a round                                         ← read this first
    Parts       policy, tasks, engine, scorer, trainer (`node.parts`)
    Recorder    what a round leaves on the disk, where a resume begins (`node.recorder`)

An asyncio loop owns the round; torch work runs in one worker thread, the disk is written by another, scoring
runs in child processes. The order of shutdown: the engine drops what it holds, the disk is brought up to date,
the swarm is left, the scoring processes end, those that train with this one end, the threads end.
"""

import asyncio
import hashlib
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from node.config import RunConfig
from node.display import Display
from node.exchange import Exchange
from node.interrupt import Interrupted
from node.measure import RoundMeter, describe_evaluation, describe_external, describe_groups, describe_update
from node.metrics import MovingAverage, peak_rss_bytes
from node.recorder import RoundKeeper
from protocol.messages import TaskRef
from swarm import sapo
from swarm.broad import ask_again
from swarm.config import SapoConfig
from swarm.evaluation import Evaluation, evaluate
from swarm.rollout.allocation import later_spans
from swarm.swing import Swing
from swarm.types import RolloutGroup, Task, TrainingBatch

if TYPE_CHECKING:
    from node.parts import Parts
    from swarm.scoring import Outcome
    from swarm.trainer import UpdateStats

__all__ = ["MOVING_AVERAGE_ROUNDS", "Node"]

MOVING_AVERAGE_ROUNDS = 20
_SWING_EVALUATIONS, _SWING_ROUNDS = 5, 100  # how many count as lately
_FINAL_CHECKPOINT_WITHIN_S = 4.0  # a stopped node has 10 s in all; the journal has every round already
P = ParamSpec("P")
T = TypeVar("T")


class Node:
    """One node. `run` may be called once; `stop` may be called at any time, from the loop's thread."""

    def __init__(
        self,
        config: RunConfig,
        *,
        build_parts: Callable[[RunConfig, threading.Event], "Parts"],
        recorder: RoundKeeper,
        exchange: Exchange,
        display: Display,
        clock: Callable[[], float] = time.perf_counter,
        executor: Executor | None = None,
    ) -> None:
        """`executor` does the work of torch, one job at a time; None: a thread of the node's own."""
        self.config = config
        self.recorder = recorder
        self.exchange = exchange
        self.display = display
        self.clock = clock
        self.stopping = threading.Event()
        self.phase = "start"
        # The last ones, restored ones included: a run may have millions, and its metrics have all of them.
        self.rows: deque[dict[str, Any]] = deque(maxlen=MOVING_AVERAGE_ROUNDS)
        self.pass_at_1_heldout: float | None = None  # as of the last evaluation of a policy that has learned
        self._build_parts = build_parts
        self._torch = executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="torch")
        self._parts: Parts | None = None
        self._before: Evaluation | None = None  # of a policy that has not learned, until the first row has it
        self._average = MovingAverage(MOVING_AVERAGE_ROUNDS)
        self._swing = Swing(_SWING_EVALUATIONS if self._has_evaluations else _SWING_ROUNDS)
        self._num_updates_skipped = 0
        self._elapsed_s = 0.0
        self._watch: asyncio.Task[None] | None = None  # ends when the exchange has died
        self._trained_round = 0  # the last round whose update has been begun

    @property
    def parts(self) -> "Parts":
        """What learns; there once `run` has built it."""
        if self._parts is None:
            raise RuntimeError("the node has not been started")
        return self._parts

    @property
    def finished(self) -> bool:
        """Whether every round of the run is done."""
        return len(self.rows) > 0 and self.recorder.last_round >= self.config.rounds

    def stop(self) -> None:
        """End the run after the decode step or the update that is going on."""
        self.stopping.set()

    async def run(self) -> None:
        """Go from the last good state to the end of the run, or to `stop`. Whatever dies within is raised here."""
        self._watch = asyncio.create_task(self.exchange.wait_failed())
        self._watch.add_done_callback(lambda watch: self.stop() if not watch.cancelled() else None)
        try:
            await self._start()
            while not self.stopping.is_set() and self.recorder.last_round < self.config.rounds:
                await self._round()
            await self._save(None if not self.stopping.is_set() else _FINAL_CHECKPOINT_WITHIN_S)
        except Interrupted:
            self.parts.engine.abort()
            await self._save(_FINAL_CHECKPOINT_WITHIN_S)
        finally:
            await self.close()
        if not self._watch.cancelled() and (error := self._watch.exception()) is not None:
            raise error

    async def close(self) -> None:
        """End everything that the node has begun, in the order that the module's docstring says."""
        await self.recorder.close()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self.exchange.close()
        if self._parts is not None:
            self._parts.drafting.close()
            self._parts.scorer.close()
            self._parts.engine.close()
            if self._parts.ranks is not None:
                self._parts.ranks.close()
        self._torch.shutdown(wait=True)

    async def _round(self) -> None:
        """One round of SAPO."""
        parts, config = self.parts, self.config
        round_index = self.recorder.last_round + 1
        meter = RoundMeter(self.clock, self._enter)
        outcomes_before = Counter(parts.scorer.counts)
        swing, swing_rng = self._swing.value, self._rng("swing", round_index)
        share = 1 - config.sapo.swing_damping * swing
        wanted = sapo.damped(config.sapo, share, swing_rng)
        external = await self.exchange.sample(wanted.num_external)
        with meter.time("rollout"):
            tasks, again = self._choose_tasks(round_index, external, wanted)
            await self._in_torch(self._learn_drafts, tasks, external)
        own = await self._write(tasks, round_index, meter)
        with parts.drafting.idle():
            await self.exchange.publish(own)
            num_places = sapo.num_to_fill(own, external, wanted, again)
            external += await self.exchange.fill(sapo.share_of(num_places, share, swing_rng))
        batch = sapo.build_batch(own, external, wanted, self._rng("batch", round_index), again=again)
        with meter.time("update"):
            stats = await self._update(batch)
        with meter.time("drafter"):
            await self._in_torch(parts.drafting.catch_up)
        with meter.time("load_policy"):
            await self._in_torch(self._load_policy)
        row = self._describe(round_index, own, again, stats, Counter(parts.scorer.counts) - outcomes_before)
        row |= {"swing": swing, "num_external_wanted": wanted.num_external}
        row |= describe_external(len(own), external, batch) | self.exchange.describe_round()
        row |= parts.rollouts.describe() | parts.drafting.describe()
        if self._evaluation_is_due(round_index):
            with meter.time("evaluation"):
                row |= describe_evaluation(await self._in_torch(self._evaluate))
        await self._record(row, batch, meter)

    def _choose_tasks(
        self, round_index: int, external: list[RolloutGroup], config: SapoConfig
    ) -> tuple[list[Task], set[TaskRef]]:
        """Return what the round asks, and which questions of it others have asked as well (`sapo.num_broad`)."""
        parts = self.parts
        num_own = sapo.num_own_groups(config, len(external))
        tasks = parts.tasks.train_batch(round_index, num_own, stride=config.num_local + config.num_external)
        max_prompt_tokens = parts.engine.max_seq_len - self.config.rollout.max_new_tokens
        again = ask_again(tasks, external, config, max_prompt_tokens=max_prompt_tokens)
        tasks = tasks[: num_own - len(again)] + again
        parts.scorer.prefetch([task.ref for task in tasks])  # the scorer's processes make the items meanwhile
        return tasks, {task.ref for task in again}

    async def _write(self, tasks: list[Task], round_index: int, meter: RoundMeter) -> list[RolloutGroup]:
        """Write and score own groups; with `sapo.first_completions` a few of each, then the rest where they teach."""
        num_first = self.config.sapo.first_completions
        if not num_first:
            return await self._write_spans(tasks, None, round_index, meter)
        first = await self._write_spans(tasks, [range(num_first)] * len(tasks), round_index, meter)
        spans = later_spans(first, self.config.rollout.num_completions)
        more = await self._write_spans(tasks, spans, round_index, meter)
        return [group.with_more(rest) for group, rest in zip(first, more, strict=True)]

    async def _write_spans(
        self, tasks: list[Task], spans: list[range] | None, round_index: int, meter: RoundMeter
    ) -> list[RolloutGroup]:
        with meter.time("rollout"), self.parts.drafting.beside(self.parts.engine):
            groups = await self._in_torch(self.parts.rollouts.collect, tasks, round_index=round_index, spans=spans)
        with meter.time("scoring"), self.parts.drafting.idle():
            return await self._in_torch(self.parts.scorer.score_groups, groups)

    async def _update(self, batch: TrainingBatch) -> "UpdateStats | None":
        """Learn from a batch; a batch in which every group has advantage zero teaches nothing."""
        with self.parts.drafting.idle():
            await self.recorder.settle()  # a checkpoint may still be reading the tensors
        self._trained_round = self.recorder.last_round + 1
        if not batch.groups:
            return None
        await self._in_torch(self.parts.engine.release_memory)
        stats = await self._in_torch(self.parts.trainer.update, batch)
        self.parts.drafting.policy_updated()
        return stats

    def _learn_drafts(self, tasks: list[Task], external: list[RolloutGroup]) -> None:
        """Let drafters know what others wrote to the questions of this round."""
        asked = {task.ref for task in tasks}
        for group in external:
            if group.task.ref in asked:
                self.parts.drafting.learn(group.prompt_ids, [one.token_ids for one in group.completions])

    async def _record(self, row: dict[str, Any], batch: TrainingBatch, meter: RoundMeter) -> None:
        """Put the round on the disk and on the screen."""
        self._enter("record")
        seconds = meter.seconds
        row.update({f"{phase}_s": seconds[phase] for phase in ("rollout", "scoring", "update", "load_policy")})
        row["evaluation_s"] = seconds.get("evaluation", 0.0)
        row["tokens_per_s"] = row["num_tokens_generated"] / max(seconds["rollout"], 1e-9)
        row["peak_rss_bytes"] = peak_rss_bytes()
        row["round_s"] = meter.round_s()
        self._elapsed_s += row["round_s"] + row["evaluation_s"]
        row["elapsed_s"] = self._elapsed_s
        await self.recorder.append(row["round"], batch, row, self.parts.rollouts.state())
        self.recorder.checkpoint_if_due(self.parts.trainer)
        self._note(row)
        self.display.round(row)

    def _note(self, row: dict[str, Any]) -> None:
        """Remember what is asked of the last rounds."""
        self.rows.append(row)
        if self._has_evaluations:
            for when in ("_before", ""):
                if (value := row.get(f"pass_at_1_heldout{when}")) is not None:
                    self._swing.add(value)
        elif row["round"] >= MOVING_AVERAGE_ROUNDS:  # before, a single lucky round would stand as the best for long
            self._swing.add(row["reward_moving_average"])
        self.pass_at_1_heldout = row.get("pass_at_1_heldout", self.pass_at_1_heldout)

    def _describe(
        self,
        round_index: int,
        own: list[RolloutGroup],
        again: set[TaskRef],
        stats: "UpdateStats | None",
        outcomes: "Counter[Outcome]",
    ) -> dict[str, Any]:
        """Return the part of the round's row that does not depend on the machine."""
        row: dict[str, Any] = {"round": round_index, **describe_groups(own, self.config.sapo, again)}
        row["reward_moving_average"] = self._average.add(row["reward_mean"])
        row |= describe_update(stats)
        row["policy_version"] = self.parts.trainer.policy_version
        self._num_updates_skipped += stats is not None and stats.skipped
        row["num_updates_skipped"] = self._num_updates_skipped
        row["scoring_outcomes"] = dict(sorted(outcomes.items()))
        if self._before is not None:
            row |= describe_evaluation(self._before, "_before")
            self._before = None
        return row

    async def _start(self) -> None:
        """Join, build the parts, bring them to the last good state, and evaluate a policy that has not learned yet.

        Joining comes first: others find the node, and it them, while the model is loaded.
        """
        self._enter("start")
        await self.exchange.start()
        self._parts = await self._in_torch(self._build_parts, self.config, self.stopping)
        self.exchange.attach(self._parts)
        self.recorder.keep_beside(self._parts.drafting)
        self.display.loaded()
        self._enter("replay")
        restored = await self._in_torch(self.recorder.restore, self.parts.trainer, self.stopping.is_set)
        self.parts.rollouts.load_state(restored.rollouts)
        for note in restored.notes:
            self.display.note(note)
        self._trained_round = restored.round_index
        for row in restored.rows:
            self._note(row)
            self._average.add(row["reward_mean"])
        if self.rows:
            self._elapsed_s = self.rows[-1]["elapsed_s"]
            self._num_updates_skipped = self.rows[-1]["num_updates_skipped"]
            self.display.resumed(restored.rows)
        if restored.round_index:
            await self._in_torch(self._load_policy)
        elif self.config.evaluation.num_items and not self.stopping.is_set():
            self._enter("evaluation")
            self._before = await self._in_torch(self._evaluate)
            self.display.evaluated_before(self._before.pass_at_1)
        await self.exchange.wait_ready()

    async def _save(self, within_s: float | None) -> None:
        """Leave a checkpoint of the last finished round; not where an update after it has begun to change things."""
        if self._trained_round == self.recorder.last_round:
            await self.recorder.final_checkpoint(self.parts.trainer, within_s)
        else:
            await self.recorder.settle()

    @property
    def _has_evaluations(self) -> bool:
        """Whether held-out questions are asked in the course of the run, and not only before and after it."""
        return self.config.evaluation.num_items > 0 and self.config.evaluation.every_rounds > 0

    def _evaluation_is_due(self, round_index: int) -> bool:
        every = self.config.evaluation.every_rounds
        is_due = round_index == self.config.rounds or (every > 0 and round_index % every == 0)
        return is_due and self.config.evaluation.num_items > 0

    def _evaluate(self) -> Evaluation:
        parts, config = self.parts, self.config
        return evaluate(
            parts.engine,
            parts.policy,
            parts.scorer,
            parts.tasks.heldout(config.evaluation.num_items),
            temperature=config.evaluation.temperature,
            max_new_tokens=config.rollout.max_new_tokens,
            seed=config.seed,
        )

    def _load_policy(self) -> None:
        trainer = self.parts.trainer
        self.parts.rollouts.load_policy(trainer.policy_state(), trainer.policy_version)

    def _rng(self, purpose: str, round_index: int) -> random.Random:
        """Return a stream of its own for one purpose in one round, whatever happened before."""
        text = f"{purpose}\0{self.config.seed}\0{round_index}"
        return random.Random(hashlib.blake2b(text.encode(), digest_size=16).digest())

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.display.phase(phase)

    async def _in_torch(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        call = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._torch, call)
