"""What a run came to: summary.json, and the table that is printed at the end."""

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from node.config import RunConfig
from node.display import duration
from node.plot import heldout_points
from node.run_folder import RunFolder, write_atomically
from swarm.cores import num_cpus

__all__ = ["model_label", "print_summary", "summarize", "tasks_label", "write_summary"]

_PHASES = ("rollout", "scoring", "update", "load_policy", "evaluation")
_CURVE_POINTS = 20
_PACKAGES = ("swarm-node", "torch", "transformers", "reasoning-gym")


def model_label(config: RunConfig) -> str:
    """Return the model of a run as a title shows it: the last part of a path or of a hub id."""
    return os.path.basename(config.model.name) or config.model.name


def tasks_label(config: RunConfig) -> str:
    """Return the tasks of a run as a title shows them."""
    return ", ".join(os.path.basename(source.name) for source in config.tasks.sources)


def summarize(config: RunConfig, rows: Sequence[Mapping[str, Any]], stopped_by: str) -> dict[str, Any]:
    """Return the content of summary.json."""
    points = heldout_points(rows)
    outcomes: Counter[str] = Counter()
    for row in rows:
        outcomes.update(row["scoring_outcomes"])
    last = rows[-1] if rows else None
    return {
        "stopped_by": stopped_by,
        "model": config.model.name,
        "tasks": [source.model_dump(mode="json") for source in config.tasks.sources],
        "seed": config.seed,
        "rounds": len(rows),
        "rounds_wanted": config.rounds,
        "pass_at_1_heldout_before": points[0][1] if points and points[0][0] == 0 else None,
        "pass_at_1_heldout_after": points[-1][1] if points and points[-1][0] > 0 else None,
        "pass_at_1_heldout_after_round": points[-1][0] if points and points[-1][0] > 0 else None,
        "pass_at_1_heldout": [list(point) for point in points],
        "reward_curve": _curve(rows),
        "reward_total": sum(row["reward_mean"] for row in rows),
        "num_tokens_generated": sum(row["num_tokens_generated"] for row in rows),
        "num_completions": sum(row["num_completions"] for row in rows),
        "num_updates_skipped": last["num_updates_skipped"] if last else 0,
        "scoring_outcomes": dict(sorted(outcomes.items())),
        "elapsed_s": last["elapsed_s"] if last else 0.0,
        "seconds": {phase: sum(row[f"{phase}_s"] for row in rows) for phase in _PHASES},
        "round_s_median": statistics.median(row["round_s"] for row in rows) if rows else None,
        "peak_rss_bytes": max((row["peak_rss_bytes"] for row in rows), default=None),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Return [last round, mean reward] for about twenty equal stretches of the run."""
    stride = max(1, -(-len(rows) // _CURVE_POINTS))
    stretches = [rows[begin : begin + stride] for begin in range(0, len(rows), stride)]
    return [[part[-1]["round"], statistics.fmean(row["reward_mean"] for row in part)] for part in stretches]


def _hardware() -> dict[str, Any]:
    import psutil
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write summary.json."""
    write_atomically(folder.summary, json.dumps(summary, indent=2, allow_nan=False) + "\n")


def print_summary(console: Console, folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Print what a person wants to know at the end of a run."""
    table = Table(show_header=False, title=f"{summary['rounds']} rounds in {duration(summary['elapsed_s'])}")
    table.add_column(style="dim")
    table.add_column()
    before, after = summary["pass_at_1_heldout_before"], summary["pass_at_1_heldout_after"]
    if after is not None:
        began = "" if before is None else f"{before:.3f} → "
        table.add_row("held-out pass@1", f"[bold]{began}{after:.3f}[/bold]")
    if summary["reward_curve"]:
        curve = summary["reward_curve"]
        table.add_row("reward", f"{curve[0][1]:.3f} → {curve[-1][1]:.3f}, first and last stretch of the run")
    table.add_row(
        "generated", f"{summary['num_tokens_generated']:,} tokens, {summary['num_completions']:,} completions"
    )
    seconds = "   ".join(f"{phase} {value:.1f}" for phase, value in summary["seconds"].items())
    table.add_row("seconds", seconds)
    if summary["num_updates_skipped"]:
        table.add_row("skipped", f"{summary['num_updates_skipped']} updates that were not finite")
    if summary["peak_rss_bytes"]:
        table.add_row("memory", f"{summary['peak_rss_bytes'] / 2**20:,.0f} MiB at most")
    files = [path.name for path in (folder.picture, folder.metrics, folder.summary) if path.exists()]
    table.add_row("written", f"{folder.path}: {', '.join(files)}")
    console.print(table)
