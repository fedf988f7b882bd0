"""Adapters as messages: with LoRA they are all that crosses to the engine process, which merges them itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swarm.lora import Adapter

__all__ = ["packed", "unpacked"]


def packed(adapters: Mapping[str, Adapter]) -> list[list[Any]]:
    """Return adapters as values that MessagePack has."""
    return [
        [name, _plain(adapter.a), _plain(adapter.b), adapter.scaling, adapter.is_transposed]
        for name, adapter in adapters.items()
    ]


def unpacked(values: Sequence[Sequence[Any]], device: torch.device) -> dict[str, Adapter]:
    """Return what was packed, on a device."""
    return {
        name: Adapter(_tensor(a, device), _tensor(b, device), scaling, is_transposed)
        for name, a, b, scaling, is_transposed in values
    }


def _plain(tensor: torch.Tensor) -> list[Any]:
    raw = tensor.detach().cpu().contiguous()
    return [str(raw.dtype).removeprefix("torch."), list(raw.shape), raw.view(torch.uint8).numpy().tobytes()]


def _tensor(values: Sequence[Any], device: torch.device) -> torch.Tensor:
    dtype, shape, raw = values
    return torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype)).view(shape).to(device)
