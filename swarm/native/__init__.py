"""The compiled kernels for CPUs, for decoding and training, where the machine that installed it had a C compiler.

    kernels.c    what is compiled, once per instruction set: kernels.h (decoding), draw.h, attention.h, training.h
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


class _Draw(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("num_threads", "num_rows", "num_logits", "vocab", "width")),
        *((name, ctypes.c_void_p) for name in (
            "logits", "tokens", "seeds", "positions", "temperature", "masses", "starts", "drawn", "logprobs",
            "margins",
        )),
    ]  # fmt: skip


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
        self._draw = library.swarm_draw
        self._draw.argtypes, self._draw.restype = [pointer, i32], None

    def draw(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor,
        *,
        vocab_size: int,
        width: int,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw one token a row: `engine.torch.sampling.draw` in one call.

        logits: float32 [num_rows, num_logits]. seeds, positions: int64 [num_rows]. temperature: float32 [num_rows].
        width: tokens of a block. tokens: int64 [num_logits], in order, what the logits are of; None: of all tokens.
        returns: tokens, int64; their log-probabilities and margins, float32; each [num_rows].
        """
        num_rows, num_logits = logits.shape
        num_threads, num_blocks = torch.get_num_threads(), -(-vocab_size // width)
        scratch = torch.empty(2, num_threads, num_blocks + 1)
        drawn, logprobs, margins = torch.empty(num_rows, dtype=torch.int64), *torch.empty(2, num_rows)
        inputs = [each.contiguous() for each in (logits, seeds, positions, temperature)]
        fields = _Draw(
            num_threads, num_rows, num_logits, vocab_size, width,
            inputs[0].data_ptr(), None if tokens is None else tokens.data_ptr(), *(i.data_ptr() for i in inputs[1:]),
            scratch[0].data_ptr(), scratch[1].data_ptr(), drawn.data_ptr(), logprobs.data_ptr(),
            margins.data_ptr(),
        )  # fmt: skip
        self._draw(ctypes.byref(fields), self.instruction_set)
        return drawn, logprobs, margins


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
