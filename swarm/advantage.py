"""Group-relative advantages: how much better a completion is than its siblings.

Departures from GRPO (arXiv 2402.03300, section 4.1): the standard deviation is that of the group itself
(divided by L, not L - 1), no epsilon is added to it, and a group whose rewards hardly spread has advantage
exactly zero, because rounding noise divided by a tiny deviation is a large and meaningless advantage.
"""

import math
from collections.abc import Sequence

from swarm.config import SapoConfig

__all__ = ["group_advantages"]


def group_advantages(rewards: Sequence[float], config: SapoConfig) -> tuple[float, ...]:
    """Return one advantage per completion of a group.

    All are exactly 0.0 where the rewards are equal or their standard deviation is below the floor.
    Raises ValueError for a reward that is not finite.
    """
    if not all(math.isfinite(reward) for reward in rewards):
        raise ValueError(f"rewards must be finite, not {list(rewards)}")
    if not rewards or min(rewards) == max(rewards):
        return (0.0,) * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    spread = math.sqrt(math.fsum(value * value for value in centred) / len(centred))
    if spread < config.min_reward_spread or spread == 0.0:
        return (0.0,) * len(rewards)
    if config.advantage == "group_mean":
        return tuple(centred)
    return tuple(value / spread for value in centred)
