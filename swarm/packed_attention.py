"""Attention over a packed row in which the completions of a group share their prompt (see `packing`).

A transformers attention function: `use_packed_attention(model, row)` makes the attention layers of a causal
LM call it while the block runs. Trunks go through one causal kernel call and branches through another, whose
keys are those of the trunk followed by the branch's own. No mask over all pairs of tokens exists.

`supports_packed_attention` says for which models this is exact. Sliding windows, soft-capped scores,
attention sinks, layers that are not attention, and models that do not call attention through transformers'
interface are left to the padded layout.

On a CPU the compiled kernels do all of it at once (`native.attention`), where they are there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from swarm.cpu_attention import block_attention
from swarm.native.attention import Plan, native_attention, supports_native_attention
from swarm.packing import PackedRow, Span

__all__ = ["supports_packed_attention", "use_packed_attention"]

_Context: TypeAlias = Any  # torch does not type what is stored on a context
_NAME = "swarm_packed"
# Without cuDNN, which takes a tenth of a second and more to plan for a shape: microbatches rarely have one twice.
_FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_row: ContextVar["_Row"] = ContextVar("packed_row")


@dataclass(slots=True)
class _Row:
    """A packed row, and what all its attention layers need, made when the first of them asks."""

    packed: PackedRow
    plans: dict[tuple[int, int], Plan] = field(default_factory=dict)  # by numbers of heads
    parent_index: Tensor | None = None
    biases: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def parents(self, device: torch.device) -> Tensor:
        """Return the trunk of each branch, [num_branches]. Bringing it to a GPU waits for all that runs there."""
        if self.parent_index is None:
            self.parent_index = torch.tensor(self.packed.parents, device=device)
        return self.parent_index

    def bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the branches' mask as what is added to their scores."""
        if dtype not in self.biases:
            self.biases[dtype] = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        return self.biases[dtype]

    def plan(self, num_heads: int, num_kv_heads: int) -> Plan:
        """Return the plan for a layer with so many heads."""
        key = num_heads, num_kv_heads
        if key not in self.plans:
            self.plans[key] = Plan.of(self.packed, num_heads, num_kv_heads, torch.get_num_threads())
        return self.plans[key]


def supports_packed_attention(model: nn.Module, max_seq_len: int) -> bool:
    """Whether packed attention computes exactly what the model's own would, for sequences up to this length."""
    config: Any = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return False
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "alibi", False):
        return False
    if getattr(config, "model_type", "") == "gpt_oss":
        return False
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types - {"full_attention", "sliding_attention"}:
        return False
    window = getattr(config, "sliding_window", None)
    slides = getattr(config, "use_sliding_window", True) and (
        "sliding_attention" in layer_types or not getattr(config, "layer_types", None)
    )
    return not (window and slides and window < max_seq_len)


@contextmanager
def use_packed_attention(model: nn.Module, row: PackedRow) -> Iterator[None]:
    """Make the model's attention layers treat their input as this packed row, while the block runs."""
    config: Any = model.config
    before = config._attn_implementation
    token = _row.set(_Row(row))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _row.reset(token)


