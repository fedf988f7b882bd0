"""The node's view of the swarm: give own groups away, get groups of others.

Exchange        what the loop of a round knows
SiloExchange    nobody is there
(`node.swarm_exchange` has the one with peers)
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from swarm.types import RolloutGroup

if TYPE_CHECKING:
    from node.parts import Parts

__all__ = ["Exchange", "SiloExchange"]


class Exchange(ABC):
    """Shares scored groups with peers. No method waits for a peer."""

    @abstractmethod
    async def start(self) -> None:
        """Begin to look for peers, before anything else is loaded. Raises an error of `protocol` where it cannot."""

    @abstractmethod
    def attach(self, parts: "Parts") -> None:
        """Judge from now on what peers wrote, with what this node has loaded. Called once, after `start`."""

    @abstractmethod
    async def wait_ready(self) -> None:
        """Return when what peers wrote can be judged: this waits for processes of the node's own, and for no peer."""

    @abstractmethod
    async def wait_failed(self) -> None:
        """Return never; raise what has killed a background task."""

    @abstractmethod
    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Offer the node's own groups of one round to the swarm."""

    @abstractmethod
    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Return at most `num_groups` groups of peers, scored by this node; fewer where fewer are there."""

    @abstractmethod
    async def fill(self, num_groups: int) -> list[RolloutGroup]:
        """Return the same in the middle of a round, of those that the next one can do without."""

    @abstractmethod
    def describe_round(self) -> dict[str, Any]:
        """Return what has crossed the wire since the last call, for the round's row of metrics."""

    @abstractmethod
    def status(self) -> dict[str, Any] | None:
        """Return where the node stands in its swarm, as plain data; None where it is in none."""

    @abstractmethod
    async def close(self) -> None:
        """Leave the swarm."""


class SiloExchange(Exchange):
    """An exchange that has no peers."""

    async def start(self) -> None:
        """Nothing: nobody is there."""

    def attach(self, parts: "Parts") -> None:
        """Nothing: there is nothing to judge."""

    async def wait_ready(self) -> None:
        """Return at once: there is nothing to judge."""

    async def wait_failed(self) -> None:
        """Wait for what cannot happen."""
        await asyncio.Event().wait()

    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Keep them: nobody is there."""

    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Return nothing: nobody is there."""
        return []

    async def fill(self, num_groups: int) -> list[RolloutGroup]:
        """Return nothing: nobody is there."""
        return []

    def describe_round(self) -> dict[str, Any]:
        """Return zeros."""
        return {"num_admitted": 0, "num_refused": {}, "bytes_in": 0, "bytes_out": 0, "num_peers": 0}

    def status(self) -> dict[str, Any] | None:
        """Return nothing: there is no swarm."""
        return None

    async def close(self) -> None:
        """Leave nothing."""
