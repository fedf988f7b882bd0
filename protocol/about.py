"""What a node says of itself in its record, beside what its identity and its transport say."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["NO_MODEL", "NodeAbout"]

NO_MODEL = "none"  # the label of who has no policy: a bootstrap, a crawler


@dataclass(frozen=True, slots=True)
class NodeAbout:
    """The part of a node record that the process knows. Shown to people, and a bridge asks trainers alone for news."""

    role: Literal["trainer", "bootstrap"]
    software: str  # e.g. "swarm-node/0.2.0"
    model: str  # label of the policy, or NO_MODEL
    tasks: tuple[str, ...]  # sources that it trains on; those that do not fit are left out
    rollouts_per_minute: int = 0  # completions that it published in the last minutes
