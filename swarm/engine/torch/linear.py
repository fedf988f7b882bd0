"""Linear layers for decoding: weights packed once per policy on CPUs where that is faster.

At a few rows a plain matmul on a CPU spends most of its time reordering the weight. oneDNN keeps it in
its own blocked layout instead; this is what inductor's freezing uses. Everywhere else this is `F.linear`.
"""

from typing import Any

import torch
from torch.nn import functional

__all__ = ["PackedLinear", "can_pack"]

_PACK_FOR_NUM_ROWS = 16  # the layout is chosen for about this many rows; it serves all others


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype on this device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear:
    """`x @ weight.T + bias`, with an optional sum, on weights that change only by `load`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.load(weight, bias)

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Take new weights. weight: [out_features, in_features]; bias: [out_features]."""
        self.bias = bias
        self.packed = can_pack(weight.device, weight.dtype)
        self.weight: Any = weight
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_FOR_NUM_ROWS)

    def copy_(self, other: "PackedLinear") -> None:
        """Take the weights of another layer of the same shape, in place. Neither may be packed."""
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [num_rows, in_features]. returns: [num_rows, out_features]."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
            return out
        return functional.linear(x, self.weight, self.bias)

    def plus(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return `self(x) + residual`, which may lie where the residual did. residual: [num_rows, out_features]."""
        if self.packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
            return out
        if self.bias is None:
            return residual.addmm_(x, self.weight.t())
        return functional.linear(x, self.weight, self.bias).add_(residual)
