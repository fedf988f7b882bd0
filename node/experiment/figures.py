"""The figures of an experiment: reward per round, held-out pass@1, cumulative reward; bands over nodes and seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from node.experiment.record import UnitRecord

__all__ = ["draw", "smoothed"]

_BAND: Final = (0.1, 0.9)  # of nodes and seeds
_WINDOWS: Final = 30  # of the smoothing, in a run
Curves = "np.ndarray[Any, np.dtype[np.float64]]"


def draw(folder: Path, summary: dict[str, Any], results: dict[str, list[UnitRecord]]) -> None:
    """Write reward.png, heldout.png and cumulative.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    about = f"{summary['nodes']} nodes, {summary['rounds']} rounds"
    _draw_rewards(folder / "reward.png", about, results)
    if any(node.heldout for units in results.values() for unit in units for node in unit.nodes):
        _draw_heldout(folder / "heldout.png", about, results)
    _draw_cumulative(folder / "cumulative.png", about, summary)


def smoothed(values: Sequence[float], window: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Return the mean of each value and of as many on both sides as there are, up to half the window."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _draw_rewards(path: Path, about: str, results: dict[str, list[UnitRecord]]) -> None:
    figure, axes = _axes()
    for number, (name, units) in enumerate(results.items()):
        nodes = [node.columns["reward_mean"] for unit in units for node in unit.nodes]
        length = min(map(len, nodes))
        window = max(1, length // _WINDOWS)
        curves = np.stack([smoothed(rewards[:length], window) for rewards in nodes])
        _line(axes, np.arange(1, length + 1), curves, f"C{number}", f"{name}")
    axes.set(xlabel="round", ylabel="own reward, smoothed", title=f"Own reward: {about}", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", title="own / external")
    _save(figure, path)


def _draw_heldout(path: Path, about: str, results: dict[str, list[UnitRecord]]) -> None:
    figure, axes = _axes()
    for number, (name, units) in enumerate(results.items()):
        nodes = [node.heldout for unit in units for node in unit.nodes if node.heldout]
        if not nodes:
            continue
        length = min(map(len, nodes))
        rounds = np.array([round_index for round_index, _ in nodes[0][:length]])
        curves = np.array([[value for _, value in heldout[:length]] for heldout in nodes])
        _line(axes, rounds, curves, f"C{number}", name, marker="o")
    axes.set(xlabel="round", ylabel="pass@1", title=f"Held-out pass@1: {about}", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", title="own / external")
    _save(figure, path)


def _draw_cumulative(path: Path, about: str, summary: dict[str, Any]) -> None:
    figure, axes = _axes()
    for number, arm in enumerate(summary["arms"]):
        found = arm["measures"]["reward_cumulative"]
        axes.bar(number, found["mean"], color=f"C{number}", alpha=0.75, width=0.65)
        if found["low"] is not None:
            error = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            axes.errorbar(number, found["mean"], yerr=error, color="black", capsize=5, linewidth=1.2)
        axes.scatter([number] * len(found["per_seed"]), found["per_seed"], color="black", s=10, alpha=0.5, zorder=3)
    axes.set_xticks(range(len(summary["arms"])), [arm["name"] for arm in summary["arms"]])
    axes.set(xlabel="own / external", ylabel="own reward, summed over rounds", title=f"Cumulative reward: {about}")
    _save(figure, path)


def _axes() -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Any, x: Any, curves: Any, color: str, label: str, **style: Any) -> None:
    """Draw the mean of curves and the band in which most of them are. curves: [num_curves, num_points]."""
    axes.plot(x, curves.mean(axis=0), color=color, linewidth=1.8, markersize=4, label=label, **style)
    if len(curves) > 1:
        low, high = np.quantile(curves, _BAND, axis=0)
        axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    plt.close(figure)
    beside.replace(path)
