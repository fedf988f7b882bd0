"""Checkpoints: tensors in safetensors, everything else in MessagePack, in one folder per checkpoint.

A checkpoint is written beside, synced, then renamed; so that one that has its final name is whole, unless the
disk failed later, which its checksums show. The newest readable one is used. What the tensors mean is the
trainer's; what happened after the checkpoint is the journal's. torch is imported by who first reads or writes one.
"""

import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgpack
from safetensors import SafetensorError

from swarm.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Checkpoints"]

_FORMAT = 1
_TENSORS = "state.safetensors"
_META = "meta.msgpack"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a round. `tensors` are on the CPU."""

    round_index: int
    tensors: "Mapping[str, torch.Tensor]"
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run folder, newest `keep` of them kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def rounds(self) -> list[int]:
        """Return the rounds that have a checkpoint, oldest first."""
        return sorted(int(path.name.removeprefix("round-")) for path in self._folder.glob("round-*"))

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, and delete those that it makes superfluous.

        Tensors must not change meanwhile. Raises CheckpointError where it cannot be written; the checkpoints that
        exist are then untouched.
        """
        final = self._path(checkpoint.round_index)
        partial = self._folder / f".{final.name}.partial"
        try:
            self.remove_partial()
            partial.mkdir(parents=True)
            self._write_files(partial, checkpoint)
            _sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self._folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error)
            kept = self.rounds()
            rest = f"round {kept[-1]} and the journal after it are safe" if kept else "the journal is safe"
            raise CheckpointError(
                f"cannot write a checkpoint to {self._folder}: {reason}; {rest}; free space, then go on with --resume"
            ) from error
        for round_index in self.rounds()[: -self._keep]:
            shutil.rmtree(self._path(round_index))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest readable checkpoint, or None; and one line about each newer one that is damaged."""
        damaged: list[str] = []
        for round_index in reversed(self.rounds()):
            try:
                return self._read(round_index), damaged
            except (OSError, SafetensorError, ValueError, KeyError, msgpack.UnpackException) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                damaged.append(f"{self._path(round_index)} is damaged ({reason})")
        return None, damaged

    def remove_partial(self) -> None:
        """Remove what a process that was killed left half written."""
        for path in self._folder.glob(".*.partial"):
            shutil.rmtree(path)

    def oldest_needed(self) -> int:
        """The round after which the journal must be kept, so that the oldest kept checkpoint can be resumed from."""
        rounds = self.rounds()
        return rounds[0] if len(rounds) >= self._keep else 0

    def _path(self, round_index: int) -> Path:
        return self._folder / f"round-{round_index:08d}"

    def _write_files(self, folder: Path, checkpoint: Checkpoint) -> None:
        from safetensors.torch import save_file

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, folder / _TENSORS)
        plain = {
            "format": _FORMAT,
            "round": checkpoint.round_index,
            "meta": dict(checkpoint.meta),
            "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
        }
        payload = cast(bytes, msgpack.packb(plain))
        (folder / _META).write_bytes(zlib.crc32(payload).to_bytes(4, "little") + payload)
        for name in (_TENSORS, _META):
            _sync(folder / name)

    def _read(self, round_index: int) -> Checkpoint:
        from safetensors.torch import load_file

        folder = self._path(round_index)
        data = (folder / _META).read_bytes()
        if zlib.crc32(data[4:]).to_bytes(4, "little") != data[:4]:
            raise ValueError(f"{_META} does not match its checksum")
        plain = msgpack.unpackb(data[4:])
        if plain["format"] != _FORMAT:
            raise ValueError(f"its format {plain['format']} is not {_FORMAT}")
        tensors = load_file(folder / _TENSORS)
        if tensors.keys() != plain["checksums"].keys():
            raise ValueError(f"{_TENSORS} holds other tensors than {_META} says")
        for name, tensor in tensors.items():
            if _checksum(tensor) != plain["checksums"][name]:
                raise ValueError(f"{name} does not match its checksum")
        return Checkpoint(plain["round"], tensors, plain["meta"])


def _checksum(tensor: "torch.Tensor") -> int:
    import torch

    flat = tensor.reshape(-1)  # [num_elements]
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
