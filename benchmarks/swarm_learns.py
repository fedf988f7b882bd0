"""Let eight real nodes learn together, and beside them the same eight alone: reward, and how often others were there.

    python benchmarks/swarm_learns.py [--nodes 8] [--rounds 100] [--set key=value]... [--keep FOLDER]

    swarm    `swarm-node join` with 4 own and 4 external groups a round (4/4), all at one time, and one bootstrap
    silos    `swarm-node silo` with 8 own groups a round (8/0), as many at one time as there are cores
    lean     `swarm-node silo` with 4 own groups a round (4/0): as many questions as a node of the swarm asks

Node number n has the seed n in every arm, and all begin with the built-in model `tiny`. Swarm and silos have eight
groups in a batch, which is SAPO's comparison (arXiv 2509.08721): an update costs the same, a node of the swarm asks
half as many questions itself, and a rollout of others costs nothing but its bytes. A round of a node is *full* where
it trained on all J external groups; what was missing was replaced by own groups. Every round counts, those before the
first peer was found and those after others had left included.

--keep writes what `docs/results/swarm` holds: the picture, the curves of all nodes, the settings, and this report.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Bar, hardware, report

from node.processes import NodeProcess, end_all

__all__ = ["full_rounds", "summed_reward"]

LISTEN = "/ip4/127.0.0.1/tcp/0"
START_WITHIN_S = 120.0
LIMIT_S = 1800.0
MIN_FULL_SHARE = 0.9
CURVES = ("reward_mean", "num_local", "num_external", "num_external_missing", "round_s")
Rows = list[dict[str, Any]]


def _address(bootstrap: NodeProcess) -> str:
    """Wait until the bootstrap listens; return where."""
    deadline_s = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline_s and bootstrap.status_code is None:
        if bootstrap.address is not None:
            return bootstrap.address
        time.sleep(0.2)
    raise SystemExit(f"the bootstrap does not start: {bootstrap.last_words()}")


def _wait(processes: Sequence[NodeProcess]) -> None:
    """Wait until all have ended well."""
    deadline_s = time.monotonic() + LIMIT_S
    try:
        for process in processes:
            process.wait(deadline_s)
            if process.status_code:
                raise SystemExit(f"{process.name} ended badly: {process.last_words()}")
    finally:
        end_all(processes)


def _rows(folder: Path, name: str) -> Rows:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def run_swarm(folder: Path, args: argparse.Namespace) -> list[Rows]:
    """Run all nodes of the swarm at one time; return the rounds of each."""
    bootstrap = NodeProcess("bootstrap", folder, "bootstrap", "--listen", LISTEN)
    try:
        common = [*_common(args), "--peers", _address(bootstrap), "--listen", LISTEN]
        common += ["--num-local", str(args.local), "--num-external", str(args.external)]
        names = [f"node-{seed}" for seed in range(1, args.nodes + 1)]
        _wait([NodeProcess(name, folder, "join", *common, "--seed", str(seed)) for seed, name in enumerate(names, 1)])
    finally:
        end_all([bootstrap])
    return [_rows(folder, name) for name in names]


def run_silos(folder: Path, args: argparse.Namespace, arm: str, num_local: int) -> list[Rows]:
    """Run the same nodes alone, with so many own groups in a batch."""
    num_cores = len(hardware_cores())
    names = [f"{arm}-{seed}" for seed in range(1, args.nodes + 1)]
    for first in range(0, args.nodes, num_cores):
        common = [*_common(args), "--set", f"sapo.num_local={num_local}"]
        some = names[first : first + num_cores]
        _wait([NodeProcess(name, folder, "silo", *common, "--seed", name.rpartition("-")[2]) for name in some])
    return [_rows(folder, name) for name in names]


def hardware_cores() -> Sequence[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _common(args: argparse.Namespace) -> list[str]:
    words = ["--model", args.model, "--rounds", str(args.rounds)]
    settings = [f"evaluation.every_rounds={args.evaluate_every}", *args.assignments]
    return [*words, *(word for setting in settings for word in ("--set", setting))]


def full_rounds(rows: Rows, external: int, after: int = 0) -> float:
    """Return the share of rounds after so many that trained on all external groups."""
    counted = rows[after:]
    return sum(row["num_external"] >= external for row in counted) / len(counted)


def summed_reward(rows: Rows) -> float:
    """Return the mean reward of own groups, summed over rounds."""
    return float(sum(row["reward_mean"] for row in rows))


def _last_heldout(rows: Rows) -> float:
    return float(next(row["pass_at_1_heldout"] for row in reversed(rows) if "pass_at_1_heldout" in row))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "least": min(values), "most": max(values)}


def _arm(nodes: list[Rows]) -> dict[str, Any]:
    return {
        "reward_summed_over_rounds": _spread([summed_reward(rows) for rows in nodes]),
        "pass_at_1_heldout_after": _spread([_last_heldout(rows) for rows in nodes]),
        "round_s_median": statistics.median(row["round_s"] for rows in nodes for row in rows),
        "num_questions_asked": sum(row["num_groups"] for rows in nodes for row in rows),
    }


def plot(nodes_of: dict[str, list[Rows]], args: argparse.Namespace, path: Path) -> None:
    """Draw the mean of each arm and the spread of its nodes, and the share of full rounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rewards, full) = plt.subplots(2, 1, figsize=(8, 6), dpi=150, sharex=True, height_ratios=(3, 1))
    rounds = range(1, args.rounds + 1)
    arms = {
        "swarm": (f"{args.nodes} nodes of a swarm, {args.local} own + {args.external} external groups", "#d94801"),
        "silo": (f"{args.nodes} silos, {args.local + args.external} own groups", "#08519c"),
        "lean": (f"{args.nodes} silos, {args.local} own groups", "#7f7f7f"),
    }
    for arm, (label, color) in arms.items():
        nodes = nodes_of[arm]
        columns = list(zip(*([row["reward_moving_average"] for row in rows] for rows in nodes), strict=True))
        rewards.plot(rounds, [statistics.mean(column) for column in columns], color=color, linewidth=2, label=label)
        rewards.fill_between(rounds, *map(list, zip(*((min(c), max(c)) for c in columns), strict=True)),
                             color=color, alpha=0.15, linewidth=0)  # fmt: skip
        held = [[(r["round"], r["pass_at_1_heldout"]) for r in rows if "pass_at_1_heldout" in r] for rows in nodes]
        points = [(column[0][0], statistics.mean(value for _, value in column)) for column in zip(*held, strict=True)]
        rewards.plot(*zip(*points, strict=True), color=color, marker="o", markersize=5, linewidth=0)
    columns = list(
        zip(*([row["num_external"] >= args.external for row in rows] for rows in nodes_of["swarm"]), strict=True)
    )
    full.plot(rounds, [sum(column) / len(column) for column in columns], color="#d94801", linewidth=1)
    rewards.set(
        ylabel="own reward (line: mean of the nodes,\nband: all of them), held-out pass@1 (dots)",
        title=f"`{args.model}`: a swarm beside silos of the same seeds",
        ylim=(0, None),
    )
    full.set(xlabel="round", ylabel="nodes with all\nexternal groups", ylim=(0, 1.05))
    for axes in (rewards, full):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    rewards.legend(frameon=False, loc="upper left", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, format="png")
    plt.close(figure)


