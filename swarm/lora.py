"""Low-rank adapters in a policy, through peft: put them in, and merge them for whoever needs plain weights."""

from typing import Any

import torch
from torch import Tensor, nn

from swarm.config import LoraConfig

__all__ = ["add_adapters", "merged_state"]

_ADAPTER = "default"


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Put trainable adapters into the model, in place, and freeze everything else. They start as no change."""
    import peft

    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.target_modules, lora_dropout=0.0, bias="none"
    )
    peft.get_peft_model(model, settings, adapter_name=_ADAPTER)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's `state_dict` as it was before adapters were put in, with their effect merged.

    Layers without adapters are returned as live tensors.
    """
    state: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner = name.rpartition(".base_layer.")[0] if ".base_layer." in name else ""
        if not owner:
            state[name] = tensor
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            layer: Any = modules[owner]
            with torch.no_grad():
                delta: Tensor = layer.get_delta_weight(_ADAPTER)
                tensor = (tensor.to(torch.float32) + delta.to(torch.float32)).to(tensor.dtype)
        state[plain] = tensor
    return state
