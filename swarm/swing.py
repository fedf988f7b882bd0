"""How far a node's own reward lies below what it was lately: what `sapo.swing_damping` goes by. Pure."""

from collections import deque
from typing import Final

__all__ = ["Swing"]

_WINDOW_ROUNDS: Final = 100


class Swing:
    """The fall of a moving average below its best."""

    def __init__(self, window_rounds: int = _WINDOW_ROUNDS) -> None:
        self._averages: deque[float] = deque(maxlen=window_rounds)

    def add(self, average: float) -> None:
        """Take the moving average of own reward after a round."""
        self._averages.append(average)

    @property
    def value(self) -> float:
        """How far the newest average lies below the best in the window, as a share of that best: in [0, 1]."""
        best = max(self._averages, default=0.0)
        return (best - self._averages[-1]) / best if best > 0 else 0.0
