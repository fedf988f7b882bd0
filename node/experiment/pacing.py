"""The pace of a node in virtual time, in which a round's work takes none: a round begins once its time has come."""

import asyncio
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from node.exchange import Exchange
from swarm.types import RolloutGroup

if TYPE_CHECKING:
    from node.parts import Parts

__all__ = ["PacedExchange"]


class PacedExchange(Exchange):
    """Lets a node's rounds begin `round_s` after one another, give or take a share of `jitter`.

    The first one begins anywhere in the first `round_s`, so that nodes are not in step. Everything else is the
    exchange within.
    """

    def __init__(self, exchange: Exchange, *, round_s: float, jitter: float, rng: random.Random) -> None:
        self._exchange, self._round_s, self._jitter, self._rng = exchange, round_s, jitter, rng
        self._next_s = rng.uniform(0.0, round_s)  # on the loop's clock

    async def start(self) -> None:
        """Begin to look for peers."""
        await self._exchange.start()

    def attach(self, parts: "Parts") -> None:
        """Judge from now on what peers wrote."""
        self._exchange.attach(parts)

    async def wait_ready(self) -> None:
        """Return when what peers wrote can be judged."""
        await self._exchange.wait_ready()

    async def wait_failed(self) -> None:
        """Return never; raise what has killed a background task."""
        await self._exchange.wait_failed()

    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Offer the node's own groups."""
        await self._exchange.publish(groups)

    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Wait until the next round may begin; return what is there then."""
        await asyncio.sleep(max(0.0, self._next_s - asyncio.get_running_loop().time()))
        self._next_s += self._round_s * (1.0 + self._jitter * self._rng.uniform(-1.0, 1.0))
        return await self._exchange.sample(num_groups)

    async def fill(self, num_groups: int) -> list[RolloutGroup]:
        """Return what is there now."""
        return await self._exchange.fill(num_groups)

    def describe_round(self) -> dict[str, Any]:
        """Return what has crossed the wire."""
        return self._exchange.describe_round()

    def status(self) -> dict[str, Any] | None:
        """Return where the node stands in its swarm."""
        return self._exchange.status()

    async def close(self) -> None:
        """Leave the swarm."""
        await self._exchange.close()
