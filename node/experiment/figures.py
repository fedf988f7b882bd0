"""The figures of an experiment: rewards, held-out pass@1, cumulative reward, and what each kind of node can do.

Bands are over nodes and seeds.
"""

import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from node.experiment.record import UnitRecord

__all__ = ["draw", "smoothed"]

_BAND: Final = (0.1, 0.9)  # of nodes and seeds
_WINDOWS: Final = 12  # of the smoothing, in a run
_MAX_BANDS: Final = 6  # with more arms, bands hide each other
Curves = "np.ndarray[Any, np.dtype[np.float64]]"


def draw(
    folder: Path, summary: dict[str, Any], results: dict[str, list[UnitRecord]], curves_of: Collection[str] = ()
) -> None:
    """Write reward.png, heldout.png and cumulative.png; where nodes of different models were evaluated, skills.png.

    `curves_of` are the arms whose curves are drawn over the rounds; empty: all.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    about = f"{summary['nodes']} nodes, {summary['rounds']} rounds"
    shown = {name: units for name, units in results.items() if not curves_of or name in curves_of}
    _draw_rewards(folder / "reward.png", about, shown)
    if any(node.heldout for units in shown.values() for unit in units for node in unit.nodes):
        _draw_heldout(folder / "heldout.png", about, shown)
    _draw_cumulative(folder / "cumulative.png", about, summary)
    nodes = [node for arm in summary["arms"] for node in arm["nodes"]]
    if len({node["model"] for node in nodes}) > 1 and any(node["heldout_after_by_source"] for node in nodes):
        _draw_skills(folder / "skills.png", about, summary)


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
        _line(axes, np.arange(1, length + 1), curves, number, name, with_band=len(results) <= _MAX_BANDS)
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
        _line(axes, rounds, curves, number, name, with_band=len(results) <= _MAX_BANDS, marker="o")
    axes.set(xlabel="round", ylabel="pass@1", title=f"Held-out pass@1: {about}", ylim=(0, None))
    axes.legend(frameon=False, loc="upper left", title="own / external")
    _save(figure, path)


def _draw_cumulative(path: Path, about: str, summary: dict[str, Any]) -> None:
    arms = summary["arms"]
    figure, axes = _axes(height=max(2.4, 1.2 + 0.42 * len(arms)))
    for number, arm in enumerate(arms):
        found = arm["measures"]["reward_cumulative"]
        axes.barh(number, found["mean"], color=f"C{number % 10}", alpha=0.75, height=0.65)
        if found["low"] is not None:
            error = [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]
            axes.errorbar(found["mean"], number, xerr=error, color="black", capsize=4, linewidth=1.2)
        axes.scatter(found["per_seed"], [number] * len(found["per_seed"]), color="black", s=10, alpha=0.5, zorder=3)
    axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    axes.invert_yaxis()
    axes.set(xlabel="own reward, summed over rounds", title=f"Cumulative reward: {about}")
    _save(figure, path)


def _draw_skills(path: Path, about: str, summary: dict[str, Any]) -> None:
    """For each task a panel: what nodes of each model could do before, and can do after under each arm."""
    from matplotlib import pyplot as plt

    arms = summary["arms"]
    sources = sorted({source for arm in arms for node in arm["nodes"] for source in node["heldout_after_by_source"]})
    models = list(dict.fromkeys(node["model"] for node in arms[0]["nodes"]))
    figure, panels = plt.subplots(1, len(sources), figsize=(8, 4), dpi=150, sharey=True, squeeze=False)
    for axes, source in zip(panels[0], sources, strict=True):
        bars = [("before", "heldout_before_by_source", arms[0])]
        bars += [(f"after {arm['name']}", "heldout_after_by_source", arm) for arm in arms]
        width = 0.8 / len(bars)
        for number, (label, key, arm) in enumerate(bars):
            heights = [_mean_of_model(arm, key, source, model) for model in models]
            places = np.arange(len(models)) + (number - (len(bars) - 1) / 2) * width
            axes.bar(places, heights, width, color="0.6" if number == 0 else f"C{(number - 1) % 10}", label=label)
        axes.set_xticks(range(len(models)), [Path(model).name for model in models], rotation=20, ha="right")
        axes.set_title(source.rpartition("/")[2])
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("held-out pass@1")
    panels[0][0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"What each model can do: {about}")
    _save(figure, path)


def _mean_of_model(arm: dict[str, Any], key: str, source: str, model: str) -> float:
    return statistics.fmean(node[key].get(source, 0.0) for node in arm["nodes"] if node["model"] == model)


def _axes(height: float = 4.5) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, height), dpi=150)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line(axes: Any, x: Any, curves: Any, number: int, label: str, *, with_band: bool, **style: Any) -> None:
    """Draw the mean of curves and the band in which most of them are. curves: [num_curves, num_points]."""
    color, dashes = f"C{number % 10}", "-" if number < 10 else "--"
    axes.plot(x, curves.mean(axis=0), color=color, linestyle=dashes, linewidth=1.8, markersize=4, label=label, **style)
    if with_band and len(curves) > 1:
        low, high = np.quantile(curves, _BAND, axis=0)
        axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    plt.close(figure)
    beside.replace(path)
