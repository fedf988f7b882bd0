"""How many groups are in flight: as many as pay, reckoned beforehand.

Writing ahead saves steps: a round needs fewer than its longest completion has tokens. It costs verification: what was
written ahead is prefilled again under the next policy, and what that cuts is written again. Both are counted in tokens
of decoding (`forecast`), so that the decision is a function of what was written and not of the machine's clock.

    forecast   what each factor would cost with the lengths of late, and with as many tokens cut as lately. The factor
               goes towards the cheapest a rung at a time, so that what a new policy cuts is known before much is
               written ahead; and only where that is clearly cheaper than a synchronous round.
    ledger     what rounds have lost, as measured, less what they won since. It never passes a share of what all
               rounds took and a part of one round: then the factor is 1, until twice as much is affordable. Whatever
               the forecast says, a run is slower than a synchronous one by that bound and one round's loss at most.

A round at 1 is a synchronous one and costs nothing more. Where completions are of about one length nothing is reckoned.
A cache that is full needs no rule of its own: no slot is idle then, and the forecast saves no steps.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swarm.compact import pack_ids, unpack_ids
from swarm.rollout.forecast import Costs, Plan, forecast
from swarm.rollout.scheduler import RunCounts

__all__ = ["OverProvision", "saved_tokens"]

_LADDER = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # above 1
_LEAST_TAIL = 0.3  # share of a synchronous round's slot steps that its tail leaves idle
_LEAST_GAIN = 0.1  # of a synchronous round's cost, that a factor has to save by the forecast: so much it may be off
_HYSTERESIS = 0.02  # of the cost: a factor that is cheaper by less is not gone to
_FIRST_LOOK = 2  # runs before the first look
_LEAST_WAIT, _MOST_WAIT = 8, 64  # runs between two looks, longer each time that nothing changes
_REMEMBERED_RUNS = 8
_LOST_SHARE = 0.01  # of what all rounds took, that may be lost
_LOST_ROUNDS = 0.2  # beside it, of a round
_MEMORY = 0.8  # of what was known before a run, of how often tokens change
_PRIOR_CHANGES, _PRIOR_TOKENS = 0.1, 100.0


def saved_tokens(counts: RunCounts, longest: int, costs: Costs) -> float:
    """Return what a run saved against a synchronous one, in tokens of decoding. longest: completion it returned."""
    prefilled = counts.num_tokens_resumed + counts.num_prompt_tokens_resumed
    return costs.step * (longest - counts.num_steps) - counts.num_tokens_cut - costs.prefill * prefilled


class OverProvision:
    """Chooses the factor between 1 and a maximum; a fixed one stays."""

    def __init__(
        self, fixed: float, most: float, costs: Costs, *, num_slots: int, verifies: bool, by_arrival: bool
    ) -> None:
        """fixed: 0 to adapt. The others: see `Plan`."""
        self._fixed, self._most, self._costs = fixed, most, costs
        self._num_slots, self._verifies, self._by_arrival = num_slots, verifies, by_arrival
        self._factor = 1.0
        self._num_runs, self._next_look, self._wait = 0, _FIRST_LOOK, _LEAST_WAIT
        self._lengths: list[tuple[int, ...]] = []  # of the completions of each group that was returned lately
        self._num_prompt_tokens = 0.0  # of a group
        self._num_changes, self._num_kept = _PRIOR_CHANGES, _PRIOR_TOKENS  # of the tokens given back, of late
        self._spent = self._lost = 0.0  # by all runs, had they been synchronous; the ledger
        self._affordable = 0.0  # what the ledger has to be able to hold before the next try

    @property
    def factor(self) -> float:
        """Groups in flight for each group of a round."""
        return self._fixed or self._factor

    def observe(self, counts: RunCounts, lengths: Sequence[Sequence[int]], num_prompt_tokens: int) -> None:
        """Take a run: what it did; the lengths of the completions of each group that it returned; their prompts."""
        if self._fixed:
            return
        self._num_runs += 1
        longest, num_tokens = max(map(max, lengths)), sum(map(sum, lengths))
        self._lengths = [*self._lengths, *map(tuple, lengths)][-_REMEMBERED_RUNS * len(lengths) :]
        self._num_prompt_tokens = num_prompt_tokens / len(lengths)
        if counts.num_tokens_resumed:
            self._num_changes = _MEMORY * self._num_changes + counts.num_drafts_cut
            self._num_kept = _MEMORY * self._num_kept + counts.num_tokens_resumed - counts.num_tokens_cut
        self._spent += self._costs.step * longest + num_tokens
        self._lost = max(0.0, self._lost - saved_tokens(counts, longest, self._costs))
        if self._lost > self._bound():
            self._affordable = 2 * self._lost
            self._go(1.0)
        elif self._num_runs >= self._next_look and self._affordable <= self._bound():
            self._go(self._best(len(lengths)))

    def _bound(self) -> float:
        """Return what the ledger may hold."""
        return _LOST_SHARE * self._spent + _LOST_ROUNDS * self._spent / self._num_runs

    def _best(self, num_groups: int) -> float:
        """Return where to go: towards the factor that is the cheapest by the forecast, up by one rung at most."""
        now, lengths = self._factor, self._lengths
        rounds = [lengths[at : at + num_groups] for at in range(0, len(lengths), num_groups)]
        slot_steps = sum(max(map(max, part)) * sum(map(len, part)) for part in rounds)
        if self._most == 1 or 1 - sum(map(sum, lengths)) / slot_steps < _LEAST_TAIL:
            return 1.0
        rungs = [1.0, *(rung for rung in _LADDER if rung < self._most), self._most]
        higher = min((rung for rung in rungs if rung > now), default=now)
        costs = {one: self._forecast(one, num_groups) for one in {*rungs, now}}
        best = min(costs, key=lambda one: costs[one])
        if costs[best] > (1 - _LEAST_GAIN) * costs[1.0]:
            return 1.0
        return now if costs[best] > (1 - _HYSTERESIS) * costs[now] else min(best, higher)

    def _forecast(self, factor: float, num_groups: int) -> float:
        num_in_flight = math.ceil(factor * num_groups)
        plan = Plan(num_groups, num_in_flight, self._num_slots, self._verifies, self._by_arrival)
        change_rate = self._num_changes / (self._num_kept + self._num_changes)
        return forecast(self._lengths, self._num_prompt_tokens, change_rate, plan, self._costs)

    def _go(self, factor: float) -> None:
        """Take a factor. Where it is a higher one, look again soon: above 1 when something has been verified."""
        self._wait = _LEAST_WAIT if factor != self._factor else min(2 * self._wait, _MOST_WAIT)
        soon = 1 if self._factor > 1 else 2
        self._next_look = self._num_runs + (soon if factor > self._factor else self._wait)
        self._factor = factor

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes, for MessagePack."""
        return {
            "factor": self._factor, "num_runs": self._num_runs, "next_look": self._next_look, "wait": self._wait,
            "lengths": [pack_ids(group) for group in self._lengths], "num_prompt_tokens": self._num_prompt_tokens,
            "num_changes": self._num_changes, "num_kept": self._num_kept,
            "spent": self._spent, "lost": self._lost, "affordable": self._affordable,
        }  # fmt: skip

    def load_state(self, plain: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, within this maximum."""
        self._factor = min(plain["factor"], self._most)
        self._num_runs, self._next_look, self._wait = plain["num_runs"], plain["next_look"], plain["wait"]
        self._lengths = [unpack_ids(group) for group in plain["lengths"]]
        self._num_prompt_tokens = plain["num_prompt_tokens"]
        self._num_changes, self._num_kept = plain["num_changes"], plain["num_kept"]
        self._spent, self._lost, self._affordable = plain["spent"], plain["lost"], plain["affordable"]
