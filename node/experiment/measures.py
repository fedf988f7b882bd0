"""What is measured of a unit, each as one number, and intervals over seeds. docs/sapo.md defines them."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from node.experiment.record import NodeRecord, UnitRecord

__all__ = ["MEASURES", "Interval", "bootstrap", "cumulative_reward", "measure", "oscillation", "paired"]

NUM_RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
FIRST_FULL_ROUND: Final = 4  # before it nodes are still finding each other
Interval = dict[str, Any]


def cumulative_reward(node: NodeRecord) -> float:
    """Mean reward of own completions, summed over rounds."""
    return float(sum(node.columns["reward_mean"]))


def heldout_after(node: NodeRecord) -> float | None:
    """Held-out pass@1 at the last evaluation."""
    return node.heldout[-1][1] if node.heldout and node.heldout[-1][0] > 0 else None


def heldout_mean(node: NodeRecord) -> float | None:
    """Held-out pass@1 on average over the evaluations after training began."""
    later = [value for round_index, value in node.heldout if round_index > 0]
    return statistics.fmean(later) if later else None


def oscillation(curve: Sequence[float]) -> float:
    """Return how far a curve lies below the best that it had reached, on average, as a share of its best.

    0 for one that never falls; 0.1 for one that is on average a tenth of its best below what it could do before.
    """
    best = max(curve, default=0.0)
    if best <= 0:
        return 0.0
    so_far = np.maximum.accumulate(np.asarray(curve, dtype=float))
    return float((so_far - np.asarray(curve)).mean() / best)


def _heldout_oscillation(node: NodeRecord) -> float | None:
    return oscillation([value for _, value in node.heldout]) if len(node.heldout) > 1 else None


def _mean(measure: Callable[[NodeRecord], float | None]) -> Callable[[UnitRecord], float | None]:
    return lambda unit: _over_nodes(unit, measure, statistics.fmean)


def _over_nodes(
    unit: UnitRecord, measure: Callable[[NodeRecord], float | None], combine: Callable[[list[float]], float]
) -> float | None:
    values = [value for node in unit.nodes if (value := measure(node)) is not None]
    return combine(values) if values else None


def _sum(column: str, first_round: int = 1) -> Callable[[UnitRecord], float]:
    return lambda unit: float(sum(sum(node.columns[column][first_round - 1 :]) for node in unit.nodes))


def _share(part: str, *whole: str, first_round: int = 1) -> Callable[[UnitRecord], float | None]:
    """Return the share of one column's sum in the sum of others; None where there is nothing to share."""

    def share(unit: UnitRecord) -> float | None:
        total = sum(_sum(column, first_round)(unit) for column in whole)
        return _sum(part, first_round)(unit) / total if total else None

    return share


MEASURES: Final[Mapping[str, Callable[[UnitRecord], float | None]]] = {
    "reward_cumulative": _mean(cumulative_reward),
    "heldout_after": _mean(heldout_after),
    "heldout_after_least": lambda unit: _over_nodes(unit, heldout_after, min),
    "heldout_after_most": lambda unit: _over_nodes(unit, heldout_after, max),
    "heldout_mean": _mean(heldout_mean),
    "oscillation": _mean(_heldout_oscillation),
    "num_tokens_generated": _sum("num_tokens_generated"),
    "num_completions": _sum("num_completions"),
    "zero_advantage_share": _share("num_groups_zero_advantage", "num_groups"),
    "external_missing_share": _share(
        "num_external_missing", "num_external_missing", "num_external", first_round=FIRST_FULL_ROUND
    ),
    "cpu_s": lambda unit: unit.cpu_s,
    "wall_s": lambda unit: unit.wall_s,
}


def measure(unit: UnitRecord) -> dict[str, float | None]:
    """Return every measure of a unit; None where there is nothing to measure."""
    return {name: of(unit) for name, of in MEASURES.items()}


def bootstrap(values: Sequence[float]) -> Interval:
    """Return the mean over seeds with its percentile bootstrap interval; one seed has no interval."""
    means = np.asarray(values, dtype=float)[_resamples(len(values))].mean(axis=1)
    return {"mean": statistics.fmean(values), **_bounds(means, len(values)), "per_seed": list(values)}


def paired(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Interval]:
    """Return difference and ratio of the means of two arms over the same seeds, resampled together."""
    ours, theirs = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    index, num_seeds = _resamples(len(ours)), len(ours)
    differences = (ours - theirs)[index].mean(axis=1)
    found = {
        "difference": {
            "mean": float((ours - theirs).mean()),
            **_bounds(differences, num_seeds),
            "per_seed": (ours - theirs).tolist(),
        }
    }
    if (theirs > 0).all():
        ratios = ours[index].mean(axis=1) / theirs[index].mean(axis=1)
        per_seed = (ours / theirs).tolist()
        found["ratio"] = {
            "mean": float(ours.mean() / theirs.mean()),
            **_bounds(ratios, num_seeds),
            "per_seed": per_seed,
        }
    return found


def _resamples(num_seeds: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return which seeds each resample has: the same for every arm, so that arms stay paired."""
    return np.random.default_rng(0).integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))


def _bounds(resampled: "np.ndarray[Any, np.dtype[np.float64]]", num_seeds: int) -> dict[str, float | None]:
    if num_seeds < 2:
        return {"low": None, "high": None}
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"low": float(low), "high": float(high)}
