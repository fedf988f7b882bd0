"""The compiled decode kernels for CPUs, where the machine that installed the package had a C compiler.

`kernels()` finds and loads them; without them the engine runs on torch's own operations.
"""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import torch  # noqa: F401 - loads the OpenMP runtime whose threads the kernels use

__all__ = ["INSTRUCTION_SETS", "Kernels", "kernels"]

INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "AVX-512 bf16")


class Kernels:
    """The loaded library. `instruction_set` indexes INSTRUCTION_SETS."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, i32 = ctypes.c_void_p, ctypes.c_int32
        library.swarm_best_isa.restype = i32
        self.instruction_set: int = library.swarm_best_isa()
        self.forward = library.swarm_forward
        self.forward.argtypes, self.forward.restype = [pointer, i32, pointer, pointer, pointer, i32, pointer], None
        self.logits = library.swarm_logits
        self.logits.argtypes, self.logits.restype = [pointer, i32, pointer, i32, pointer], None


@cache
def kernels() -> Kernels | None:
    """Return the kernels, or None where they were not compiled."""
    spec = importlib.util.find_spec("swarm.engine.torch.native._kernels")
    if spec is None or spec.origin is None:
        return None
    return Kernels(Path(spec.origin))
