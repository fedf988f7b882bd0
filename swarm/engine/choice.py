"""Chooses the rollout engine and makes it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from swarm.config import EngineConfig
from swarm.devices import DeviceFacts, look_at
from swarm.engine.base import Engine
from swarm.engine.vllm.installed import VllmInstall, find_vllm, why_not
from swarm.errors import EngineError

if TYPE_CHECKING:
    from swarm.policy import Policy

__all__ = ["EngineChoice", "choose_engine", "choose_for", "make_engine"]


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which engine, and why."""

    backend: Literal["torch", "vllm"]
    reason: str


def choose_engine(config: EngineConfig, device: DeviceFacts, install: VllmInstall | None) -> EngineChoice:
    """Choose. Raises EngineError where the settings ask for a vLLM that cannot run here, or cannot do what they ask."""
    choice = _choose(config, device, install)
    size = config.tensor_parallel_size
    if size > 1 and choice.backend != "vllm":
        raise EngineError(f"engine.tensor_parallel_size={size} is for vLLM, not torch ({choice.reason}): set it to 1")
    if size > max(1, device.num_gpus):
        raise EngineError(f"engine.tensor_parallel_size={size}, and torch sees {device.num_gpus} GPUs: lower it")
    return choice


def _choose(config: EngineConfig, device: DeviceFacts, install: VllmInstall | None) -> EngineChoice:
    if config.backend == "torch":
        return EngineChoice("torch", "engine.backend names it")
    problem = why_not(install, device)
    if config.backend == "vllm":
        if problem is not None:
            raise EngineError(problem)
        return EngineChoice("vllm", "engine.backend names it")
    if config.speculation != "off":
        return EngineChoice("torch", "engine.speculation is on, which has been measured with it alone")
    if device.kind == "cpu":
        return EngineChoice("torch", "it is the faster one on CPUs")
    if problem is not None:
        return EngineChoice("torch", problem)
    return EngineChoice("vllm", f"it is installed, and this is a {device.kind} device")


def choose_for(config: EngineConfig, device: torch.device) -> EngineChoice:
    """Choose for a device of this machine, with the vLLM that is installed. Raises EngineError as `choose_engine`."""
    return choose_engine(config, look_at(device), find_vllm())


def make_engine(policy: "Policy", config: EngineConfig, *, max_seq_len: int) -> Engine:
    """Start the engine that suits. max_seq_len: prompt and completion, in tokens; 0 takes the config's."""
    if choose_for(config, policy.model.device).backend == "vllm":
        from swarm.engine.vllm import VllmEngine

        return VllmEngine(policy.model, eos_token_ids=policy.eos_token_ids, config=config, max_seq_len=max_seq_len)
    from swarm.engine.torch import TorchEngine

    return TorchEngine(policy.model, eos_token_ids=policy.eos_token_ids, config=config, max_seq_len=max_seq_len)
