"""What a node has of speculation beside its engine: the learner, its time, what is kept of it, what is shown of it.

    speculator   in the engine: drafters and the tuner
    learner      teaches the learned drafter; None where the settings or the model leave it out
    idle         the time it has for nothing: while answers are scored, or the disk or the exchange is waited for
    beside       the time it has on cores that the engine leaves idle, where that does not slow it

Idle time is what the drafter learns in. Where a round has none, as on a machine whose cores are always busy, the
learner may take a small share of the round's time (`catch_up`), so that it moves with the policy.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from swarm.config import EngineConfig
from swarm.cores import num_spare_cores
from swarm.drafting.beside import Beside
from swarm.drafting.idle import IdleTime
from swarm.drafting.speculator import DraftCounts, Speculator, make_speculator
from swarm.engine.base import Engine
from swarm.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from swarm.drafting.learner import HeadLearner
    from swarm.policy import Policy
    from swarm.trainer import Trainer

__all__ = ["Drafting", "make_drafting"]

_SHARE = 0.04  # of a round's wall time that the learner may take
_MAX_CREDIT_S = 2.0


class Drafting:
    """Speculation of one node, between rounds. Nothing here is called while the engine is in a step."""

    def __init__(
        self,
        speculator: Speculator | None = None,
        learner: "HeadLearner | None" = None,
        clock: Callable[[], float] = time.perf_counter,
        num_spare_cores: int = 0,
    ) -> None:
        """Without a speculator it does nothing and says nothing. num_spare_cores: that the engine leaves idle."""
        self.speculator, self.learner, self._clock = speculator, learner, clock
        self._idle = IdleTime(learner.step, clock) if learner is not None else None
        self._spare: IdleTime | None = None
        if learner is not None and num_spare_cores:
            self._spare = _spare_time(learner.step, clock, num_spare_cores)
        self._beside = Beside()
        self._step_s = 0.0  # what a step takes, as the last ones did
        self._credit_s = 0.0
        self._round_began_s = clock()
        self._learned_s = 0.0  # in this round, idle time left out
        self._before: dict[str, DraftCounts] = {}
        self._saved_before_s = 0.0
        self._idle_before_s = 0.0
        self._steps_before = 0

    @contextmanager
    def idle(self) -> Iterator[None]:
        """The node waits: the learner may work. Nobody trains the policy meanwhile."""
        if self._idle is None or self.learner is None or not self.learner.can_learn:
            yield
            return
        with self._idle:
            yield

    @contextmanager
    def beside(self, engine: Engine) -> Iterator[None]:
        """The engine works: where it leaves cores idle the learner may work on them, as long as that slows nothing."""
        if self._spare is None or self.learner is None or not self.learner.can_learn:
            yield
            return
        is_beside = self._beside.begin()
        began_s, before = self._clock(), engine.stats.num_tokens_generated
        with self._spare if is_beside else nullcontext():
            yield
        self._beside.end(is_beside, engine.stats.num_tokens_generated - before, self._clock() - began_s)

    @property
    def _idle_s(self) -> float:
        """Seconds that the learner has worked in time of its own."""
        return sum(one.worked_s for one in (self._idle, self._spare) if one is not None)

    def learn(self, prompt_ids: Sequence[int], completions: Iterable[Sequence[int]]) -> None:
        """Take completions of a prompt that others have written."""
        if self.speculator is not None:
            for token_ids in completions:
                self.speculator.learn(prompt_ids, token_ids)

    def policy_updated(self) -> None:
        """The trainer has made an update, whose forward pass the learner has seen."""
        if self.learner is not None:
            self.learner.next_round()

    def catch_up(self) -> None:
        """Let the learner work for its share of the time since the last call, as far as idle time was less."""
        if self.learner is None or self._idle is None or not self.learner.can_learn:
            return
        now = self._clock()
        idle_s = self._idle_s - self._idle_before_s
        earned_s = _SHARE * (now - self._round_began_s) - idle_s
        self._credit_s = min(_MAX_CREDIT_S, self._credit_s + max(0.0, earned_s))
        self._round_began_s = now
        while self._credit_s > self._step_s:
            begin = self._clock()
            self.learner.step()
            took_s = self._clock() - begin
            self._step_s = took_s if not self._step_s else 0.5 * (self._step_s + took_s)
            self._credit_s -= took_s
            self._learned_s += took_s

    def describe(self) -> dict[str, Any]:
        """Return what has become of drafts since the last call, for a round's row; nothing where there are none."""
        speculator = self.speculator
        if speculator is None:
            return {}
        counts = {name: one.since(self._before.get(name, DraftCounts())) for name, one in speculator.counts.items()}
        self._before = {name: one.since(DraftCounts()) for name, one in speculator.counts.items()}
        num_drafts = sum(one.num_drafts for one in counts.values())
        num_kept = sum(one.num_kept for one in counts.values())
        row: dict[str, Any] = {
            "accepted_length": 1 + num_kept / num_drafts if num_drafts else None,
            "draft_acceptance": {name: one.num_kept / one.num_tokens for name, one in counts.items() if one.num_tokens},
            "num_drafted": {name: one.num_tokens for name, one in counts.items()},
            "num_draft_kept": {name: one.num_kept for name, one in counts.items()},
            "draft_arms": {str(size): key for size, key in speculator.arms().items()},
            "draft_saved_s": None,
        }
        if (saved_s := speculator.saved_s) is not None:
            row["draft_saved_s"], self._saved_before_s = saved_s - self._saved_before_s, saved_s
        if self.learner is not None and self._idle is not None:
            row["drafter_loss"] = self.learner.loss
            row["num_drafter_steps"] = self.learner.num_steps - self._steps_before
            row["drafter_idle_s"] = self._idle_s - self._idle_before_s
            row["drafter_s"] = self._learned_s
            self._steps_before, self._idle_before_s = self.learner.num_steps, self._idle_s
            self._learned_s = 0.0
        return row

    def state_tensors(self) -> "dict[str, Tensor]":
        """Return copies of what a checkpoint holds of the learner; none of it is frozen or the policy's."""
        return self.learner.state_tensors() if self.learner is not None else {}

    def state_meta(self) -> dict[str, Any] | None:
        """Return the rest of what it holds, as plain data; None where there is no speculation."""
        if self.speculator is None:
            return None
        learner = self.learner.state_meta() if self.learner is not None else None
        return {"speculator": self.speculator.state(), "learner": learner}

    def load_state(self, tensors: "Mapping[str, Tensor]", meta: Mapping[str, Any] | None) -> None:
        """Go on from what `state_tensors` and `state_meta` returned, as far as there is anything of use in it."""
        if meta is None or self.speculator is None:
            return
        self.speculator.load_state(meta["speculator"])
        if self.learner is not None and meta["learner"] is not None:
            self.learner.load_state(tensors, meta["learner"])
            self._steps_before = self.learner.num_steps

    def close(self) -> None:
        """End the learner's threads."""
        for one in (self._idle, self._spare):
            if one is not None:
                one.close()


