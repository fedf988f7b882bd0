"""What an experiment came to, from the files of its units: all numbers of the tables and of the figures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from node.experiment.measures import MEASURES, bootstrap, cumulative_reward, measure, paired
from node.experiment.plan import Plan
from node.experiment.record import UnitRecord, read_unit
from node.run_folder import RunFolderError, write_atomically

__all__ = ["Results", "compare", "read_results", "write_plan"]

Results = dict[str, list[UnitRecord]]  # by arm, in the order of the plan; units by seed
SCHEMA_VERSION = 1


def write_plan(folder: Path, plan: Plan, mode: str) -> None:
    """Write what is to be run, for who draws it later."""
    data = {
        "schema_version": SCHEMA_VERSION,
        "mode": mode,
        "rounds": plan.rounds,
        **plan.experiment.model_dump(mode="json"),
        "arms": [
            {"name": arm.name, "slug": arm.slug, "num_local": arm.num_local, "num_external": arm.num_external}
            | {"assignments": dict(arm.assignments)}
            for arm in plan.arms
        ],
    }
    write_atomically(folder / "plan.json", json.dumps(data, indent=1) + "\n")


def read_results(folder: Path) -> tuple[dict[str, Any], Results]:
    """Return the plan, and the units that are there. Raises RunFolderError where there are none."""
    try:
        plan: dict[str, Any] = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        arms, num_seeds = plan["arms"], plan["seeds"]
    except (OSError, ValueError, KeyError):
        raise RunFolderError(f"{folder} holds no experiment: there is no readable plan.json; check the path") from None
    results: Results = {}
    for arm in arms:
        paths = [folder / "units" / f"{arm['slug']}-seed{seed}.json" for seed in range(1, num_seeds + 1)]
        units = [read_unit(path) for path in paths if path.exists()]
        if units:
            results[arm["name"]] = units
    if not results:
        raise RunFolderError(f"no unit of the experiment in {folder} is finished; go on with it, then draw it")
    return plan, results


def compare(plan: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """Return every measure of every arm with its interval, and each arm against the baselines on the same seeds."""
    measured = {name: {unit.seed: measure(unit) for unit in units} for name, units in results.items()}
    baselines = [name for name in _baselines(plan) if name in results]
    arms = []
    for arm in plan["arms"]:
        name = arm["name"]
        if name in measured:
            arms.append(
                {
                    **arm,
                    "seeds": list(measured[name]),
                    "measures": {key: _bootstrap(measured[name], key) for key in MEASURES},
                    "nodes": _each_node(results[name]),
                    "against": {
                        base: {key: _paired(measured[name], measured[base], key) for key in MEASURES}
                        for base in baselines
                        if base != name
                    },
                }
            )
    kept = {key: value for key, value in plan.items() if key != "arms"}
    return {**kept, "schema_version": SCHEMA_VERSION, "baselines": baselines, "arms": arms}


def _each_node(units: Sequence[UnitRecord]) -> list[dict[str, Any]]:
    """Return what each node could do before and after, by task source, as means over seeds; nodes may differ."""
    return [
        {
            "model": nodes[0].settings.get("model.name", units[0].settings.get("model.name")),
            "reward_cumulative": statistics.fmean(map(cumulative_reward, nodes)),
            "heldout_before_by_source": _means([node.heldout_before_by_source for node in nodes]),
            "heldout_after_by_source": _means([node.heldout_after_by_source for node in nodes]),
        }
        for nodes in zip(*(unit.nodes for unit in units), strict=True)
    ]


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each entry that all of them have."""
    return {key: statistics.fmean(one[key] for one in found) for key in found[0] if all(key in one for one in found)}


def _baselines(plan: Mapping[str, Any]) -> list[str]:
    """The first arm that learns alone, and 4/4 or else the first of equal parts."""
    arms: Sequence[Mapping[str, Any]] = plan["arms"]
    alone = [arm["name"] for arm in arms if arm["num_external"] == 0]
    equal = [arm["name"] for arm in arms if arm["num_external"] == arm["num_local"] and not arm["assignments"]]
    return [*alone[:1], *equal[:1]]


def _bootstrap(by_seed: Mapping[int, Mapping[str, float | None]], key: str) -> dict[str, Any] | None:
    values = [one[key] for one in by_seed.values()]
    known = [value for value in values if value is not None]
    return bootstrap(known) if known and len(known) == len(values) else None


def _paired(
    ours: Mapping[int, Mapping[str, float | None]], theirs: Mapping[int, Mapping[str, float | None]], key: str
) -> dict[str, Any] | None:
    both = [
        (mine, other)
        for seed in ours
        if seed in theirs and (mine := ours[seed][key]) is not None and (other := theirs[seed][key]) is not None
    ]
    return paired([mine for mine, _ in both], [other for _, other in both]) if both else None
