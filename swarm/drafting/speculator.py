"""What an engine speculates with: drafters, and what chooses among them for each step.

It keeps the state of running sequences and the clock; the engine verifies. Without a tuner one strategy is always on.
Nothing is done for a step that is decoded plainly: sequences are caught up with when drafts are next wanted.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swarm.drafting.base import Drafter, SequenceState
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import OFF, Strategy, StrategyTuner

__all__ = ["DraftCounts", "Speculator", "make_speculator"]

_FIXED = (8, 32)  # depth, and tokens to verify in a step, where a drafter is always on
_TUNED = ((4, 8), (8, 16), (12, 32))  # what the tuner chooses from, for each drafter


@dataclass(slots=True)
class DraftCounts:
    """How the drafts of one drafter fared."""

    num_drafts: int = 0  # that were not empty
    num_tokens: int = 0
    num_kept: int = 0


class Speculator:
    """Chooses strategies, asks drafters and tells them what became of their drafts. One thread calls it."""

    def __init__(
        self,
        drafters: Iterable[Drafter],
        strategy: Strategy | StrategyTuner,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """strategy: the one that is always on, or what chooses one for each step."""
        self.drafters = {drafter.name: drafter for drafter in drafters}
        self.counts = {name: DraftCounts() for name in self.drafters}
        self.strategy, self._clock = strategy, clock
        offered = strategy.strategies if isinstance(strategy, StrategyTuner) else [strategy]
        for one in offered:
            if one != OFF and one.drafter not in self.drafters:
                raise ValueError(f"there is no drafter {one.drafter!r}")
        self._states: dict[int, SequenceState] = {}
        self._chosen = OFF
        self._began_s = 0.0

    def begin(self, num_running: int) -> bool:
        """A decode step begins. Returns whether drafts are wanted for it."""
        self._began_s = self._clock()
        strategy = self.strategy
        self._chosen = strategy.choose(num_running) if isinstance(strategy, StrategyTuner) else strategy
        return self._chosen != OFF

    def state_of(self, request_id: int, prompt_ids: Sequence[int]) -> SequenceState:
        """Return what drafters know of a sequence. The engine appends what was written since."""
        state = self._states.get(request_id)
        if state is None:
            state = self._states[request_id] = SequenceState(request_id, prompt_ids)
        return state

    def propose(self, states: Sequence[SequenceState]) -> list[list[int]]:
        """Return the drafts of the chosen strategy."""
        chosen = self._chosen
        return self.drafters[chosen.drafter].propose(states, chosen.depth, chosen.num_verified)

    def verified(self, state: SequenceState, draft: Sequence[int], num_kept: int) -> None:
        """Learn how a draft fared."""
        if draft:
            counts = self.counts[self._chosen.drafter]
            counts.num_drafts += 1
            counts.num_tokens += len(draft)
            counts.num_kept += num_kept
            self.drafters[self._chosen.drafter].verified(state, draft, num_kept)

    def end(self, num_running: int, num_tokens: int) -> None:
        """The step has ended. num_running: at its beginning. num_tokens: that all sequences gained."""
        if isinstance(self.strategy, StrategyTuner):
            self.strategy.observe(num_running, num_tokens, self._clock() - self._began_s)

    def observe(self, request_id: int, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take what a sequence has written that does not run any more."""
        state = self.state_of(request_id, prompt_ids)
        state.append(token_ids[state.num_written :])
        del self._states[request_id]
        for drafter in self.drafters.values():
            drafter.observe(state)

    def drop(self, request_id: int) -> None:
        """A sequence is given back that waits to be run again."""
        state = self._states.pop(request_id, None)
        if state is not None:
            for drafter in self.drafters.values():
                drafter.observe(state)

    def learn(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take a completion from elsewhere: of an earlier round, or admitted from the swarm."""
        for drafter in self.drafters.values():
            drafter.learn(prompt_ids, token_ids)

    def policy_changed(self, version: int) -> None:
        """The policy has new weights."""
        for drafter in self.drafters.values():
            drafter.policy_changed(version)
        if isinstance(self.strategy, StrategyTuner):
            self.strategy.policy_changed(version)


def make_speculator(mode: str) -> Speculator | None:
    """Return what `engine.speculation` names: "off", a drafter that is always on, or "auto" with all of them."""
    if mode == "off":
        return None
    drafters = [SuffixDrafter(), NgramDrafter()]
    if mode != "auto":
        return Speculator([one for one in drafters if one.name == mode], Strategy(mode, *_FIXED))
    tuned = [Strategy(drafter.name, *sizes) for drafter in drafters for sizes in _TUNED]
    return Speculator(drafters, StrategyTuner(tuned))
