"""What torchrun says of this process: which of those it is that are one node together.

    torchrun --nproc-per-node 2 --no-python swarm-node silo

The first process is the node. The others train with it (`node.ranks`), say nothing, and end with it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swarm.errors import UserError

if TYPE_CHECKING:
    from node.config import RunConfig

__all__ = ["Launch", "LaunchError", "launch"]


class LaunchError(UserError):
    """The processes that torchrun has started cannot be one node."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Which process this is, of how many."""

    rank: int
    num_ranks: int
    num_here: int  # on this machine

    @property
    def is_shared(self) -> bool:
        """Whether the node consists of several processes."""
        return self.num_ranks > 1

    @property
    def follows(self) -> bool:
        """Whether another process is the node."""
        return self.rank > 0

    def check(self, config: "RunConfig") -> None:
        """Raise LaunchError where the settings cannot be followed by several processes."""
        if not self.is_shared:
            return
        if self.num_here != self.num_ranks:
            raise LaunchError("a node is on one machine: start torchrun with --nnodes 1, and one node on each machine")
        if config.model.device not in ("auto", "cpu", "cuda"):
            raise LaunchError(
                f"model.device={config.model.device} is for one process: set auto, each process then takes a GPU"
            )
        if config.engine.speculation in ("auto", "head"):
            raise LaunchError(
                f"engine.speculation={config.engine.speculation} learns a drafter, which one process does: "
                "set suffix, ngram or off under torchrun"
            )

    def device(self, wanted: str, num_gpus: int) -> str:
        """Return this process's device. Raises LaunchError where there are GPUs, and too few."""
        if wanted == "cpu" or not num_gpus:
            return "cpu" if wanted == "auto" else wanted
        if num_gpus < self.num_here:
            raise LaunchError(
                f"torchrun starts {self.num_here} processes, and torch sees {num_gpus} GPUs: "
                f"--nproc-per-node {num_gpus}, or --set model.device=cpu"
            )
        return f"cuda:{self.rank}"


def launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the environment. Only torchrun's counts: other launchers leave names like its own in containers."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return Launch(0, 1, 1)
    return Launch(*(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
