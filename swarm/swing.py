"""How far a node lies below what it could do lately: what `sapo.swing_damping` goes by. Pure."""

from collections import deque

__all__ = ["Swing"]


class Swing:
    """The fall of a curve below its best: of held-out pass@1, or of a moving average of own reward."""

    def __init__(self, window: int) -> None:
        """The best is that of the last `window` values."""
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> None:
        """Take the newest value of the curve."""
        self._values.append(value)

    @property
    def value(self) -> float:
        """How far the newest value lies below the best in the window, as a share of that best: in [0, 1]."""
        best = max(self._values, default=0.0)
        return (best - self._values[-1]) / best if best > 0 else 0.0
