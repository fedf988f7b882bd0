"""A unit: the grain in which an experiment is run, interrupted and gone on with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from node.config import RunConfig

__all__ = ["Unit"]


@dataclass(frozen=True, slots=True)
class Unit:
    """All nodes of one arm under one seed. Everything that a unit comes to is a function of this."""

    arm: str
    slug: str  # the arm's name as a part of a file's name
    seed: int
    configs: tuple[RunConfig, ...]  # one for each node
    round_s: float  # virtual seconds from one round of a node to its next
    jitter: float  # share of `round_s` by which a round may come sooner or later
    latency_s: tuple[float, float]  # of a message: uniform between these

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.slug}-seed{self.seed}"

    @property
    def pace(self) -> dict[str, Any]:
        """Return how virtual time goes, as plain data."""
        return {"round_s": self.round_s, "jitter": self.jitter, "latency_s": list(self.latency_s)}

    def dump(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "arm": self.arm,
            "slug": self.slug,
            "seed": self.seed,
            "configs": [config.model_dump(mode="json") for config in self.configs],
            **self.pace,
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> "Unit":
        """Return what `dump` was taken of."""
        low, high = data["latency_s"]
        configs = tuple(RunConfig.model_validate(config) for config in data["configs"])
        return cls(**{**data, "configs": configs, "latency_s": (low, high)})
