"""What a training step does beside matrix products, through the compiled kernels (training.h), on a CPU.

Plain functions on contiguous tensors: `fused` and `logprobs` call them inside their autograd functions, where
`supports_native_training` says so. Each reads its inputs once, computes in float32 and rounds once.
"""

import ctypes

import torch
from torch import Tensor

from swarm.native import kernels

__all__ = [
    "gated_silu",
    "gated_silu_gradient",
    "logit_gradient_",
    "logit_mass",
    "rms_norm",
    "rms_norm_gradient",
    "supports_native_training",
]

_LANES = 16
_LOGIT_MASS, _LOGIT_GRADIENT, _NORM, _NORM_GRADIENT, _GATED_SILU = range(5)  # as in kernels.c


class _Training(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("operation", "is_bf16", "threads", "rows", "width")),
        ("scalar", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (
            "x", "weight", "grad", "targets", "out", "more_out", "sums", "more_sums",
        )),
    ]  # fmt: skip


def supports_native_training(*tensors: Tensor) -> bool:
    """Whether the kernels are there and work on these: one dtype, last dimension a multiple of 16, on a CPU."""
    first = tensors[0]
    return (
        first.dtype in (torch.float32, torch.bfloat16)
        and all(
            x.device.type == "cpu" and x.dtype == first.dtype and x.shape[-1] % _LANES == 0 and x.is_contiguous()
            for x in tensors
        )
        and kernels() is not None
    )


def logit_mass(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp of `scale * logits` and that of each row's target. logits: [rows, vocab]; both [rows]."""
    log_mass, target_logits = torch.empty(len(logits)), torch.empty(len(logits))
    _call(_LOGIT_MASS, logits, scale, x=logits, targets=targets, sums=log_mass, more_sums=target_logits)
    return log_mass, target_logits


def logit_gradient_(logits: Tensor, targets: Tensor, log_mass: Tensor, grad: Tensor, scale: float) -> None:
    """Replace logits by the gradient of their log-probabilities at the targets, times `grad`, float32 [rows]."""
    _call(_LOGIT_GRADIENT, logits, scale, out=logits, targets=targets, sums=log_mass, more_sums=grad.contiguous())


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return weight * x / rms(x), rounded as transformers rounds it, and 1 / rms(x), float32 [rows]."""
    out, inverse = torch.empty_like(x), torch.empty(x.numel() // x.shape[-1])
    _call(_NORM, x, epsilon, x=x, weight=weight, out=out, sums=inverse)
    return out, inverse


def rms_norm_gradient(
    x: Tensor, weight: Tensor, inverse: Tensor, grad: Tensor, *, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the weight."""
    grad_x = torch.empty_like(x)
    sums = torch.zeros(torch.get_num_threads(), x.shape[-1]) if needs_weight else None
    _call(_NORM_GRADIENT, x, 0.0, x=x, weight=weight, sums=inverse, grad=grad, out=grad_x, more_sums=sums)
    return grad_x, None if sums is None else sums.sum(0).to(weight.dtype)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    out = torch.empty_like(gate)
    _call(_GATED_SILU, gate, 0.0, x=gate, weight=up, out=out)
    return out


def gated_silu_gradient(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _call(_GATED_SILU, gate, 0.0, x=gate, weight=up, grad=grad, out=grad_gate, more_out=grad_up)
    return grad_gate, grad_up


def _call(operation: int, like: Tensor, scalar: float, **tensors: Tensor | None) -> None:
    library = kernels()
    assert library is not None
    arguments = _Training(
        operation=operation, is_bf16=like.dtype == torch.bfloat16, threads=torch.get_num_threads(),
        rows=like.numel() // like.shape[-1], width=like.shape[-1], scalar=scalar,
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )  # fmt: skip
    library.training(ctypes.byref(arguments), library.instruction_set)
