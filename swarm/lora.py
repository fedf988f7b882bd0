"""Low-rank adapters in a policy, through peft: put them in, and merge them for whoever needs plain weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swarm.config import LoraConfig

__all__ = ["AdaptedState", "Adapter", "add_adapters", "policy_state"]

_ADAPTER = "default"


@dataclass(frozen=True, slots=True)
class Adapter:
    """What is added to one weight: `scaling` times the product of `b` and `a`."""

    a: Tensor  # [rank, num_inputs]
    b: Tensor  # [num_outputs, rank]
    scaling: float
    is_transposed: bool  # whether the weight is kept as [num_inputs, num_outputs]

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with its adapter, computed in float32, in the weight's own dtype."""
        delta = self.b.to(torch.float32) @ self.a.to(torch.float32) * self.scaling
        return (weight.to(torch.float32) + (delta.T if self.is_transposed else delta)).to(weight.dtype)


class AdaptedState(Mapping[str, Tensor]):
    """A policy with adapters as a `state_dict` of the model without them: each weight is merged when it is asked for.

    Who wants less than that takes `base`, which training leaves as it is, and `adapters`.
    """

    def __init__(self, base: Mapping[str, Tensor], adapters: Mapping[str, Adapter]) -> None:
        """adapters: by the name of the weight that they change."""
        self.base, self.adapters = base, adapters
        self._merged: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        adapter = self.adapters.get(name)
        if adapter is None:
            return self.base[name]
        if name not in self._merged:
            self._merged[name] = adapter.merged(self.base[name])
        return self._merged[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put trainable adapters into the model, in place, and freeze everything else. They start as no change."""
    import peft

    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, lora_dropout=0.0, bias="none"
    )
    peft.get_peft_model(model, settings, adapter_name=_ADAPTER)


def policy_state(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the model's weights under the names that they had before adapters were put in: live tensors."""
    state = model.state_dict()
    adapters: dict[str, Adapter] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            adapters[f"{name}.weight"] = _adapter(layer)
    if not adapters:
        return state
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    return AdaptedState(base, adapters)


def _adapter(layer: Any) -> Adapter:
    """Return the adapter of one of peft's layers."""
    scaling = float(layer.scaling[_ADAPTER])
    if _ADAPTER in layer.lora_embedding_A:
        return Adapter(layer.lora_embedding_A[_ADAPTER], layer.lora_embedding_B[_ADAPTER], scaling, is_transposed=True)
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    return Adapter(a.detach(), b.detach(), scaling, is_transposed=layer.fan_in_fan_out)
