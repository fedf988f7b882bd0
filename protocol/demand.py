"""How many groups a node keeps ready: as many as it uses while others are on their way.

From the moment that a group is lacking until it can be used there are an announcement, a pull and a verifier between.
A node with slow rounds needs no more than a round or two of groups; one with many rounds a second would find its pool
empty, however many there are to be had (Little's law). Pure data; times are unix seconds.
"""

import math

__all__ = ["Demand"]

LEAD_S = 3.0  # of use that the reserve covers
HALF_LIFE_S = 5.0
MAX_RESERVE_FACTOR = 16  # of the reserve that is set: what a burst of use may raise it to


class Demand:
    """The reserve, from what was asked for lately."""

    def __init__(self, min_reserve: int) -> None:
        self.min_reserve, self.max_reserve = min_reserve, MAX_RESERVE_FACTOR * min_reserve
        self._asked, self._at_s = 0.0, 0.0  # faded to that time

    def asked(self, num_groups: int, now_s: float) -> None:
        """Note groups that the node wanted, whether they were there or not."""
        self._asked, self._at_s = self._faded(now_s) + num_groups, max(now_s, self._at_s)

    def reserve(self, now_s: float) -> int:
        """How many groups are to be ready."""
        per_s = self._faded(now_s) * math.log(2) / HALF_LIFE_S
        return max(self.min_reserve, min(self.max_reserve, math.ceil(LEAD_S * per_s)))

    def _faded(self, now_s: float) -> float:
        return float(self._asked * 0.5 ** (max(0.0, now_s - self._at_s) / HALF_LIFE_S))
