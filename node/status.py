"""What a node is doing, as plain data with a version: for `swarm-node stats`, and for programs.

    training   the run: round, reward, how much of it comes from others; None for a bootstrap
    swarm      the member's status (`protocol.member`); None for a node that learns alone
    warnings   what a person should look at, in words

A field may be added under one `schema_version`; none changes its meaning or goes.
"""

import os
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from node.drafts_shown import drafts_of_rounds

if TYPE_CHECKING:
    from node.daemon import Node

__all__ = ["SCHEMA_VERSION", "build_status", "training_status", "warnings_of"]

SCHEMA_VERSION: Final = 1
_MANY_MISSING: Final = 0.5  # share of external groups that were missing, from which on it is worth a word
_MANY_REJECTED: Final = 0.2  # rejected things for every admitted group, likewise


def build_status(
    command: str, run_dir: str, began_at: float, training: dict[str, Any] | None, swarm: dict[str, Any] | None
) -> dict[str, Any]:
    """Put the parts together, as they are now. `began_at` is in unix seconds."""
    now = time.time()
    status = {
        "schema_version": SCHEMA_VERSION,
        "running": True,
        "taken_at": now,
        "uptime_s": now - began_at,
        "pid": os.getpid(),
        "software": f"swarm-node/{version('swarm-node')}",
        "command": command,
        "run_dir": run_dir,
        "training": training,
        "swarm": swarm,
    }
    return {**status, "warnings": warnings_of(training, swarm)}


def training_status(node: "Node", model: str, tasks: str) -> dict[str, Any]:
    """Return how far a run is, what its own completions earn, and what those of others do."""
    rows = list(node.rows)
    last = rows[-1] if rows else {}
    return {
        "model": model,
        "tasks": tasks,
        "round": node.recorder.last_round,
        "rounds": node.config.rounds,
        "phase": node.phase,
        "num_local_wanted": node.config.sapo.num_local,
        "num_external_wanted": node.config.sapo.num_external,
        "pass_at_1_heldout": node.pass_at_1_heldout,
        "num_window_rounds": len(rows),
        "reward_own_mean": _mean(rows, "reward_mean"),
        "reward_external_mean": _mean(rows, "reward_external_mean"),
        "external_share": _external_share(rows),
        "full_rounds_share": _full_rounds_share(rows),
        "rollouts": _rollouts(rows),
        "drafts": drafts_of_rounds(rows),
        "round_s": _mean(rows, "round_s"),
        "tokens_per_s": last.get("tokens_per_s"),
        "elapsed_s": last.get("elapsed_s", 0.0),
    }


def warnings_of(training: Mapping[str, Any] | None, swarm: Mapping[str, Any] | None) -> list[str]:
    """Say what a person should look at."""
    if swarm is None:
        return []
    found = list(swarm["warnings"])
    if training is not None and training["num_external_wanted"] and swarm["num_peers"]:
        full = training["full_rounds_share"]
        if full is not None and full < 1 - _MANY_MISSING:
            found.append(
                f"in {1 - full:.0%} of the last rounds groups from others were missing: there are too few peers, or "
                "they write fewer useful groups than this node wants (sapo.num_external)"
            )
    num_rejected = swarm["num_rejected"]
    if num_rejected > max(10, _MANY_REJECTED * swarm["groups_admitted"]):
        found.append(f"{num_rejected} things that no honest node sends were refused; `swarm-node peers` shows by whom")
    return found


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def _rollouts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Return what partial rollouts were in flight and what they saved; None where rollouts are synchronous."""
    partial = [row for row in rows if "num_groups_in_flight" in row]
    if not partial:
        return None
    means = {name: _mean(partial, name) for name in ("over_provision", "num_groups_in_flight", "num_groups_recycled")}
    return {
        **means,
        "staleness_mean": _mean(partial, "staleness_mean"),
        "staleness_max": max(row["staleness_max"] for row in partial),
        "num_tokens_cut": _mean(partial, "num_tokens_cut"),
        "saved_s": _mean(partial, "saved_s"),
    }


def _external_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    external = sum(row.get("num_external", 0) for row in rows)
    total = external + sum(row.get("num_local", 0) for row in rows)
    return external / total if total else None


def _full_rounds_share(rows: Sequence[Mapping[str, Any]]) -> float | None:
    full = [row["num_external_missing"] == 0 for row in rows if "num_external_missing" in row]
    return sum(full) / len(full) if full else None