def make_drafting(config: EngineConfig, engine: Engine, policy: "Policy", trainer: "Trainer") -> Drafting:
    """Give an engine its learned drafter where the settings want one, and let it learn from what the trainer computes.

    Raises ModelError where the settings ask for it alone and no such drafter fits the model.
    """
    if config.speculation == "off" or not engine.speculates:
        return Drafting()
    if config.speculation not in ("auto", "head"):
        return Drafting(engine.speculator)
    import torch

    from swarm.drafting.head import HeadDrafter
    from swarm.drafting.head_model import supports_head
    from swarm.drafting.learner import HeadLearner

    if not supports_head(policy.model):
        if config.speculation == "head":
            raise ModelError(f"no drafter learns from {policy.name}: set engine.speculation to auto, suffix or off")
        return Drafting(engine.speculator)
    learner = HeadLearner(policy.model)
    trainer.observer = learner.observe
    head = HeadDrafter(
        learner.model, policy.model, lambda: learner.vocabulary,
        num_slots=config.max_slots, capacity=engine.max_seq_len,
    )  # fmt: skip
    engine.speculator = make_speculator(config.speculation, head)
    num_spare = num_spare_cores(torch.get_num_threads()) if policy.model.device.type == "cpu" else 0
    return Drafting(engine.speculator, learner, num_spare_cores=num_spare)


def _spare_time(step: Callable[[Callable[[], bool]], bool], clock: Callable[[], float], num_threads: int) -> IdleTime:
    """Return time on cores of its own: torch's operations there take so many threads."""
    import torch

    before = torch.get_num_threads()
    spare = IdleTime(step, clock, prepare=lambda: torch.set_num_threads(num_threads))
    spare.start()
    torch.set_num_threads(before)  # each thread has its number, and torch gives the last one to threads to come
    return spare
