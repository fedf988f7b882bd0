"""Finds the value of every setting, and keeps where it came from.

    flag > --set > environment > file > run folder (on resume) > preset of the model > default

Environment variables are named SWARM_NODE_<SECTION>__<KEY>, e.g. SWARM_NODE_TRAINER__LEARNING_RATE. Which
settings exist is `node.config`'s.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from node.config import RunConfig, absolute_if_file, setting_values
from swarm.config import TaskSourceConfig
from swarm.errors import UserError
from swarm.models.presets import PRESETS, preset

__all__ = [
    "ConfigError",
    "Layer",
    "ResolvedConfig",
    "flatten_tables",
    "parse_task_sources",
    "read_assignments",
    "read_environment",
    "read_toml",
    "resolve",
    "setting_fields",
    "shown",
]

_ENVIRONMENT_PREFIX = "SWARM_NODE_"


class ConfigError(UserError):
    """A setting that does not exist, or a value that it cannot have."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Values from one place, by dotted name. `origins` may name a place more exactly (a line of a file)."""

    origin: str
    values: Mapping[str, object]
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin_of(self, name: str) -> str:
        """Where this layer got a value."""
        return self.origins.get(name, self.origin)


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A configuration, and the origin of each of its settings by dotted name."""

    config: RunConfig
    origins: Mapping[str, str]


def setting_fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Return the declaration of every setting by dotted name."""
    fields: dict[str, FieldInfo] = {}
    for name, info in section.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            fields.update(setting_fields(annotation, f"{prefix}{name}."))
        else:
            fields[f"{prefix}{name}"] = info
    return fields


_FIELDS = setting_fields()


