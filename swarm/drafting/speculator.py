"""What an engine speculates with: drafters, and what chooses among them for each step.

It keeps the state of running sequences and the clock; the engine verifies. Without a tuner one strategy is always on.
Nothing is done for a step that is decoded plainly: sequences are caught up with when drafts are next wanted.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from swarm.drafting.base import Drafter, Drawing, Seen, SequenceState
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import OFF, Strategy, StrategyTuner
from swarm.drafting.worth import PassCosts

__all__ = ["MAX_DEPTH", "DraftCounts", "Speculator", "make_speculator"]

_FIXED = (12, 64)  # depth, and tokens to verify in a step, at most, where a drafter is always on
_TUNED = ((4, 16), (12, 64))  # what the tuner chooses from, for each drafter
MAX_DEPTH: Final = max(depth for depth, _ in (_FIXED, *_TUNED))  # tokens of the longest draft


@dataclass(slots=True)
class DraftCounts:
    """How the drafts of one drafter fared."""

    num_drafts: int = 0  # that were not empty
    num_tokens: int = 0
    num_kept: int = 0

    def since(self, before: "DraftCounts") -> "DraftCounts":
        """Return what has come since."""
        return DraftCounts(
            self.num_drafts - before.num_drafts, self.num_tokens - before.num_tokens, self.num_kept - before.num_kept
        )


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
        self.num_states = max((drafter.num_states for drafter in self.drafters.values()), default=0)
        self.strategy, self._clock = strategy, clock
        offered = strategy.strategies if isinstance(strategy, StrategyTuner) else [strategy]
        for one in offered:
            if one != OFF and one.drafter not in self.drafters:
                raise ValueError(f"there is no drafter {one.drafter!r}")
        self._states: dict[int, SequenceState] = {}
        self._chosen = OFF
        self._costs = PassCosts()
        self._num_running = self._num_drafted = 0  # of this step
        self._began_s = self._pass_began_s = 0.0

    def begin(self, num_running: int) -> bool:
        """A decode step begins. Returns whether drafts are wanted for it."""
        self._began_s = self._pass_began_s = self._clock()
        self._num_running, self._num_drafted = num_running, 0
        strategy = self.strategy
        self._chosen = strategy.choose(num_running) if isinstance(strategy, StrategyTuner) else strategy
        return self._chosen != OFF

    def state_of(
        self, request_id: int, prompt_ids: Sequence[int], drawing: Callable[[], Drawing] | None = None
    ) -> SequenceState:
        """Return what drafters know of a sequence. The engine appends what was written since.

        drawing: says how its tokens are drawn, where it is new.
        """
        state = self._states.get(request_id)
        if state is None:
            state = SequenceState(request_id, prompt_ids, None if drawing is None else drawing())
            self._states[request_id] = state
        return state

    def saw(self, seen: Callable[[], Iterable[Seen]], states: Any) -> None:
        """Hand the policy's states to the drafters that want them; see Drafter."""
        for drafter in self.drafters.values():
            if drafter.num_states:
                drafter.saw(seen, states)

    def propose(self, states: Sequence[SequenceState], vocab_size: int) -> list[list[int]]:
        """Return the drafts of the chosen strategy. Raises ValueError for one that no engine could verify: a bug."""
        chosen = self._chosen
        worth = self._costs.worth(self._num_running)
        drafts = self.drafters[chosen.drafter].propose(states, chosen.depth, chosen.num_verified, worth)
        for state, draft in zip(states, drafts, strict=True):
            if len(draft) > state.room or min(draft, default=0) < 0 or max(draft, default=0) >= vocab_size:
                raise ValueError(f"a drafter proposes {list(draft)}, where {state.room} tokens of the vocabulary fit")
        self._num_drafted = sum(map(len, drafts))
        self._pass_began_s = self._clock()
        return drafts

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
        now_s = self._clock()
        step_s = now_s - self._began_s
        num_rows = num_running + self._num_drafted
        self._costs.observe(num_running, num_rows, now_s - self._pass_began_s, step_s, num_tokens)
        if isinstance(self.strategy, StrategyTuner):
            self.strategy.observe(num_running, num_tokens, step_s)

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

    def policy_changed(self, version: int, weights: Mapping[str, Any] | None = None) -> None:
        """The policy has new weights; see Drafter."""
        for drafter in self.drafters.values():
            drafter.policy_changed(version, weights)
        if isinstance(self.strategy, StrategyTuner):
            self.strategy.policy_changed(version)

    @property
    def saved_s(self) -> float | None:
        """Seconds saved against plain decoding so far; None where plain decoding is not measured."""
        return self.strategy.saved_s if isinstance(self.strategy, StrategyTuner) else None

    def arms(self) -> dict[int, str]:
        """Return the strategy that holds for each size of the running batch, by the least size of its bucket."""
        if isinstance(self.strategy, StrategyTuner):
            return {size: strategy.key for size, strategy in self.strategy.incumbents().items()}
        return {1: self.strategy.key}

    def state(self) -> dict[str, Any]:
        """Return what has been learned of strategies, as plain data."""
        return {"tuner": self.strategy.state()} if isinstance(self.strategy, StrategyTuner) else {}

    def load_state(self, plain: Mapping[str, Any]) -> None:
        """Go on with what `state` returned."""
        if isinstance(self.strategy, StrategyTuner) and "tuner" in plain:
            self.strategy.load_state(plain["tuner"])


def make_speculator(mode: str, head: Drafter | None = None) -> Speculator | None:
    """Return what `engine.speculation` names: "off", a drafter that is always on, or "auto", which tries and chooses.

    head: the learned drafter, where somebody teaches one; "head" without it decodes plainly. "auto" leaves out prompt
    lookup: the suffix drafter knows what it knows, and each strategy more takes time to try.
    """
    if mode == "off" or (mode == "head" and head is None):
        return None
    if mode == "auto":
        drafters: list[Drafter] = [SuffixDrafter(), *([head] if head is not None else [])]
        tuned = [Strategy(drafter.name, *sizes) for drafter in drafters for sizes in _TUNED]
        return Speculator(drafters, StrategyTuner(tuned))
    drafter = head if head is not None and mode == head.name else NgramDrafter() if mode == "ngram" else SuffixDrafter()
    return Speculator([drafter], Strategy(mode, *_FIXED))
