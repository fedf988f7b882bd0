"""The node's view of the swarm: give own groups away, get groups of others.

The loop of a round knows only this contract. A node that learns alone has an exchange without peers.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from swarm.types import RolloutGroup

__all__ = ["Exchange", "SiloExchange"]


class Exchange(ABC):
    """Shares scored groups with peers. Neither method waits for a peer."""

    @abstractmethod
    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Offer the node's own groups of one round to the swarm."""

    @abstractmethod
    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Return at most `num_groups` groups of peers, scored by this node; fewer where fewer are there."""

    @abstractmethod
    async def close(self) -> None:
        """Leave the swarm."""


class SiloExchange(Exchange):
    """An exchange that has no peers."""

    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep them: nobody is there."""

    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Return nothing: nobody is there."""
        return []

    async def close(self) -> None:
        """Leave nothing."""
