"""What devices are: the one place that knows how CUDA, ROCm, MPS and CPUs differ.

`look_at` asks torch and the system for a `Record`; `facts` reads from it what the rest of the project wants to know.
Tests give `facts` records of machines that are not at hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch

__all__ = ["DeviceFacts", "DeviceKind", "Record", "facts", "look_at"]

DeviceKind = Literal["cuda", "rocm", "cpu", "mps"]

_MIN_BF16_CAPABILITY = (8, 0)  # Ampere: before it, CUDA emulates bf16


@dataclass(frozen=True, slots=True)
class Record:
    """What torch and the system say of one device."""

    device: str  # torch's name of its type: ROCm devices are "cuda" there
    name: str
    total_bytes: int
    free_bytes: int
    hip: str | None = None  # torch.version.hip
    capability: tuple[int, int] | None = None  # of a GPU; on ROCm torch makes one up from the architecture
    cpu: Mapping[str, bool | int | str] = field(default_factory=dict)  # torch.cpu.get_capabilities()
    num_gpus: int = 0  # that torch sees


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What follows from it."""

    kind: DeviceKind
    name: str
    total_bytes: int
    free_bytes: int  # of the memory that models and caches take
    has_fast_bf16: bool  # in hardware
    has_graphs: bool  # whether decode steps can be recorded
    num_gpus: int = 0  # on this machine, of this kind


def facts(record: Record) -> DeviceFacts:
    """Read a record."""
    if record.device == "cuda":
        kind: DeviceKind = "rocm" if record.hip else "cuda"
        has_bf16 = kind == "rocm" or (record.capability or (0, 0)) >= _MIN_BF16_CAPABILITY
    elif record.device == "mps":
        kind, has_bf16 = "mps", False
    else:
        kind, has_bf16 = "cpu", bool(record.cpu.get("avx512_bf16") or record.cpu.get("amx_bf16"))
    return DeviceFacts(
        kind,
        record.name,
        record.total_bytes,
        record.free_bytes,
        has_bf16,
        has_graphs=kind in ("cuda", "rocm"),
        num_gpus=record.num_gpus,
    )


def look_at(device: torch.device) -> DeviceFacts:
    """Ask torch and the system about a device that is there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        properties = torch.cuda.get_device_properties(device)
        capability = (int(properties.major), int(properties.minor))
        num_gpus = torch.cuda.device_count()
        return facts(Record("cuda", properties.name, total, free, torch.version.hip, capability, num_gpus=num_gpus))
    memory = psutil.virtual_memory()
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return facts(Record("mps", "Apple GPU", total, total - torch.mps.driver_allocated_memory()))
    return facts(Record("cpu", "CPU", memory.total, memory.available, cpu=torch.cpu.get_capabilities()))