def _packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within the packed row. Returns [1, num_tokens, num_heads, head_dim]."""
    row = _row.get().packed
    longest = row.trunks.max_length + row.branches.max_length
    if softcap or s_aux is not None or position_bias is not None or (sliding_window and sliding_window < longest):
        raise RuntimeError(f"{type(module).__name__} asks for attention that a packed row cannot have")
    num_trunk_tokens = row.trunks.num_tokens
    states = [x[0].transpose(0, 1) for x in (query, key, value)]  # each [num_tokens, heads, head_dim]
    if not dropout and supports_native_attention(states[0], states[1]):
        plan = _row.get().plan(query.shape[1], key.shape[1])
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return native_attention(states[0], states[1], states[2], plan, scale)[None], None
    trunk = [_to_rectangle(x[:num_trunk_tokens], row.trunks) for x in states]
    out = _to_tokens(_attend(trunk[0], trunk[1], trunk[2], None, scaling, dropout), row.trunks)
    if row.branch_mask is not None:
        branch = [_to_rectangle(x[num_trunk_tokens:], row.branches) for x in states]
        parents = _row.get().parents(query.device)
        keys, values = (
            torch.cat((_Repeat.apply(shared, row.parents, parents), own), dim=1)  # type: ignore[no-untyped-call]
            for shared, own in zip(trunk[1:], branch[1:], strict=True)
        )
        bias = _row.get().bias(row.branch_mask, query.dtype)
        branch_out = _attend(branch[0], keys, values, bias, scaling, dropout)
        out = torch.cat((out, _to_tokens(branch_out, row.branches)))
    return out[None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """Attend in rectangles [num_sequences, length, heads, head_dim], causally where there is no bias."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and not dropout:
        return block_attention(query, key, value, bias, scaling)
    num_sharing = query.shape[2] // key.shape[2]
    if bias is not None and num_sharing > 1:  # the fused kernel that takes a mask knows no shared key heads
        key, value = key.repeat_interleave(num_sharing, dim=2), value.repeat_interleave(num_sharing, dim=2)
    with sdpa_kernel(_FUSED_KERNELS):
        out = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=bias is None,
            scale=scaling,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return out.transpose(1, 2)


AttentionInterface.register(_NAME, _packed_attention)


def _to_rectangle(tokens: Tensor, span: Span) -> Tensor:
    """[num_tokens, heads, head_dim] -> [num_sequences, max_length, heads, head_dim]."""
    shape = (len(span.lengths), span.max_length, *tokens.shape[1:])
    if span.to_padded is None:
        return tokens.reshape(shape)
    padded: Tensor = _Pad.apply(tokens, span.to_padded, span.to_packed)  # type: ignore[no-untyped-call]
    return padded.view(shape)


def _to_tokens(rectangle: Tensor, span: Span) -> Tensor:
    """[num_sequences, max_length, heads, head_dim] -> [num_tokens, heads, head_dim]."""
    flat = rectangle.flatten(0, 1)
    if span.to_packed is None:
        return flat
    tokens: Tensor = _Unpad.apply(flat, span.to_packed)  # type: ignore[no-untyped-call]
    return tokens


class _Pad(torch.autograd.Function):
    """Gather into a rectangle. The backward pass gathers too: each token stands in one place, padding in none."""

    @staticmethod
    def forward(ctx: _Context, tokens: Tensor, to_padded: Tensor, to_packed: Tensor) -> Tensor:
        ctx.to_packed = to_packed
        return tokens.index_select(0, to_padded)

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].index_select(0, ctx.to_packed), None, None


class _Unpad(torch.autograd.Function):
    """Gather the tokens out of a rectangle; padding has gradient zero."""

    @staticmethod
    def forward(ctx: _Context, flat: Tensor, to_packed: Tensor) -> Tensor:
        ctx.to_packed, ctx.shape = to_packed, flat.shape
        return flat.index_select(0, to_packed)

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0].new_zeros(ctx.shape).index_copy_(0, ctx.to_packed, grad_outputs[0]), None


class _Repeat(torch.autograd.Function):
    """Give each branch its trunk's keys. The backward pass sums siblings at once, in fp32 inside the kernel."""

    @staticmethod
    def forward(ctx: _Context, trunks: Tensor, parents: tuple[int, ...], index: Tensor) -> Tensor:
        ctx.num_trunks = trunks.shape[0]
        ctx.counts = [(parent, sum(1 for _ in run)) for parent, run in groupby(parents)]
        return trunks.index_select(0, index)

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        counts = ctx.counts
        if len(counts) == ctx.num_trunks and len({count for _, count in counts}) == 1:
            return grad.view(ctx.num_trunks, -1, *grad.shape[1:]).sum(dim=1), None, None
        total = grad.new_zeros((ctx.num_trunks, *grad.shape[1:]))
        start = 0
        for parent, count in counts:
            torch.sum(grad[start : start + count], dim=0, out=total[parent])
            start += count
        return total, None, None
