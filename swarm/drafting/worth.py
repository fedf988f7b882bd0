"""When a drafted token is worth its place: what one more row of a pass costs, and what a token takes now.

A token that is right with chance c saves c times what a token takes, and costs what one row more takes in the pass
that verifies it. At small batches a pass reads all weights whatever it computes, and even unlikely tokens are worth
verifying; at larger ones only likely ones are. Both are measured, for each bucket of running batch size.
"""

from dataclasses import dataclass

from swarm.drafting.tuner import bucket_of

__all__ = ["UNKNOWN", "PassCosts", "Worth"]

_MEMORY_STEPS = 96.0
_LEAST_SPREAD = 0.5  # standard deviation of the rows of a pass, from which on a line through them says something
_BOUNDS = 0.03, 0.6
_OUTLIER = 4.0  # times the mean; a pass that took longer was not alone on the machine


@dataclass(frozen=True, slots=True)
class Worth:
    """What drafters are told of it."""

    least_chance: float = 0.15  # of being right, for a token to be worth verifying
    token_s: float = 0.0  # seconds that a token takes now, of all sequences together; 0: not known


UNKNOWN = Worth()


@dataclass(slots=True)
class _Line:
    """Sums over passes, forgotten exponentially."""

    weight: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_rows: float = 0.0
    rows_seconds: float = 0.0
    step_s: float = 0.0
    num_tokens: float = 0.0

    def add(self, num_rows: int, pass_s: float, step_s: float, num_tokens: int) -> None:
        if self.weight >= 1 and pass_s * self.weight > _OUTLIER * self.seconds:
            return
        keep = 1 - 1 / _MEMORY_STEPS
        self.weight = keep * self.weight + 1
        self.rows = keep * self.rows + num_rows
        self.seconds = keep * self.seconds + pass_s
        self.rows_rows = keep * self.rows_rows + num_rows * num_rows
        self.rows_seconds = keep * self.rows_seconds + num_rows * pass_s
        self.step_s = keep * self.step_s + step_s
        self.num_tokens = keep * self.num_tokens + num_tokens

    def worth(self) -> Worth:
        spread = self.weight * self.rows_rows - self.rows * self.rows
        if spread < (_LEAST_SPREAD * self.weight) ** 2 or not self.num_tokens or not self.step_s:
            return UNKNOWN
        row_s = (self.weight * self.rows_seconds - self.rows * self.seconds) / spread
        token_s = self.step_s / self.num_tokens
        return Worth(min(max(row_s / token_s, _BOUNDS[0]), _BOUNDS[1]), token_s)


class PassCosts:
    """Learns from every step. Holds no clock."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    def observe(self, num_running: int, num_rows: int, pass_s: float, step_s: float, num_tokens: int) -> None:
        """Take a step of so many sequences.

        num_rows: tokens of its pass. pass_s: seconds without drafting. step_s: with it. num_tokens: gained by all.
        """
        self._lines.setdefault(bucket_of(num_running), _Line()).add(num_rows, pass_s, step_s, num_tokens)

    def worth(self, num_running: int) -> Worth:
        """Return what holds for the next step of so many sequences."""
        line = self._lines.get(bucket_of(num_running))
        return UNKNOWN if line is None else line.worth()
