"""Rewards from sandboxed processes.

    pool      answers to processes, results to rewards, the dead replaced
    worker    the parent's side of one process
    child     what runs in it
    sandbox   the layers around it: seccomp, landlock, audit, rlimits

A scoring process imports this package too: what needs more than the standard library is imported on use.
"""

from typing import TYPE_CHECKING, Any

from swarm.scoring.sandbox import sandbox_layers

if TYPE_CHECKING:
    from swarm.scoring.pool import Outcome, Score, ScoringPool

__all__ = ["Outcome", "Score", "ScoringPool", "sandbox_layers"]


def __getattr__(name: str) -> Any:
    if name in ("Outcome", "Score", "ScoringPool"):
        from swarm.scoring import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
