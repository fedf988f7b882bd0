"""The settings of one run: the sections of `swarm.config`, and what the process itself needs.

How values are found (flag, `--set`, environment, file, preset, default) is `node.layers`'s. This module says
which settings exist, which of them a resumed run may change, and how they are written as TOML.
"""

from pathlib import Path

import tomli_w
from pydantic import Field

from swarm.config import (
    CheckpointConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    RolloutConfig,
    SapoConfig,
    ScoringConfig,
    Section,
    TasksConfig,
    TrainerConfig,
)

__all__ = ["MAY_CHANGE_ON_RESUME", "RunConfig", "setting_values", "to_toml"]

# What a resumed run may set anew: how long it is, how it is watched, and what makes it fit into memory. Everything
# else decides which run this is. A name ends at a dot, so "engine" stands for all settings of that section.
MAY_CHANGE_ON_RESUME = (
    "checkpoint",
    "engine",
    "evaluation",
    "model.device",
    "num_threads",
    "rounds",
    "scoring",
    "trainer.logprob_chunk_tokens",
    "trainer.max_tokens_per_microbatch",
)


class RunConfig(Section):
    """Everything that decides what a run does."""

    seed: int = Field(0, ge=0, lt=2**63, description="fixes everything random in the run")
    rounds: int = Field(100, ge=1, description="rounds until the run is finished")
    num_threads: int = Field(0, ge=0, description="threads of one torch operation; 0: what torch chooses")
    model: ModelConfig = ModelConfig()
    tasks: TasksConfig = TasksConfig()
    rollout: RolloutConfig = RolloutConfig()
    sapo: SapoConfig = SapoConfig()
    trainer: TrainerConfig = TrainerConfig()
    engine: EngineConfig = EngineConfig()
    scoring: ScoringConfig = ScoringConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


def setting_values(config: Section, prefix: str = "") -> dict[str, object]:
    """Return every setting by its dotted name, in the order of declaration; sections within sections included."""
    values: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, Section):
            values.update(setting_values(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def to_toml(config: RunConfig) -> str:
    """Return the configuration as TOML. A setting that is None is left out, since TOML has no such value."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True), multiline_strings=True)


def absolute_if_file(name: str) -> str:
    """Return the absolute path of a file or folder that exists, else the name as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
