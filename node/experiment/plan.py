"""What an experiment consists of: its arms, seeds and nodes, and the settings of every node of every unit.

    --node-set, [[nodes]] of the file > arm > flag > --set > environment > file > experiment's defaults > preset

A file for `--config` is one with settings as `silo` and `join` read it, to which it may add

    [experiment]              # arms, nodes, seeds, round_s, jitter, latency_s
    [[nodes]]                 # as many tables as there are kinds of nodes; `count` says how many of a kind
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from node.config import RunConfig
from node.experiment.arms import Arm, parse_arms
from node.experiment.units import Unit
from node.layers import ConfigError, Layer, flatten_tables, read_assignments, resolve
from swarm.config import Section

__all__ = ["ExperimentConfig", "Plan", "make_plan", "node_assignments"]

_PREFIX = "experiment."
_DEFAULTS = {"rounds": 300, "evaluation.num_items": 128, "evaluation.every_rounds": 25, "num_threads": 1}
_SEEDS_APART = 1000  # nodes of one seed at most


class ExperimentConfig(Section):
    """What an experiment has beside the settings of its nodes."""

    arms: tuple[str, ...] = Field(("8/0", "6/2", "4/4", "2/6"), description="I/J, or NAME=I/J+KEY=VALUE")
    nodes: int = Field(8, ge=1, lt=_SEEDS_APART, description="nodes that learn, in each arm")
    seeds: int = Field(5, ge=1, description="how many seeds, from 1; all arms have the same")
    round_s: float = Field(15.0, gt=0, description="virtual seconds from one round of a node to its next")
    jitter: float = Field(0.05, ge=0, lt=1, description="share by which a round may come sooner or later")
    latency_s: tuple[float, float] = Field((0.01, 0.05), description="virtual seconds of a message: uniform between")


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is to be run."""

    experiment: ExperimentConfig
    arms: tuple[Arm, ...]
    units: tuple[Unit, ...]  # all arms of the first seed, then of the second, so that what is there can be compared

    @property
    def rounds(self) -> int:
        """Of the longest run of any node."""
        return max(config.rounds for unit in self.units for config in unit.configs)


def node_assignments(assignments: Iterable[str]) -> dict[int, dict[str, object]]:
    """Read `--node-set 3.model.name=big`: a setting of the third node. Raises ConfigError."""
    found: dict[int, dict[str, object]] = {}
    for assignment in assignments:
        number, dot, rest = assignment.partition(".")
        if not dot or not number.isdecimal() or int(number) < 1:
            raise ConfigError(
                f"--node-set {assignment!r} is not of the form NODE.key=value, as in 1.model.name=tiny (nodes: from 1)"
            )
        found.setdefault(int(number), {}).update(read_assignments([rest]).values)
    return found


def make_plan(layers: Sequence[Layer], node_settings: Mapping[int, Mapping[str, object]]) -> Plan:
    """Find every setting of every node. `layers` are the strongest first. Raises ConfigError."""
    experiment, common = _experiment(layers)
    kinds = _kinds(layers)
    given_nodes = any(f"{_PREFIX}nodes" in layer.values for layer in layers)
    if kinds and given_nodes and experiment.nodes != len(kinds):
        raise ConfigError(f"{len(kinds)} nodes are described in [[nodes]], not {experiment.nodes}: leave --nodes out")
    num_nodes = len(kinds) or experiment.nodes
    unknown = [number for number in node_settings if number > num_nodes]
    if unknown:
        raise ConfigError(f"--node-set names node {max(unknown)}, and there are {num_nodes}")
    arms = parse_arms(experiment.arms)
    configs = {arm.name: _arm_configs(arm, num_nodes, kinds, node_settings, common) for arm in arms}
    pace = (experiment.round_s, experiment.jitter, experiment.latency_s)
    units = tuple(
        Unit(arm.name, arm.slug, seed, _with_seeds(configs[arm.name], seed), *pace)
        for seed in range(1, experiment.seeds + 1)
        for arm in arms
    )
    return Plan(experiment.model_copy(update={"nodes": num_nodes}), arms, units)


def _with_seeds(configs: Sequence[RunConfig], seed: int) -> tuple[RunConfig, ...]:
    """Give each node a seed of its own, the same in all arms."""
    return tuple(
        config.model_copy(update={"seed": _SEEDS_APART * seed + number}) for number, config in enumerate(configs, 1)
    )


def _arm_configs(
    arm: Arm,
    num_nodes: int,
    kinds: Sequence[Mapping[str, object]],
    node_settings: Mapping[int, Mapping[str, object]],
    common: Sequence[Layer],
) -> list[RunConfig]:
    """Return the settings of each node of an arm, but for its seed. Nodes of one kind are looked up once."""
    found: dict[str, RunConfig] = {}
    configs = []
    for number in range(num_nodes):
        own, kind = node_settings.get(number + 1, {}), kinds[number] if kinds else {}
        layers = [
            Layer("--node-set", own),
            Layer("[[nodes]]", kind),
            Layer(f"arm {arm.name}", arm.settings),
            *common,
            Layer("default of experiments", _DEFAULTS),
        ]
        if any("seed" in layer.values for layer in layers):
            raise ConfigError("seed: an experiment has the seeds 1, 2, … of its own; say how many with --seeds")
        key = repr((own, kind))
        if key not in found:
            found[key] = resolve(layers).config
        configs.append(found[key])
    return configs


def _experiment(layers: Sequence[Layer]) -> tuple[ExperimentConfig, list[Layer]]:
    """Return what is the experiment's own, and layers of what is left: the settings of its nodes."""
    values: dict[str, object] = {}
    common = []
    for layer in layers:
        own = {name: value for name, value in layer.values.items() if name.startswith(_PREFIX)}
        for name, value in own.items():
            values.setdefault(name.removeprefix(_PREFIX), _as_list(name, value))
        rest = {name: value for name, value in layer.values.items() if name not in own and name != "nodes"}
        common.append(Layer(layer.origin, rest, layer.origins))
    try:
        return ExperimentConfig.model_validate(values), common
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{_PREFIX}{where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _as_list(name: str, value: object) -> object:
    """Read `8/0,4/4` or `0.01,0.05`, as `--set` and the environment give lists."""
    if name in (f"{_PREFIX}arms", f"{_PREFIX}latency_s") and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value


def _kinds(layers: Sequence[Layer]) -> list[dict[str, object]]:
    """Return the settings of each node that the [[nodes]] of a file describe; nothing where there is no such table."""
    tables: Any = next((layer.values["nodes"] for layer in layers if "nodes" in layer.values), [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError("nodes: write one [[nodes]] table for each kind of node; how many: experiment.nodes")
    found: list[dict[str, object]] = []
    for table in tables:
        settings = dict(table)
        count = settings.pop("count", 1)
        if not isinstance(count, int) or not 1 <= count < _SEEDS_APART:
            raise ConfigError(f"[[nodes]]: count = {count!r} is not a number of nodes")
        found += [flatten_tables(settings)] * count
    return found
