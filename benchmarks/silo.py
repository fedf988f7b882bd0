"""Train a built-in model alone and measure what a newcomer sees: how soon it learns, and how far it gets.

    python benchmarks/silo.py [--model tiny] [--rounds N] [--set key=value]... [--keep FOLDER]

It starts `swarm-node silo` as a user does, in a new folder, and takes the time from the start of the
process. "Visible" is the first evaluation whose held-out pass@1 is at least twice that before training.
--keep copies metrics, summary and picture, as `docs/results/` holds them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Bar, report

_KEPT = ("metrics.jsonl", "summary.json", "reward.png", "config.toml")
_GOAL, _GOAL_S, _VISIBLE_S, _START = 0.80, 180.0, 30.0, 0.10


def _run(command: list[str]) -> list[tuple[float, dict[str, Any]]]:
    """Run a node and return (seconds since its start, metrics) of every round."""
    start, rows = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                if "round" in row:
                    rows.append((time.monotonic() - start, row))
                    if "pass_at_1_heldout" in row:
                        print(
                            f"{rows[-1][0]:6.1f} s  round {row['round']}: pass@1 {row['pass_at_1_heldout']:.3f}",
                            flush=True,
                        )
    if process.returncode:
        raise SystemExit(f"swarm-node silo ended with status {process.returncode}")
    return rows


def _bars(model: str, before: float, curve: list[tuple[float, float]]) -> list[Bar]:
    """curve: (seconds, held-out pass@1) of every evaluation after training began."""
    after = curve[-1][1]
    if model != "tiny":
        return [Bar(f"{model}: held-out pass@1 after over before", after / max(before, 1e-9), 1.0)]
    visible = next((seconds for seconds, value in curve if value >= 2 * before), None)
    reached = next((seconds for seconds, value in curve if value >= _GOAL), None)
    return [
        Bar("held-out pass@1 before", before, _START, at_least=False),
        Bar("held-out pass@1 after", after, _GOAL),
        Bar("seconds until learning is visible", visible, _VISIBLE_S, at_least=False),
        Bar(f"seconds until held-out pass@1 {_GOAL}", reached, _GOAL_S, at_least=False),
    ]


def main() -> None:
    """Run one node and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        node = str(Path(sys.executable).with_name("swarm-node"))
        command = [node, "silo", "--json", "--model", args.model, "--run-dir", str(run_dir)]
        command += ["--rounds", str(args.rounds)] if args.rounds else []
        command += [word for assignment in args.assignments for word in ("--set", assignment)]
        rows = _run(command)
        summary = json.loads((run_dir / "summary.json").read_text())
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            for name in _KEPT:
                shutil.copy(run_dir / name, args.keep / name)
    curve = [(seconds, row["pass_at_1_heldout"]) for seconds, row in rows if "pass_at_1_heldout" in row]
    before = rows[0][1]["pass_at_1_heldout_before"]
    figures = {
        "model": args.model,
        "rounds": len(rows),
        "total_s": rows[-1][0],
        "round_s_median": summary["round_s_median"],
        "pass_at_1_heldout": [[0.0, before], *([round(seconds, 1), value] for seconds, value in curve)],
        "seconds": summary["seconds"],
        "peak_rss_bytes": summary["peak_rss_bytes"],
    }
    report(figures, _bars(args.model, before, curve))


if __name__ == "__main__":
    main()
