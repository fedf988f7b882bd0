"""The table of an experiment, as Markdown for people and as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from node.experiment.figures import draw
from node.experiment.results import compare, read_results
from node.run_folder import write_atomically
from swarm.errors import UserError

__all__ = ["table", "write_report"]

Summary = dict[str, Any]


def write_report(folder: Path, curves_of: Sequence[str] = ()) -> Summary:
    """Write results.json, results.md and every figure from the units in a folder; return what results.json holds.

    `curves_of` are the arms whose curves are drawn; empty: all. Raises UserError for one that is not there.
    """
    plan, results = read_results(folder)
    for name in curves_of:
        if name not in results:
            raise UserError(f"{folder} has no finished unit of arm {name}; it has {', '.join(results)}")
    summary = compare(plan, results)
    write_atomically(folder / "results.json", json.dumps(summary, indent=1, allow_nan=False) + "\n")
    write_atomically(folder / "results.md", table(summary))
    draw(folder, summary, results, curves_of)
    return summary


def table(summary: Summary) -> str:
    """Return the tables of an experiment."""
    arms = summary["arms"]
    head = f"{summary['nodes']} nodes, {summary['rounds']} rounds, {_seeds(summary)}; mean and 95 % bootstrap interval"
    parts = [head, "", *_rows(_columns(), arms)]
    for base in summary["baselines"]:
        others = [arm for arm in arms if base in arm["against"]]
        if others:
            parts += ["", f"Against {base} on the same seeds", "", *_rows(_against(base), others)]
    if _num_seeds(summary)[1] > 1:
        parts += ["", "Each seed: cumulative reward, and held-out pass@1 after", "", *_rows(_each_seed(arms), arms)]
    if len({node["model"] for arm in arms for node in arm["nodes"]}) > 1:
        parts += ["", "Each node: held-out pass@1 before and after, by task; means over seeds", "", *_node_rows(arms)]
    return "\n".join([*parts, ""])


def _node_rows(arms: list[Any]) -> list[str]:
    """Return the table of nodes that are not alike: what each of them could do before, and can do after."""
    sources = sorted({source for arm in arms for node in arm["nodes"] for source in node["heldout_after_by_source"]})
    nodes = [
        {"I/J": arm["name"], "number": number, **node} for arm in arms for number, node in enumerate(arm["nodes"], 1)
    ]
    columns: dict[str, Any] = {
        "I/J": lambda node: node["I/J"],
        "node": lambda node: f"{node['number']}, {Path(node['model']).name}",
        "cumulative reward": lambda node: f"{node['reward_cumulative']:.1f}",
        **{source.rpartition("/")[2]: partial(_before_and_after, source) for source in sources},
    }
    return _rows(columns, nodes)


def _before_and_after(source: str, node: Mapping[str, Any]) -> str:
    both = (node[f"heldout_{when}_by_source"].get(source) for when in ("before", "after"))
    return " to ".join("?" if value is None else f"{value:.3f}" for value in both)


def _num_seeds(summary: Summary) -> tuple[int, int]:
    """Return the fewest and the most seeds of any arm."""
    counts = {len(arm["seeds"]) for arm in summary["arms"]}
    return min(counts), max(counts)


def _seeds(summary: Summary) -> str:
    least, most = _num_seeds(summary)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} seed{'s' if most > 1 else ''}"


def _columns() -> dict[str, Any]:
    return {
        "I/J": lambda arm: arm["name"],
        "cumulative reward": lambda arm: _interval(arm["measures"]["reward_cumulative"], "{:.1f}"),
        "held-out pass@1 after": lambda arm: _interval(arm["measures"]["heldout_after"], "{:.3f}"),
        "least to most of a node": lambda arm: " to ".join(
            _mean(arm["measures"][f"heldout_after_{name}"], "{:.3f}") for name in ("least", "most")
        ),
        "held-out mean": lambda arm: _interval(arm["measures"]["heldout_mean"], "{:.3f}"),
        "oscillation": lambda arm: _interval(arm["measures"]["oscillation"], "{:.3f}"),
        "groups without advantage": lambda arm: _mean(arm["measures"]["zero_advantage_share"], "{:.0%}"),
        "of others missing": lambda arm: _mean(arm["measures"]["external_missing_share"], "{:.2%}"),
        "tokens generated": lambda arm: _mean(arm["measures"]["num_tokens_generated"], "{:,.0f}"),
        "CPU s": lambda arm: _mean(arm["measures"]["cpu_s"], "{:,.0f}"),
    }


def _against(base: str) -> dict[str, Any]:
    return {
        "I/J": lambda arm: arm["name"],
        "cumulative reward": lambda arm: _ratio(arm["against"][base]["reward_cumulative"]),
        "held-out pass@1 after": lambda arm: _difference(arm["against"][base]["heldout_after"]),
        "held-out mean": lambda arm: _difference(arm["against"][base]["heldout_mean"]),
        "oscillation": lambda arm: _difference(arm["against"][base]["oscillation"]),
        "tokens generated": lambda arm: _ratio(arm["against"][base]["num_tokens_generated"]),
        "CPU s": lambda arm: _ratio(arm["against"][base]["cpu_s"]),
    }


def _each_seed(arms: list[Any]) -> dict[str, Any]:
    seeds = sorted({seed for arm in arms for seed in arm["seeds"]})
    return {"I/J": lambda arm: arm["name"], **{f"seed {seed}": partial(_of_seed, seed) for seed in seeds}}


def _of_seed(seed: int, arm: Mapping[str, Any]) -> str:
    if seed not in arm["seeds"]:
        return ""
    place = arm["seeds"].index(seed)
    reward, heldout = (arm["measures"][name] for name in ("reward_cumulative", "heldout_after"))
    return f"{reward['per_seed'][place]:.1f}" + ("" if heldout is None else f", {heldout['per_seed'][place]:.3f}")


def _rows(columns: Mapping[str, Any], arms: list[Any]) -> list[str]:
    lines = [list(columns), ["---"] * len(columns), *([show(arm) for show in columns.values()] for arm in arms)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _mean(found: Mapping[str, Any] | None, form: str) -> str:
    return "" if found is None else form.format(found["mean"])


def _interval(found: Mapping[str, Any] | None, form: str) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return form.format(found["mean"])
    return f"{form.format(found['mean'])} ({form.format(found['low'])} to {form.format(found['high'])})"


def _ratio(found: Mapping[str, Any] | None) -> str:
    """A ratio as what is more: +31 %."""
    if found is None or "ratio" not in found:
        return ""
    more = {name: None if found["ratio"][name] is None else 100 * found["ratio"][name] - 100
            for name in ("mean", "low", "high")}  # fmt: skip
    return f"{_interval(more, '{:+.1f}')} %"


def _difference(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else _interval(found["difference"], "{:+.3f}")