def parse_task_sources(text: str) -> list[dict[str, object]]:
    """Read `products:2,chain_sum` or `questions.jsonl:1`: names or paths, each with an optional weight."""
    sources: list[dict[str, object]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, weight = part.rpartition(":")
        try:
            sources.append({"name": name, "weight": float(weight)} if colon else {"name": part})
        except ValueError:
            raise ConfigError(f"task weight {weight!r} in {part!r} is not a number; write NAME:WEIGHT") from None
    if not sources:
        raise ConfigError("no task is named; write for example --tasks products:2,chain_sum")
    return sources


def read_toml(path: Path) -> Layer:
    """Read a TOML file; every value keeps the file and, where it can be found, the line as its origin."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_syntax_message(path, text, str(error))) from None
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    values = flatten_tables(tables)
    lines = _lines_of_keys(text)
    origins = {name: f"{path}:{lines[name]}" for name in values if name in lines}
    return Layer(str(path), values, origins)


def _syntax_message(path: Path, text: str, message: str) -> str:
    """Put the position that tomllib appends, as in "… (at line 3, column 5)", in front as FILE:LINE."""
    reason, found, position = message.rpartition(" (at line ")
    line = position.split(",")[0] if found else str(len(text.splitlines()))
    return f"{path}:{line}: not valid TOML: {reason if found else message}"


def flatten_tables(table: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Flatten tables as far as the settings are nested; a setting that is itself a table stays whole."""
    values: dict[str, object] = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in _FIELDS:
            values.update(flatten_tables(value, f"{name}."))
        else:
            values[name] = value
    return values


def _lines_of_keys(text: str) -> dict[str, int]:
    """Return the line of every plain `key = value` and `[[table]]`, by dotted name."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.split("#")[0].strip()
        if stripped.startswith("["):
            name = stripped.strip("[] ")
            lines.setdefault(name, number)
            table = f"{name}."
        elif "=" in stripped:
            lines.setdefault(f"{table}{stripped.split('=')[0].strip()}", number)
    return lines


def read_environment(environment: Mapping[str, str] = os.environ) -> Layer:
    """Read the settings among the environment variables; one with the prefix that is no setting is refused."""
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for variable in sorted(environment):
        if not variable.startswith(_ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(_ENVIRONMENT_PREFIX).lower().replace("__", ".")
        values[name] = environment[variable]
        origins[name] = f"environment {variable}"
    return Layer("environment", values, origins)


def read_assignments(assignments: Iterable[str]) -> Layer:
    """Read what `--set key=value` was given."""
    values: dict[str, object] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set {assignment!r} is not of the form key=value, as in trainer.learning_rate=1e-5")
        values[name.strip()] = text.strip()
    return Layer("--set", values)


def resolve(layers: Iterable[Layer], preset: Callable[[str], Mapping[str, Any]] = preset) -> ResolvedConfig:
    """Lay the layers over each other, the first one winning, over the preset of the model that they name."""
    given = list(layers)
    for layer in given:
        for name in layer.values:
            if name not in _FIELDS:
                raise ConfigError(_unknown_message(name, layer.origin_of(name)))
    values: dict[str, object] = {}
    origins: dict[str, str] = {}

    def lay(layer: Layer) -> None:
        for name, value in layer.values.items():
            if name not in values:
                values[name] = _check(name, value, layer.origin_of(name))
                origins[name] = layer.origin_of(name)

    for layer in given:
        lay(layer)
    model_name = str(values.get("model.name", RunConfig().model.name))
    lay(Layer(f"preset {model_name}", flatten_tables(preset(model_name))))
    try:
        config = RunConfig.model_validate(_nest(_with_absolute_paths(values)))
    except ValidationError as error:  # of settings that are each possible and not together
        first = error.errors()[0]
        where = "".join(f"{part}." for part in first["loc"]).removesuffix(".")
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: {reason}" if where else reason) from None
    return ResolvedConfig(config, {name: origins.get(name, "default") for name in setting_values(config)})


def _with_absolute_paths(values: Mapping[str, object]) -> dict[str, object]:
    """Make paths absolute, so that the resolved configuration means the same in any working directory."""
    resolved = dict(values)
    if resolved.get("model.name") not in {None, *PRESETS}:
        resolved["model.name"] = absolute_if_file(str(resolved["model.name"]))
    if "tasks.sources" in resolved:
        sources = [source.model_dump() for source in resolved["tasks.sources"]]  # type: ignore[attr-defined]
        resolved["tasks.sources"] = [
            source | {"name": absolute_if_file(source["name"])} if source["name"].endswith(".jsonl") else source
            for source in sources
        ]
    return resolved


def _check(name: str, value: object, origin: str) -> object:
    """Return the value as the setting's own type. A string is read as TOML would read it, or taken as it is."""
    info = _FIELDS[name]
    adapter: TypeAdapter[object] = TypeAdapter(_annotated(info))
    candidates = [value]
    if isinstance(value, str):
        candidates = [parse_task_sources(value)] if name == "tasks.sources" else [*_as_toml(value), value]
        if info.annotation == tuple[str, ...]:
            candidates.append([part.strip() for part in value.split(",") if part.strip()])
    error: ValidationError | None = None
    for candidate in candidates:
        try:
            return adapter.validate_python(candidate)
        except ValidationError as failure:
            error = error or failure
    assert error is not None
    first = error.errors()[0]
    where = ".".join((name, *(str(part) for part in first["loc"])))
    shown = first["input"] if isinstance(first["input"], str | int | float | bool) else value
    reason = first["msg"][:1].lower() + first["msg"][1:]
    raise ConfigError(f"{where} = {shown!r} ({origin}): {reason}") from None


def _annotated(info: FieldInfo) -> Any:
    """Return the field's type with its limits, as one annotation."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _as_toml(text: str) -> list[object]:
    """Read `1e-5`, `true`, `[1, 2]` or `"x"` as TOML does; nothing where it is no TOML value."""
    try:
        return [tomllib.loads(f"value = {text}")["value"]]
    except tomllib.TOMLDecodeError:
        return []


def _nest(values: Mapping[str, object]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for name, value in values.items():
        *path, key = name.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[key] = value
    return tables


def _unknown_message(name: str, origin: str) -> str:
    """Name the nearest setting: by the whole dotted name, or by the last part where the section is missing."""
    known = list(_FIELDS)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        last = {key.rpartition(".")[2]: key for key in reversed(known)}
        close = [last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], list(last), n=1, cutoff=0.6)]
    hint = f"did you mean {close[0]}?" if close else "`swarm-node config show` lists all settings"
    return f"unknown setting {name} ({origin}); {hint}"


def shown(value: object) -> str:
    """Return a value as a person would write it for `--set`, as far as that is short."""
    if isinstance(value, tuple):
        return ",".join(_shown_source(item) if isinstance(item, TaskSourceConfig) else str(item) for item in value)
    if isinstance(value, bool):
        return str(value).lower()
    return "(none)" if value is None else str(value)


def _shown_source(source: TaskSourceConfig) -> str:
    weight = "" if source.weight == 1 else f":{source.weight:g}"
    return f"{source.name}{weight}" + (f" {source.config}" if source.config else "")
