"""The settings of one run: the sections of `swarm.config` and `protocol.config`, and what the process itself needs.

How values are found (flag, `--set`, environment, file, preset, default) is `node.layers`'s. This module says
which settings exist, which of them a resumed run may change, and how they are written as TOML.
"""

from pathlib import Path
from typing import Literal, Self

import tomli_w
from pydantic import BaseModel, Field, model_validator

from protocol.config import SwarmConfig
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

__all__ = ["MAY_CHANGE_ON_RESUME", "NetworkConfig", "RunConfig", "setting_values", "to_toml"]

# What a resumed run may set anew: how long it is, how it is watched, what makes it fit into memory, and its part in
# a swarm, since a run may learn alone today and with others tomorrow. Everything else decides which run this is.
# A name ends at a dot, so "engine" stands for all settings of that section.
MAY_CHANGE_ON_RESUME = (
    "checkpoint",
    "engine",
    "evaluation",
    "model.device",
    "network",
    "num_threads",
    "rounds",
    "sapo.external_negative_weight",
    "sapo.fill",
    "sapo.max_external_tokens",
    "sapo.num_broad",
    "sapo.num_external",
    "sapo.num_local",
    "sapo.publish",
    "sapo.replace_missing",
    "sapo.sampling",
    "sapo.swing_damping",
    "sapo.uniform_share",
    "scoring",
    "swarm",
    "trainer.logprob_chunk_tokens",
    "trainer.max_tokens_per_microbatch",
)


class NetworkConfig(Section):
    """How other nodes reach this one."""

    transport: Literal["hivemind", "libp2p"] = Field(
        "hivemind", description="what carries the bytes; nodes of the two meet over a bridge alone"
    )
    listen: tuple[str, ...] = Field(
        (), description="multiaddresses to listen on; empty: TCP on a free port, which is kept"
    )
    announce: tuple[str, ...] = Field((), description="multiaddresses that others are told, where they differ")
    mdns: bool = Field(True, description="whether nodes of the local network find this one and are found (libp2p)")
    relay: bool = Field(
        True, description="whether peers are asked through relays, and others relayed where this node can be reached"
    )
    auto_relay: bool = Field(False, description="whether to become reachable through a relay, behind a firewall")
    trusted_relays: tuple[str, ...] = Field(
        (), description="multiaddresses of relays for auto_relay; empty: any (hivemind: three minutes after the start)"
    )
    nat_port_map: bool = Field(True, description="whether the router is asked to forward the ports (hivemind)")
    auto_nat: bool = Field(True, description="whether peers are asked, and told, if they can be reached from outside")
    reachability: Literal["auto", "public", "private"] = Field(
        "auto", description="from outside; auto: found out by auto_nat (bootstrap: public)"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.trusted_relays and not self.auto_relay:
            raise ValueError("network.trusted_relays are for network.auto_relay: set it to true")
        if self.auto_relay and not self.relay:
            raise ValueError("network.auto_relay needs network.relay: set it to true")
        return self


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
    swarm: SwarmConfig = SwarmConfig()
    network: NetworkConfig = NetworkConfig()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        sapo, rollout = self.sapo, self.rollout
        if sapo.first_completions >= rollout.num_completions:
            raise ValueError(
                f"sapo.first_completions = {sapo.first_completions} leaves nothing for the hard questions: "
                f"set it below rollout.num_completions = {rollout.num_completions}, or to 0"
            )
        if sapo.first_completions and rollout.is_partial:
            raise ValueError(
                "sapo.first_completions waits for rewards in the middle of a round, which partial rollouts do not: "
                "set rollout.schedule=synchronous, or sapo.first_completions=0"
            )
        if sapo.num_external and sapo.num_broad >= sapo.num_local:
            raise ValueError(
                f"sapo.num_broad = {sapo.num_broad} leaves no question of the node's own: "
                f"set it below sapo.num_local = {sapo.num_local}"
            )
        if sapo.num_broad and rollout.is_partial and rollout.order == "arrival":
            raise ValueError(
                "sapo.num_broad needs a question's answers in the round that asks it: "
                "set rollout.order=submission, or sapo.num_broad=0"
            )
        return self


def setting_values(config: BaseModel, prefix: str = "") -> dict[str, object]:
    """Return every setting by its dotted name, in the order of declaration; sections within sections included."""
    values: dict[str, object] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
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