def keep(nodes_of: dict[str, list[Rows]], figures: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Write what is worth keeping of all arms."""
    args.keep.mkdir(parents=True, exist_ok=True)
    plot(nodes_of, args, args.keep / "reward.png")
    curves = {
        f"{arm}-{seed}": {
            **{name: [round(row[name], 4) for row in rows if name in row] for name in CURVES},
            "pass_at_1_heldout": {row["round"]: row["pass_at_1_heldout"] for row in rows if "pass_at_1_heldout" in row},
        }
        for arm, nodes in nodes_of.items()
        for seed, rows in enumerate(nodes, 1)
    }
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(curve)}" for name, curve in curves.items())
    (args.keep / "curves.json").write_text(f"{{\n{lines}\n}}\n")
    text = json.dumps({"hardware": hardware(), "figures": figures}, indent=1)
    (args.keep / "report.json").write_text(f"{text}\n")
    for name in ("node-1", "silo-1"):
        shutil.copy(folder / name / "config.toml", args.keep / f"{name.partition('-')[0]}.toml")


def main() -> None:
    """Run all arms and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--local", type=int, default=4, help="I: own groups of a node of the swarm")
    parser.add_argument("--external", type=int, default=4, help="J: groups of others")
    parser.add_argument("--evaluate-every", type=int, default=25, help="rounds")
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swarm-") as scratch:
        folder = Path(scratch)
        start_s = time.monotonic()
        swarm = run_swarm(folder, args)
        swarm_s = time.monotonic() - start_s
        print(f"the swarm has run for {swarm_s:.0f} s", flush=True)
        silos = run_silos(folder, args, "silo", args.local + args.external)
        lean = run_silos(folder, args, "lean", args.local)
        full = [full_rounds(rows, args.external) for rows in swarm]
        figures: dict[str, Any] = {
            **{name: getattr(args, name) for name in ("model", "nodes", "rounds", "local", "external")},
            "swarm": {
                **_arm(swarm),
                "full_rounds": [round(share, 3) for share in full],
                "full_rounds_after_10": [round(full_rounds(rows, args.external, 10), 3) for rows in swarm],
                "bytes_in_per_external_group": sum(row["bytes_in"] for rows in swarm for row in rows)
                / max(1, sum(row["num_external"] for rows in swarm for row in rows)),
                "seconds": round(swarm_s, 1),
            },
            "silos": _arm(silos),
            "lean": _arm(lean),
        }
        rewards = [figures[arm]["reward_summed_over_rounds"]["mean"] for arm in ("swarm", "silos", "lean")]
        figures["reward_of_swarm_over_silos"] = rewards[0] / rewards[1]
        figures["reward_of_swarm_over_lean"] = rewards[0] / rewards[2]
        if args.keep:
            keep({"swarm": swarm, "silo": silos, "lean": lean}, figures, folder, args)
    report(figures, [Bar("share of full rounds, least of the nodes", min(full), MIN_FULL_SHARE)])


if __name__ == "__main__":
    main()
