"""Weights on a GPU, seen by the engine process where the trainer has them: nothing crosses the memory of the host.

CUDA and ROCm let a process open the memory of another by a handle. torch takes and opens them; what lies between is
plain values, so that a message about them is one like any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.multiprocessing import reductions

__all__ = ["from_plain", "handles_of", "opened", "plain"]


def handles_of(state: Mapping[str, torch.Tensor]) -> tuple[list[list[Any]], list[torch.Tensor]]:
    """Return [name, handle] of every weight, and what has to be kept until they were opened and read.

    A weight that two names share is named once, by the first.
    """
    handles, kept, seen = [], [], set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        tensor = tensor.detach().contiguous()
        kept.append(tensor)
        handles.append([name, plain(reductions.reduce_tensor(tensor)[1])])
    if kept:
        torch.cuda.synchronize(kept[0].device)  # the other process reads beside this one's stream
    return handles, kept


def opened(handles: Sequence[Sequence[Any]], device_index: int) -> dict[str, torch.Tensor]:
    """Return the weights that handles stand for, as memory of the other process, on this one's device."""
    return {name: reductions.rebuild_cuda_tensor(*from_plain(handle, device_index)) for name, handle in handles}


def plain(arguments: Sequence[Any]) -> list[Any]:
    """Return what torch rebuilds a tensor from as values that MessagePack has."""
    _, size, stride, offset, _, dtype, _, *memory = arguments
    return [list(size), list(stride), offset, str(dtype).removeprefix("torch."), *memory]


def from_plain(values: Sequence[Any], device_index: int) -> tuple[Any, ...]:
    """Return `plain`'s values as torch wants them. Processes number devices by themselves: this one's is given."""
    size, stride, offset, dtype, *memory = values
    storage = torch.storage.TypedStorage
    shape, steps = torch.Size(size), tuple(stride)
    return (torch.Tensor, shape, steps, offset, storage, getattr(torch, dtype), device_index, *memory)
