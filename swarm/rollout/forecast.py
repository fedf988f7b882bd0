"""What rounds with a number of groups in flight would cost, reckoned from the lengths that were written lately.

The scheduler on paper: groups of these lengths, one round after another, each completion a counter. What a new policy
cuts of a prefix is drawn from how often the last ones changed a token. Everything is counted in tokens of decoding, so
that a decision that rests on it is a function of what was written and not of the machine's clock. Nothing has to be
tried to be known; what the reckoning leaves out, `over_provision` finds in what rounds really save.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Costs", "Plan", "forecast"]

_Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What an engine takes for things, in tokens of decoding."""

    step: float  # a step, beside its tokens
    prefill: float  # a token that is given back: prefilled, and verified


@dataclass(frozen=True, slots=True)
class Plan:
    """How rounds are to be written."""

    num_groups: int  # that a round returns
    num_in_flight: int
    num_slots: int
    verifies: bool  # what earlier policies wrote; else it is kept
    by_arrival: bool  # a round ends with as many groups as it returns, whichever; else with those asked first


def forecast(
    lengths: Sequence[Sequence[int]], num_prompt_tokens: float, change_rate: float, plan: Plan, costs: Costs
) -> float:
    """Return the mean cost of a round. lengths: of the completions of each group, of one at least.

    change_rate: of the tokens that an earlier policy wrote, the share that the present one would not write there.
    """
    num_filling = math.ceil(plan.num_in_flight / plan.num_groups)
    num_rounds = num_filling + max(1, len(lengths) // plan.num_groups)
    flight = _Flight(plan, np.array(lengths, dtype=np.int64))
    total = 0.0
    for index in range(num_rounds):
        flight.fill()
        num_given_back = flight.give_back(num_prompt_tokens, change_rate)
        num_steps, num_tokens = flight.write()
        if index >= num_filling:
            total += costs.step * num_steps + num_tokens + costs.prefill * num_given_back
        flight.leave()
    return total / (num_rounds - num_filling)


@dataclass(slots=True)
class _Flight:
    """The groups in flight, oldest first, a row each."""

    plan: Plan
    lengths: _Ints  # of all groups that there are, asked again and again; [num_groups, num_completions]
    length: _Ints = field(init=False)  # [num_in_flight, num_completions]
    have: _Ints = field(init=False)
    num_begun: int = 0
    rng: np.random.RandomState = field(default_factory=lambda: np.random.RandomState(0))  # its stream never changes

    def __post_init__(self) -> None:
        self.length = self.have = self.lengths[:0]

    def fill(self) -> None:
        """Ask for groups until enough are in flight."""
        end = self.num_begun + self.plan.num_in_flight - len(self.length)
        more = self.lengths[np.arange(self.num_begun, end) % len(self.lengths)]
        self.length = np.concatenate([self.length, more])
        self.have = np.concatenate([self.have, np.zeros_like(more)])
        self.num_begun = end

    def give_back(self, num_prompt_tokens: float, change_rate: float) -> float:
        """Prefill what has been begun, and cut what the new policy writes otherwise; return how many tokens it takes.

        What is finished is verified when its group is due, or, by arrival, when the others of its group are too.
        """
        is_finished = self.have == self.length
        may_return = is_finished.all(1) if self.plan.by_arrival else np.arange(len(self.have)) < self.plan.num_groups
        given = (self.have > 0) & (~is_finished | (may_return[:, None] & self.plan.verifies))
        total = float(self.have[given].sum()) + num_prompt_tokens * int(given.any(1).sum())
        if self.plan.verifies and change_rate:
            kept = np.log1p(-self.rng.random_sample(self.have.shape)) / math.log1p(-change_rate)
            self.have = np.where(given, np.minimum(self.have, kept.astype(np.int64)), self.have)
        return total

    def write(self) -> tuple[int, int]:
        """Decode until the round has what it returns; return steps and tokens."""
        rest = self.length - self.have
        begins = self._begins(rest)
        ends = np.where(rest > 0, begins + rest, 0).max(1)
        num = self.plan.num_groups
        num_steps = int(np.partition(ends, num - 1)[num - 1] if self.plan.by_arrival else ends[:num].max())
        written = np.clip(num_steps - begins, 0, rest)
        self.have = self.have + written
        return num_steps, int(written.sum())

    def _begins(self, rest: _Ints) -> _Ints:
        """Return the step at which each completion takes a slot: they do in order, as slots fall free."""
        begins = np.zeros_like(rest)
        waiting = np.flatnonzero(rest)
        if len(waiting) > self.plan.num_slots:
            free = [0] * self.plan.num_slots
            flat, nums = begins.reshape(-1), rest.reshape(-1)[waiting].tolist()
            starts = []
            for num in nums:
                starts.append(free[0])
                heapq.heapreplace(free, free[0] + num)
            flat[waiting] = starts
        return begins

    def leave(self) -> None:
        """Take out the groups that the round returns."""
        stays = np.arange(len(self.have)) >= self.plan.num_groups
        if self.plan.by_arrival:
            is_whole = (self.have == self.length).all(1)
            stays = ~is_whole | (is_whole.cumsum() > self.plan.num_groups)
        self.length, self.have = self.length[stays], self.have[stays]
