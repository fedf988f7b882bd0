"""Draws the reward curves of a run, or of the nodes of a swarm, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["heldout_points", "plot_rewards", "plot_swarm"]


def heldout_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return (round, held-out pass@1), with round 0 for the policy before training."""
    points: list[tuple[int, float]] = []
    for row in rows:
        if "pass_at_1_heldout_before" in row:
            points.append((row["round"] - 1, row["pass_at_1_heldout_before"]))
        if "pass_at_1_heldout" in row:
            points.append((row["round"], row["pass_at_1_heldout"]))
    return points


def plot_rewards(rows: Sequence[Mapping[str, Any]], title: str, window: int, path: Path) -> None:
    """Write the picture: reward of every round, its moving average, and held-out pass@1."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rounds = [row["round"] for row in rows]
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    axes.plot(rounds, [row["reward_mean"] for row in rows], color="#9ecae1", linewidth=0.7, alpha=0.8, label="reward")
    average = [row["reward_moving_average"] for row in rows]
    axes.plot(rounds, average, color="#08519c", linewidth=2, label=f"reward, average of the last {window} rounds")
    points = heldout_points(rows)
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color="#d94801", marker="o", markersize=5, linewidth=1.2, label="held-out pass@1")
        for (x, y), align, offset in ((points[0], "left", (5, 7)), (points[-1], "center", (0, 7))):
            axes.annotate(
                f"{y:.2f}", (x, y), textcoords="offset points", xytext=offset, ha=align, color="#d94801", fontsize=9
            )
    axes.set(xlabel="round", ylabel="reward, pass@1", title=title, ylim=(0, 1.05))
    axes.set_xlim(0, max(rounds, default=1) * 1.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    figure.tight_layout()
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    plt.close(figure)
    beside.replace(path)


def plot_swarm(nodes: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], title: str, path: Path) -> None:
    """Write the picture of several nodes: reward of each, averaged, held-out pass@1, and what came from others."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rewards, shares) = plt.subplots(2, 1, figsize=(8, 6), dpi=150, sharex=True, height_ratios=(3, 1))
    for number, (name, rows) in enumerate(nodes):
        color = f"C{number}"
        rounds = [row["round"] for row in rows]
        rewards.plot(rounds, [row["reward_moving_average"] for row in rows], color=color, linewidth=1.4, label=name)
        points = heldout_points(rows)
        if points:
            xs, ys = zip(*points, strict=True)
            rewards.plot(xs, ys, color=color, marker="o", markersize=3.5, linewidth=0, alpha=0.8)
        share = [row["num_external"] / max(1, row["num_external"] + row["num_local"]) for row in rows]
        shares.plot(rounds, share, color=color, linewidth=0.8)
    rewards.set(ylabel="reward (line), held-out pass@1 (dots)", title=title, ylim=(0, 1.05))
    shares.set(xlabel="round", ylabel="from others", ylim=(0, 1.05))
    for axes in (rewards, shares):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rewards.legend(frameon=False, loc="upper left", fontsize=9)
    figure.tight_layout()
    beside = path.with_name(f".{path.name}.partial")
    figure.savefig(beside, format="png")
    plt.close(figure)
    beside.replace(path)
