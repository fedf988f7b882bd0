"""The compiled kernels for CPUs, for decoding and training, where the machine that installed it had a C compiler.

    kernels.c    what is compiled, once per instruction set: kernels.h (decoding), attention.h and training.h
    attention    attention of a training step, over packed rows
    training     the other parts of a training step that are no matrix products

The engine's side is `engine.torch.native`. `kernels()` finds and loads them; without them everything runs on
torch's own operations.
"""

import ctypes
import importlib.util
import mmap
import sys
from functools import cache
from pathlib import Path

import torch

__all__ = ["INSTRUCTION_SETS", "Kernels", "huge_pages", "kernels"]

INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "AVX-512 bf16")


class Kernels:
    """The loaded library. `instruction_set` indexes INSTRUCTION_SETS."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, i32 = ctypes.c_void_p, ctypes.c_int32
        library.swarm_best_isa.restype = i32
        self.instruction_set: int = library.swarm_best_isa()
        self.forward = library.swarm_forward
        self.forward.argtypes, self.forward.restype = [pointer, i32, pointer, pointer], None
        self.logits = library.swarm_logits
        self.logits.argtypes, self.logits.restype = [pointer, i32, pointer, i32, pointer], None
        self.attention = library.swarm_attention
        self.attention.argtypes, self.attention.restype = [pointer, i32, i32], None
        self.training = library.swarm_training
        self.training.argtypes, self.training.restype = [pointer, i32], None
        self._block_mass = library.swarm_block_mass
        self._block_mass.argtypes, self._block_mass.restype = [i32, i32, pointer, i32, i32, i32, pointer], None

    def block_mass(self, logits: torch.Tensor, width: int) -> torch.Tensor:
        """Return the log-sum-exp of each block of `width` logits, a multiple of 16 that divides the vocabulary.

        logits: float32 [num_rows, vocab]. returns: [num_rows, vocab / width].
        """
        logits = logits.contiguous()  # an expanded row is read as if it were many
        num_rows, vocab = logits.shape
        out = torch.empty(num_rows, vocab // width)
        self._block_mass(
            torch.get_num_threads(), self.instruction_set, logits.data_ptr(), num_rows, vocab, width, out.data_ptr()
        )
        return out


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages under a large tensor that nothing has been written to yet, where the system has them.

    Weights and caches are read in long sequential runs: with small pages the processor's prefetching stops
    every 4 KiB. It is a hint: what it returns changes nothing.
    """
    page, num_bytes = 1 << 21, tensor.numel() * tensor.element_size()
    if sys.platform == "linux" and num_bytes >= page:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), mmap.MADV_HUGEPAGE)
    return tensor


@cache
def kernels() -> Kernels | None:
    """Return the kernels, or None where they were not compiled."""
    spec = importlib.util.find_spec("swarm.native._kernels")
    if spec is None or spec.origin is None:
        return None
    return Kernels(Path(spec.origin))
