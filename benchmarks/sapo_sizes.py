"""What sharing brings to swarms of 2, 8, 32 and 128 nodes, beside nodes that learn alone.

    python benchmarks/sapo_sizes.py [--sizes 2,8,32,128] [--rounds 40] [--run-dir FOLDER]

Each size is an experiment of its own (`swarm-node experiment sapo`) on the tasks of configs/sapo.toml with the seed 1:
4/4 with what is the default of a node. Nodes that learn alone do not know how many they are: 8/0 is run once, with
eight nodes. A size that --run-dir has already is not run again; the same command draws the table and the figure anew.
128 nodes take 2.5 GiB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from harness import REPOSITORY, Bar, report

from node.experiment.measures import cumulative_reward
from node.experiment.record import UnitRecord, read_unit
from swarm.config import SapoConfig

SILO, SILO_SIZE, SWARM = "8/0", 8, "4/4"
DEFAULTS: Final = {name: getattr(SapoConfig(), name) for name in ("fill", "external_negative_weight")}
Found = dict[str, Any]


def run(folder: Path, arm: str, size: int, rounds: int) -> UnitRecord:
    """Run an experiment of one arm and one seed, unless it is there."""
    program = str(Path(sys.executable).parent / "swarm-node")
    given = ["--config", str(REPOSITORY / "configs/sapo.toml"), "--arms", arm, "--nodes", str(size)]
    given += ["--seeds", "1", "--rounds", str(rounds), "--set", "evaluation.every_rounds=0"]
    given += [word for name, value in DEFAULTS.items() for word in ("--set", f"sapo.{name}={json.dumps(value)}")]
    subprocess.run([program, "experiment", "sapo", *given, "--run-dir", str(folder)], check=True)
    return read_unit(folder / "units" / f"{arm.replace('/', '-')}-seed1.json")


def measured(unit: UnitRecord) -> Found:
    """Return what a unit came to."""
    rewards = [cumulative_reward(node) for node in unit.nodes]
    num_rounds = sum(len(node.columns["reward_mean"]) for node in unit.nodes)
    missing, there = (sum(sum(node.columns[name]) for node in unit.nodes)
                      for name in ("num_external_missing", "num_external"))  # fmt: skip
    return {
        "arm": unit.arm,
        "nodes": len(unit.nodes),
        "reward_cumulative": statistics.fmean(rewards),
        "reward_cumulative_least": min(rewards),
        "reward_cumulative_most": max(rewards),
        "heldout_after": statistics.fmean(node.heldout[-1][1] for node in unit.nodes),
        "external_missing_share": missing / (missing + there) if missing + there else None,
        "bytes_in_per_node_and_round": sum(node.bytes_in for node in unit.nodes) / num_rounds,
        "cpu_s": unit.cpu_s,
    }


def draw(path: Path, silo: Found, swarms: Sequence[Found], rounds: int) -> None:
    """Draw cumulative reward by the number of nodes: mean, and the least and the most of a node."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150)
    least, mean, most = (silo[f"reward_cumulative{part}"] for part in ("_least", "", "_most"))
    axes.axhline(mean, color="C0", linestyle="--", label=f"{SILO}: alone")
    axes.axhspan(least, most, color="C0", alpha=0.13, linewidth=0)
    means = [one["reward_cumulative"] for one in swarms]
    spread = [
        [one["reward_cumulative"] - one["reward_cumulative_least"] for one in swarms],
        [one["reward_cumulative_most"] - one["reward_cumulative"] for one in swarms],
    ]
    sizes = [one["nodes"] for one in swarms]
    axes.errorbar(sizes, means, yerr=spread, color="C1", marker="o", capsize=4, label=f"{SWARM}: a swarm")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(
        xlabel="nodes",
        ylabel="own reward, summed over rounds\n(mean, least and most of a node)",
        title=f"Cumulative reward by the size of the swarm: {rounds} rounds, one seed",
        ylim=(0, None),
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def table(found: Sequence[Found]) -> str:
    """Return all of it as Markdown."""
    lines = [
        "| I/J | nodes | cumulative reward (least to most of a node) | held-out pass@1 after | of others missing "
        "| bytes received by a node in a round | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        missing = one["external_missing_share"]
        spread = f"{one['reward_cumulative_least']:.2f} to {one['reward_cumulative_most']:.2f}"
        cells = [
            one["arm"],
            str(one["nodes"]),
            f"{one['reward_cumulative']:.2f} ({spread})",
            f"{one['heldout_after']:.3f}",
            "" if missing is None else f"{missing:.0%}",
            f"{one['bytes_in_per_node_and_round']:,.0f}",
            f"{one['cpu_s']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def compare(folder: Path, sizes: Sequence[int], rounds: int) -> None:
    """Run what is missing, write table and figure, and report."""
    silo = measured(run(folder / "alone", SILO, SILO_SIZE, rounds))
    swarms = [measured(run(folder / str(size), SWARM, size, rounds)) for size in sizes]
    figures = {"rounds": rounds, "alone": silo, "swarms": swarms}
    (folder / "sizes.md").write_text(table([silo, *swarms]))
    (folder / "sizes.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(folder / "sizes.png", silo, swarms, rounds)
    gained = min(one["reward_cumulative"] for one in swarms) / silo["reward_cumulative"]
    report(figures, [Bar("least cumulative reward of a swarm over that of nodes alone", gained, 1.0)])


def main() -> None:
    """Compare the sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2,8,32,128", help="with commas")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--run-dir", type=Path, help="where to keep units, table and figure; else nothing is kept")
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.run_dir is not None:
        args.run_dir.mkdir(parents=True, exist_ok=True)
        compare(args.run_dir, sizes, args.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="sizes-") as scratch:
        compare(Path(scratch), sizes, args.rounds)


if __name__ == "__main__":
    main()
