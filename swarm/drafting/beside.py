"""Work beside the engine, on cores that it leaves idle, as long as that does not slow it: `Beside`.

Cores are not all that two threads share: memory, caches and the interpreter's lock are others. So it is measured. Spans
of the engine's work are timed with and without the other work; where they take longer with it, it stays away, each time
for twice as long.
"""

__all__ = ["Beside"]

_LEAST_SPANS = 4  # of each kind, before means are compared
_CLEARLY = 1.25  # times as long: so much is seen at once
_SIGMAS = 2.0  # by which a difference is no chance
_MEMORY_SPANS = 16.0  # a mean is over about so many
_ALONE_EVERY = 6  # spans, while the other work goes on
_TOLERANCE = 0.02  # by which spans may take longer, beside what they differ by anyway
_WAIT_SPANS, _MAX_WAIT_SPANS = 16, 1024


class _Mean:
    """A mean that forgets, and how far values are from it."""

    def __init__(self) -> None:
        self.num, self.value, self._variance = 0, 0.0, 0.0

    def add(self, value: float) -> None:
        self.num += 1
        share = max(1.0 / self.num, 1.0 / _MEMORY_SPANS)
        off = value - self.value
        self.value += share * off
        self._variance = (1 - share) * (self._variance + share * off * off)

    @property
    def spread(self) -> float:
        """The standard deviation of values."""
        return float(self._variance**0.5)

    @property
    def error(self) -> float:
        """The mean's standard error."""
        return self.spread / min(self.num, _MEMORY_SPANS) ** 0.5 if self.num else 0.0


class Beside:
    """Says before each span of the engine's work whether there may be other work beside it, and learns from it."""

    def __init__(self) -> None:
        self._with, self._alone = _Mean(), _Mean()  # seconds a token
        self._num_spans = 0
        self._wait_spans = _WAIT_SPANS
        self._away_until = 0

    def begin(self) -> bool:
        """A span begins. Returns whether there may be other work beside it."""
        self._num_spans += 1
        if self._num_spans <= self._away_until:
            return False
        if self._alone.num < _LEAST_SPANS:
            return False
        return self._with.num < _LEAST_SPANS or self._num_spans % _ALONE_EVERY != 0

    def end(self, was_beside: bool, num_tokens: int, elapsed_s: float) -> None:
        """The span has ended, with so many tokens written."""
        if num_tokens == 0:
            return
        (self._with if was_beside else self._alone).add(elapsed_s / num_tokens)
        if not was_beside:
            return
        if self._with.num < _LEAST_SPANS:
            is_slower = self._with.value > _CLEARLY * self._alone.value + _SIGMAS * self._alone.spread
        else:
            error = (self._with.error**2 + self._alone.error**2) ** 0.5
            is_slower = self._with.value > (1 + _TOLERANCE) * self._alone.value + _SIGMAS * error
        if is_slower:
            self._away_until = self._num_spans + self._wait_spans
            self._wait_spans = min(_MAX_WAIT_SPANS, 2 * self._wait_spans)
            self._with = _Mean()
