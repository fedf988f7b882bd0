"""How many groups are in flight: as many as pay, found out while running.

Writing ahead saves steps: a round needs fewer than its longest completion has tokens. It costs verification: what was
written ahead is prefilled again under the next policy, and what that cuts is written again. Both are counted in tokens
of decoding, so that the decision is a function of what was written and not of the machine's clock; what a step costs
beside its tokens is the engine's `step_cost_tokens`.

The factor begins at 1. Where rounds have a tail it is tried a step higher, for a few rounds at a time, and goes to
the best of the factors that were tried lately. Where nothing above 1 pays, it stays at 1 for ever longer times: then
a round is a synchronous one, and costs nothing more. Where completions are of one length it is never tried. A cache
that is full needs no rule of its own: no slot is idle then, what is to be written ahead waits without a cache, and
no steps are saved.
"""

from collections.abc import Mapping
from typing import Any

from swarm.rollout.scheduler import RunCounts

__all__ = ["OverProvision", "saved_tokens"]

_STEP = 0.5
_WINDOW_RUNS = 4  # at one factor, before it is judged
_REMEMBERED_WINDOWS = 12
_LEAST_TAIL = 0.3  # share of a synchronous round's slot steps that its tail leaves idle
_LEAST_WAIT, _MOST_WAIT = 4, 64  # runs at 1 before the next try
_PREFILL_COST = 0.5  # of a token that is prefilled and verified, against one that is decoded
_TAIL_WEIGHT = 0.25  # of the newest run in the moving average of tails


def saved_tokens(counts: RunCounts, longest: int, step_cost_tokens: float) -> float:
    """Return what a run saved against a synchronous one, in tokens of decoding. longest: completion it returned."""
    prefilled = counts.num_tokens_resumed + counts.num_prompt_tokens_resumed
    cost = counts.num_tokens_cut + _PREFILL_COST * prefilled
    return step_cost_tokens * (longest - counts.num_steps) - cost


class OverProvision:
    """Chooses the factor between 1 and a maximum; a fixed one stays."""

    def __init__(self, fixed: float, most: float, step_cost_tokens: float) -> None:
        """fixed: 0 to adapt."""
        self._fixed, self._most, self._step_cost = fixed, most, step_cost_tokens
        self._factor = 1.0
        self._num_runs = 0  # at this factor
        self._saved = 0.0  # in these
        self._tail = 0.0
        self._wait, self._backoff = 0, _LEAST_WAIT
        self._num_windows = 0
        self._found: dict[float, tuple[float, int]] = {}  # factor -> what a run saved, and in which window

    @property
    def factor(self) -> float:
        """Groups in flight for each group of a round."""
        return self._fixed or self._factor

    def observe(self, counts: RunCounts, num_completions: int, num_tokens: int, longest: int) -> None:
        """Take a run: what it did, and what it returned."""
        tail = 1 - num_tokens / (num_completions * longest)
        self._tail += (tail - self._tail) * (_TAIL_WEIGHT if self._num_runs or self._num_windows else 1.0)
        self._num_runs += 1
        if self._factor == 1.0:
            self._wait -= 1
            if self._wait < 0 and self._tail >= _LEAST_TAIL and self._most > 1:
                self._go(min(self._most, 1.0 + _STEP))
            return
        if self._num_runs == 1:
            return  # the first run at a factor begins more than it finishes
        self._saved += saved_tokens(counts, longest, self._step_cost)
        if self._num_runs > _WINDOW_RUNS:
            self._judge()

    def _judge(self) -> None:
        """Go up while that has not been tried and this pays, else to the best."""
        self._num_windows += 1
        self._found[self._factor] = self._saved / _WINDOW_RUNS, self._num_windows
        recent = {
            factor: saved for factor, (saved, window) in self._found.items()
            if self._num_windows - window < _REMEMBERED_WINDOWS
        }  # fmt: skip
        higher = min(self._most, self._factor + _STEP)
        if recent[self._factor] > 0 and higher not in recent:
            self._go(higher)
            return
        best = max(recent, key=lambda factor: recent[factor])
        if recent[best] > 0:
            self._backoff = _LEAST_WAIT
            self._go(best)
            return
        self._found.clear()
        self._wait = self._backoff
        self._backoff = min(_MOST_WAIT, 2 * self._backoff)
        self._go(1.0)

    def _go(self, factor: float) -> None:
        self._num_runs = 0 if factor != self._factor else 1
        self._factor, self._saved = factor, 0.0

    def state(self) -> dict[str, Any]:
        """Return what `load_state` takes, for MessagePack."""
        found = [[factor, saved, window] for factor, (saved, window) in self._found.items()]
        return {
            "factor": self._factor, "num_runs": self._num_runs, "saved": self._saved, "tail": self._tail,
            "wait": self._wait, "backoff": self._backoff, "num_windows": self._num_windows, "found": found,
        }  # fmt: skip

    def load_state(self, plain: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, within this maximum."""
        self._factor = min(plain["factor"], self._most)
        self._num_runs, self._saved, self._tail = plain["num_runs"], plain["saved"], plain["tail"]
        self._wait, self._backoff, self._num_windows = plain["wait"], plain["backoff"], plain["num_windows"]
        self._found = {factor: (saved, window) for factor, saved, window in plain["found"]}
