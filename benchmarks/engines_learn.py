"""Train the same policy with either engine, over several seeds, and hold the learning curves side by side.

    python benchmarks/engines_learn.py [--model tiny] [--rounds N] [--seeds N] [--engines torch,vllm] [--keep FILE]

Each run is `swarm-node silo` as a user starts it, and the engines take turns. The curve of a run is the mean reward of
its rounds. Two engines are equal within noise where the means of their seeds are no further apart than seeds are: by
the standard deviation over seeds, of the engine whose runs differ less. `mismatch` is the distance between the
log-probs of engine and trainer that every round measures. --keep writes the curves. Without a vLLM that runs here
nothing is compared, and the bars have no value.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Bar, report

ENGINES = ("torch", "vllm")
_NUM_PARTS = 10  # of a run, in the report


def run(engine: str, seed: int, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run one node and return the metrics of its rounds. Raises SystemExit where it fails."""
    node = str(Path(sys.executable).with_name("swarm-node"))
    command = [node, "silo", "--model", args.model, "--engine", engine, "--rounds", str(args.rounds)]
    command += ["--run-dir", str(folder), "--seed", str(seed), "--set", "evaluation.every_rounds=0"]
    command += [word for assignment in args.assignments for word in ("--set", assignment)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command[1:])} ended with status {done.returncode}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(f"{engine}, seed {seed}: {summary(rows)}", file=sys.stderr, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is compared of a run, and what its engine took."""
    rewards = [row["reward_mean"] for row in rows]
    parts = [
        rewards[at * len(rewards) // _NUM_PARTS : (at + 1) * len(rewards) // _NUM_PARTS] for at in range(_NUM_PARTS)
    ]
    mismatch = [row["mismatch"] for row in rows if row["mismatch"] is not None]
    return {
        "reward": round(statistics.mean(rewards), 4),
        "curve": [round(statistics.mean(part), 4) for part in parts if part],
        "pass_at_1_heldout": [rows[0].get("pass_at_1_heldout_before"), rows[-1].get("pass_at_1_heldout")],
        "mismatch_mean": round(statistics.mean(mismatch), 6) if mismatch else None,
        "mismatch_max": round(max(mismatch), 6) if mismatch else None,
        "load_policy_s_median": round(statistics.median(row["load_policy_s"] for row in rows), 3),
        "load_policy_s_max": round(max(row["load_policy_s"] for row in rows), 3),
        "rollout_s_median": round(statistics.median(row["rollout_s"] for row in rows), 3),
        "round_s_median": round(statistics.median(row["round_s"] for row in rows), 3),
    }


def apart(found: dict[str, list[dict[str, Any]]], what: str) -> tuple[float | None, float]:
    """Return how far the engines' means over seeds are apart, None where one is missing; and how far seeds are."""
    values = {
        engine: [one[what][-1] if what == "pass_at_1_heldout" else one[what] for one in runs]
        for engine, runs in found.items()
    }
    spread = min((statistics.stdev(each) for each in values.values() if len(each) > 1), default=0.0)
    if set(values) != set(ENGINES) or not spread:
        return None, round(spread, 4)
    means = [statistics.mean(values[engine]) for engine in ENGINES]
    return round(abs(means[0] - means[1]), 4), round(spread, 4)


def main() -> None:
    """Run every engine with every seed and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engines", default=None, help="some of torch,vllm; default: those that run here")
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    from engine import no_vllm

    engines = args.engines.split(",") if args.engines else [name for name in ENGINES if name != "vllm" or not no_vllm()]
    if not set(engines) <= set(ENGINES):
        parser.error("--engines takes torch, vllm or both")
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    curves: dict[str, list[list[float]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, args.seeds + 1):
            for engine in engines:
                rows = run(engine, seed, args, Path(folder) / f"{engine}-{seed}")
                found[engine].append(summary(rows))
                curves[engine].append([row["reward_mean"] for row in rows])
    if args.keep:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        args.keep.write_text(json.dumps(curves) + "\n")
    bars = []
    for what in ("reward", "pass_at_1_heldout"):
        value, noise = apart(found, what)
        bars.append(
            Bar(f"{args.model}: {what}, distance of the engines' means over seeds", value, noise, at_least=False)
        )
    report({"model": args.model, "rounds": args.rounds, "runs": found}, bars)


if __name__ == "__main__":
    main()
