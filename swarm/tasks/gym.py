"""reasoning-gym tasks as sources: name and settings checked, items by (seed, index), safe scorers only.

Which scorers are safe is `gym_safety`'s to say. The question is reasoning-gym's wording as it is.
"""

import dataclasses
import difflib
import functools
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

from swarm.errors import InvalidTaskRef, TaskError
from swarm.tasks.base import SourceSpec, TaskSource, stable_hash
from swarm.tasks.gym_safety import PRESAMPLED, REFUSED, REPLACED, SAFE
from swarm.tasks.gym_scorers import REPLACEMENTS

__all__ = ["GYM_PREFIX", "ReasoningGymSource", "canonical_config", "import_reasoning_gym"]

GYM_PREFIX: Final = "reasoning_gym/"
_NUM_INDICES: Final = 2**31  # reasoning-gym adds index to seed; both below 2**31 keep the sum a 32-bit seed
_NUM_PRESAMPLED: Final = 512  # items of one short dataset, where a dataset draws all of its items at once
_MAX_DATASETS: Final = 32  # seeds whose datasets are kept
_MAX_ENTRIES: Final = 1024  # regenerated items that are kept


_PLOT_MODULES: Final = (
    "matplotlib",
    "matplotlib.pyplot",
    "matplotlib.animation",
    "matplotlib.collections",
    "mpl_toolkits",
    "mpl_toolkits.mplot3d",
)


def _matplotlib_stand_ins() -> dict[str, ModuleType]:
    """Return empty modules under matplotlib's names."""
    modules = {name: ModuleType(name) for name in _PLOT_MODULES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules["mpl_toolkits.mplot3d"].Axes3D = object  # type: ignore[attr-defined]
    return modules


def import_reasoning_gym() -> ModuleType:
    """Import reasoning-gym without matplotlib, which one of its libraries imports for plots nobody draws.

    That halves the start of every scoring process, and keeps matplotlib from writing caches there. The compiler of
    `bf`, which prints a dot for every pass, is made silent: stdout may carry a node's rows.
    """
    if "reasoning_gym" not in sys.modules and "matplotlib" not in sys.modules:
        sys.modules.update(_matplotlib_stand_ins())
        try:
            import cellpylib  # type: ignore[import-untyped]  # noqa: F401
        finally:
            for name in _PLOT_MODULES:
                del sys.modules[name]
    import reasoning_gym
    from reasoning_gym.code.contrib.bfit.Compiler import Optimizer

    vars(Optimizer)["print"] = lambda *_, **__: None
    return reasoning_gym  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    """Return a setting as JSON holds it; what JSON does not know is spelled out, and sets are ordered."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return value if isinstance(value, str | int | float | bool | None) else f"{type(value).__name__}:{value}"


def canonical_config(config: Mapping[str, Any]) -> str:
    """Return the one JSON text of some settings."""
    return json.dumps(_plain(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _task_name(name: str) -> str:
    """Return the name of a task that is registered and may be scored, or raise TaskError."""
    import_reasoning_gym()
    from reasoning_gym.factory import DATASETS

    task = name.removeprefix(GYM_PREFIX)
    if task in REFUSED:
        raise TaskError(f"task {task!r} is refused: {REFUSED[task]}")
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "name a reasoning-gym task or a .jsonl file"
        raise TaskError(f"there is no task {task!r}; {hint}")
    if task not in SAFE and task not in REPLACED:
        raise TaskError(
            f"task {task!r} is new in this version of reasoning-gym and its scorer is not reviewed; choose another"
        )
    return task


class ReasoningGymSource(TaskSource):
    """One reasoning-gym task with one configuration."""

    num_items = None

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._task = _task_name(name)
        self._config = dict(config)
        self.name = GYM_PREFIX + self._task
        dataset = self._checked_dataset()
        settings = {
            field.name: getattr(dataset.config, field.name)
            for field in dataclasses.fields(dataset.config)
            if field.name not in ("seed", "size")
        }
        version = importlib.metadata.version("reasoning-gym")
        self.digest = format(stable_hash("a", self.name, canonical_config(settings), version), "016x") + format(
            stable_hash("b", self.name, canonical_config(settings), version), "016x"
        )
        self._replacement = REPLACEMENTS.get(self._task)
        self._dataset = functools.lru_cache(maxsize=_MAX_DATASETS)(self._make_dataset)
        self._entry = functools.lru_cache(maxsize=_MAX_ENTRIES)(self._make_entry)

    @property
    def spec(self) -> SourceSpec:
        """What another process needs to build the same source."""
        config_json = json.dumps(self._config, sort_keys=True)
        return SourceSpec(kind="reasoning_gym", target=self._task, config_json=config_json, digest=self.digest)

    def question(self, seed: int, index: int) -> str:
        """Return reasoning-gym's question."""
        return str(self._entry(seed, index)["question"])

    def score(self, seed: int, index: int, answer: str) -> float:
        """Return the scorer's value for an answer. Sandbox only: the scorer reads hostile text."""
        entry = self._entry(seed, index)
        dataset = self._dataset_of(seed, index)[0]
        if self._replacement is not None:
            return self._replacement(answer, entry, dataset.config)
        return float(dataset.score_answer(answer, entry))

    def _checked_dataset(self) -> Any:
        """Make one dataset; raise TaskError where the settings are not the task's, or not possible."""
        from reasoning_gym.factory import DATASETS

        fields = {field.name for field in dataclasses.fields(DATASETS[self._task][1])} - {"seed", "size"}
        unknown = sorted(set(self._config) - fields)
        if unknown:
            raise TaskError(f"task {self._task!r} has no setting {unknown[0]!r}; it has {', '.join(sorted(fields))}")
        try:
            return self._make_dataset(0, _NUM_PRESAMPLED)
        except (AssertionError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0] or "its settings exclude one another"
            raise TaskError(f"task {self._task!r} refuses its settings: {reason}; change its config") from error

    def _make_dataset(self, seed: int, size: int) -> Any:
        return import_reasoning_gym().create_dataset(self._task, seed=seed, size=size, **self._config)

    def _dataset_of(self, seed: int, index: int) -> tuple[Any, int]:
        """Return the dataset that holds an item, and the item's place in it."""
        if not 0 <= index < _NUM_INDICES:
            raise InvalidTaskRef(f"{self.name} has no item {index}")
        if self._task in PRESAMPLED:
            chunk, place = divmod(index, _NUM_PRESAMPLED)
            return self._dataset(stable_hash("presampled", seed, chunk) % _NUM_INDICES, _NUM_PRESAMPLED), place
        return self._dataset(stable_hash("reasoning-gym seed", seed) % _NUM_INDICES, _NUM_INDICES), index

    def _make_entry(self, seed: int, index: int) -> dict[str, Any]:
        """Generate an item. The boundary at which whatever a generator raises means: no such item."""
        dataset, place = self._dataset_of(seed, index)
        try:
            entry: dict[str, Any] = dataset[place]
        except Exception as error:
            raise InvalidTaskRef(f"{self.name} cannot make item {index} of seed {seed}: {error!r}") from error
        return entry
