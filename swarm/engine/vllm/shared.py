"""Weights in memory that the node and its engine process both see, so that a new policy crosses neither disk nor pipe.

The memory has no name: nothing of it is left when both processes are gone, however they end.
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["SharedWeights", "WeightPlace"]

_ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Where one weight lies."""

    name: str
    dtype: str  # as torch names it, without "torch."
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def num_bytes(self) -> int:
        """Its size."""
        num_bytes = int(getattr(torch, self.dtype).itemsize)
        for size in self.shape:
            num_bytes *= size
        return num_bytes


class SharedWeights:
    """A block of anonymous memory that holds one policy."""

    def __init__(self, fd: int, places: tuple[WeightPlace, ...]) -> None:
        self.fd, self.places = fd, places
        num_bytes = max((place.offset_bytes + place.num_bytes for place in places), default=0)
        self._memory = mmap.mmap(fd, max(num_bytes, 1))
        whole = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._views = {
            place.name: whole[place.offset_bytes :][: place.num_bytes]
            .view(getattr(torch, place.dtype))
            .view(place.shape)
            for place in places
        }

    @classmethod
    def allocate(cls, state: Mapping[str, torch.Tensor]) -> "SharedWeights":
        """Make room for such a state. A weight that two names share is held once, under the first."""
        places, end, seen = [], 0, set()
        for name, tensor in state.items():
            if tensor.numel() and tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            place = WeightPlace(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end)
            places.append(place)
            end += -(-place.num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        fd = _anonymous_file()
        os.ftruncate(fd, max(end, 1))
        return cls(fd, tuple(places))

    def write(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy a state in, from whatever device it is on."""
        for name, view in self._views.items():
            view.copy_(state[name])

    def plain_places(self) -> list[list[Any]]:
        """The fields of every place, as values that MessagePack has."""
        return [[each.name, each.dtype, list(each.shape), each.offset_bytes] for each in self.places]

    def views(self) -> dict[str, torch.Tensor]:
        """The weights as they lie there, by name."""
        return self._views

    def close(self) -> None:
        """Let go of the memory; it is freed when the other process has let go of it too."""
        self._views.clear()
        self._memory.close()
        os.close(self.fd)


def _anonymous_file() -> int:
    """Return a file in memory without a name; on systems that lack them, one on disk that is already deleted."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("swarm-weights")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
