"""What a finished unit leaves on the disk: one JSON file with every node's rounds as columns.

    RUN_DIR/plan.json             what was asked for last: arms, seeds, and all settings
            units/NAME.json       one unit: its settings, and for each node what every round came to
            units/NAME.log        what its process wrote on stderr
            results.json, results.md, *.png   drawn from the units; made anew by `swarm-node experiment plot`

A unit's file is there whole or not at all, so that what is missing is what is still to be run.
"""

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from node.config import setting_values
from node.experiment.units import Unit
from node.layers import shown
from node.plot import heldout_points
from node.run_folder import RunFolderError, write_atomically
from swarm.errors import UserError

__all__ = ["NodeRecord", "UnitRecord", "node_record", "read_unit", "refuse_other_unit", "unit_path", "write_unit"]

SCHEMA_VERSION = 1
COLUMNS = (
    "reward_mean",
    "num_groups",
    "num_groups_zero_advantage",
    "num_local",
    "num_external",
    "num_external_missing",
    "reward_external_mean",
    "num_admitted",
    "num_completions",
    "num_tokens_generated",
    "policy_version",
    "loss",
    "grad_norm",
    "rollout_s",
    "scoring_s",
    "update_s",
)


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """What one node came to. Columns have one value for each round."""

    settings: Mapping[str, Any]  # those that not all nodes of the unit have alike
    columns: Mapping[str, Sequence[Any]]
    heldout: Sequence[tuple[int, float]]  # (round, pass@1); round 0 is before training
    heldout_before_by_source: Mapping[str, float]  # before training; empty where there is one source
    heldout_after_by_source: Mapping[str, float]  # at the last evaluation
    num_refused: Mapping[str, int]
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """What a unit came to."""

    arm: str
    slug: str
    seed: int
    mode: str  # "memory", or "real" for processes
    pace: Mapping[str, Any]
    settings: Mapping[str, Any]  # that all of its nodes have alike
    nodes: Sequence[NodeRecord]
    wall_s: float
    cpu_s: float  # of all processes of the unit


def node_record(rows: Sequence[Mapping[str, Any]], own_settings: Mapping[str, Any]) -> NodeRecord:
    """Return what is kept of a node's rows of metrics.

    Processor time is known where rows have `cpu_so_far_s`; the node's own work of the round is in `cpu_s`.
    """
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in COLUMNS}
    if rows and "cpu_so_far_s" in rows[0]:
        for name in ("cpu", "wall"):
            so_far = [0.0, *(row[f"{name}_so_far_s"] for row in rows)]
            columns[f"{name}_s"] = [round(after - before, 6) for before, after in itertools.pairwise(so_far)]
    refused = Counter[str]()
    for row in rows:
        refused.update(row["num_refused"])
    return NodeRecord(
        own_settings,
        columns,
        heldout_points(rows),
        _last(rows[:1], "pass_at_1_heldout_before_by_source"),
        _last(rows, "pass_at_1_heldout_by_source"),
        dict(sorted(refused.items())),
        sum(row["bytes_in"] for row in rows),
        sum(row["bytes_out"] for row in rows),
    )


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, float]:
    return next((row[name] for row in reversed(rows) if name in row), {})


def split_settings(unit: Unit) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings that all nodes of a unit have alike, and for each node the others."""
    each = [to_jsonable_python(setting_values(config)) for config in unit.configs]
    common = {name: value for name, value in each[0].items() if all(one[name] == value for one in each)}
    return common, [{name: value for name, value in one.items() if name not in common} for one in each]


def unit_path(folder: Path, unit: Unit) -> Path:
    """Return where a unit's file is."""
    return folder / "units" / f"{unit.name}.json"


def write_unit(
    path: Path, unit: Unit, mode: str, rows: Sequence[Sequence[Mapping[str, Any]]], *, wall_s: float, cpu_s: float
) -> None:
    """Write what a unit came to. `rows` are those of each node."""
    common, own = split_settings(unit)
    data = {
        "schema_version": SCHEMA_VERSION,
        "arm": unit.arm,
        "slug": unit.slug,
        "seed": unit.seed,
        "mode": mode,
        "pace": unit.pace,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "settings": common,
        "nodes": [
            {name: getattr(record, name) for name in NodeRecord.__slots__} for record in map(node_record, rows, own)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(data, allow_nan=False) + "\n")


def read_unit(path: Path) -> UnitRecord:
    """Read a unit's file. Raises RunFolderError for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version of this program")
        nodes = [
            NodeRecord(**{**node, "heldout": [(point[0], point[1]) for point in node["heldout"]]})
            for node in data.pop("nodes")
        ]
        return UnitRecord(nodes=nodes, **data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is no unit of an experiment ({error}); remove it to have it run again") from None


def refuse_other_unit(path: Path, unit: Unit, mode: str) -> None:
    """Raise UserError, naming the first setting, where a unit's file is of other settings than the unit's."""
    record = read_unit(path)
    common, own = split_settings(unit)
    before: list[tuple[str, Any]] = [("--real", record.mode == "real"), ("number of nodes", len(record.nodes))]
    now: list[tuple[str, Any]] = [("--real", mode == "real"), ("number of nodes", len(unit.configs))]
    before += [(f"experiment.{name}", value) for name, value in record.pace.items()]
    now += [(f"experiment.{name}", value) for name, value in unit.pace.items()]
    for number, node in enumerate(record.nodes[: len(own)]):
        merged, wanted = {**record.settings, **node.settings}, {**common, **own[number]}
        before += [(name, merged.get(name)) for name in wanted]
        now += list(wanted.items())
    for (name, old), (_, new) in zip(before, now, strict=True):
        if old != new:
            raise UserError(
                f"{path.parent.parent} was run with {name} = {shown(old)}, not {shown(new)} (arm {unit.arm}); "
                "leave that as it was to go on with it, or choose another folder with --run-dir"
            )
