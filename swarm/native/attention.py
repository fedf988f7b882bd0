"""Training attention over a packed row through the compiled kernels (attention.h), for models on a CPU.

`Plan.of(row)` says which tokens attend to which, and cuts the work into pieces for threads; it is made once per
row. `native_attention` is differentiable. Where the kernels are missing, `swarm.cpu_attention` does the work.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from swarm.native import kernels
from swarm.packing import PackedRow

__all__ = ["Plan", "native_attention", "supports_native_attention"]

_Context: TypeAlias = Any  # torch does not type what is stored on a context
_KEY_TILE = 64  # as in kernels.c
_LANES = 16
_CHUNK_ROWS = 48  # queries times heads of one tile: its scores and operands fit a core's cache
_ITEMS_PER_THREAD = 2  # so that threads end at about the same time

_COUNTS = (
    "is_bf16", "num_heads", "num_kv_heads", "head_dim", "num_threads", "num_tokens", "num_keys", "num_sums",
    "num_segments", "num_chunks", "num_items", "max_rows",
)  # fmt: skip
_STRIDES = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head", "scratch_bytes")
_POINTERS = (
    "segments", "chunks", "items", "query", "key", "value", "out", "log_mass", "keys_by_width", "keys_by_key",
    "values_by_width", "values_by_key", "scratch", "grad_out", "grad_query", "grad_key", "grad_value",
    "key_sums", "value_sums",
)  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in _COUNTS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of one packed row. Segments, chunks and items are described in kernels.c."""

    num_tokens: int
    num_keys: int  # every segment padded to 16
    num_sums: int  # keys of all items together
    chunk_queries: int
    segments: Tensor  # int32 [num_segments, 6]
    chunks: Tensor  # int32 [num_chunks, 3]
    items: Tensor  # int32 [num_items, 5]

    @staticmethod
    def of(row: PackedRow, num_heads: int, num_kv_heads: int, num_threads: int) -> "Plan":
        """Lay out a row for `num_threads` threads."""
        chunk_queries = max(1, _CHUNK_ROWS // (num_heads // num_kv_heads))
        num_trunks = len(row.trunks.lengths)
        families: list[list[int]] = [[] for _ in range(num_trunks)]  # branches of each trunk
        for branch, parent in enumerate(row.parents):
            families[parent].append(branch)
        parts = max(1, -(-_ITEMS_PER_THREAD * num_threads // (num_trunks * num_kv_heads)))
        trunk_starts, branch_starts = (
            _starts(row.trunks.lengths, 0),
            _starts(row.branches.lengths, row.trunks.num_tokens),
        )
        segments: list[tuple[int, ...]] = []
        chunks: list[tuple[int, int, int]] = []
        items: list[tuple[int, ...]] = []
        first_key = first_sum = 0
        for trunk, branches in enumerate(families):
            places = [(trunk_starts[trunk], row.trunks.lengths[trunk])]
            places += [(branch_starts[branch], row.branches.lengths[branch]) for branch in branches]
            family_key, trunk_segment, first_chunk = first_key, len(segments), len(chunks)
            family: list[tuple[int, ...]] = []
            for number, (start, length) in enumerate(places):
                family.append((start, length, first_key, trunk_segment if number else -1))
                first_key += -(-length // _LANES) * _LANES
                chunks += [
                    (trunk_segment + number, low, min(low + chunk_queries, length))
                    for low in range(0, length, chunk_queries)
                ]
            family_items = _split(chunks[first_chunk:], places, trunk_segment, parts)
            first_item = len(items)
            for low, high in family_items:
                items.append((first_chunk + low, first_chunk + high, family_key, first_key - family_key, first_sum))
                first_sum += first_key - family_key
            segments += [(*segment, first_item, len(items)) for segment in family]
        return Plan(
            num_tokens=row.trunks.num_tokens + row.branches.num_tokens,
            num_keys=first_key,
            num_sums=first_sum,
            chunk_queries=chunk_queries,
            segments=torch.tensor(segments, dtype=torch.int32),
            chunks=torch.tensor(chunks, dtype=torch.int32),
            items=torch.tensor(items, dtype=torch.int32),
        )


def _starts(lengths: tuple[int, ...], first: int) -> list[int]:
    """Return where each sequence begins."""
    starts = []
    for length in lengths:
        starts.append(first)
        first += length
    return starts


def _split(
    chunks: list[tuple[int, int, int]], places: list[tuple[int, int]], trunk_segment: int, parts: int
) -> list[tuple[int, int]]:
    """Cut a family's chunks into at most `parts` runs that cost about the same: scores are what costs."""
    costs = [(high - low) * (high + (places[0][1] if segment != trunk_segment else 0)) for segment, low, high in chunks]
    total, done, cuts = sum(costs), 0, [0]
    for index, cost in enumerate(costs):
        done += cost
        if done * parts >= total * len(cuts) and index + 1 < len(costs):
            cuts.append(index + 1)
    return list(zip(cuts, [*cuts[1:], len(costs)], strict=True))


def supports_native_attention(query: Tensor, key: Tensor) -> bool:
    """Whether the kernels are there and compute this. query: [tokens, num_heads, head_dim]."""
    width, group = query.shape[-1], query.shape[1] // key.shape[1]
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and width % _LANES == 0
        and group * key.shape[1] == query.shape[1]
        and kernels() is not None
    )


def native_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
    """Attend within a packed row.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]; all of one dtype,
    float32 or bfloat16. returns: as query, contiguous. Products are summed up in float32; for bf16, weights and
    their gradients are rounded to bf16 before they are multiplied.
    """
    result: Tensor = _NativeAttention.apply(query, key, value, plan, scaling)  # type: ignore[no-untyped-call]
    return result


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
        query, key, value = (
            tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value)
        )
        out = torch.empty(query.shape, dtype=query.dtype)
        log_mass = torch.empty(query.shape[1], query.shape[0])
        _call(plan, scaling, query, key, value, out, log_mass)
        ctx.save_for_backward(query, key, value, out, log_mass)
        ctx.plan, ctx.scaling = plan, scaling
        return out

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_mass = ctx.saved_tensors
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value)]
        _call(ctx.plan, ctx.scaling, query, key, value, out, log_mass, grad_outputs[0].contiguous(), grads)
        return (*grads, None, None)


def _call(
    plan: Plan,
    scaling: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_mass: Tensor,
    grad_out: Tensor | None = None,
    grads: list[Tensor] | None = None,
) -> None:
    """Run the kernels; with `grad_out`, backward."""
    library = kernels()
    assert library is not None
    (num_tokens, num_heads, width), num_kv_heads = query.shape, key.shape[1]
    if num_tokens != plan.num_tokens:
        raise ValueError(f"{num_tokens} tokens, and a plan for {plan.num_tokens}")
    num_threads = torch.get_num_threads()
    max_rows = -(-plan.chunk_queries * (num_heads // num_kv_heads) // 4) * 4
    scratch_bytes = -(-4 * max_rows * (5 * width + 4 * _KEY_TILE + _LANES + 1) // 64) * 64
    tensors: dict[str, Tensor] = {
        "segments": plan.segments, "chunks": plan.chunks, "items": plan.items,
        "query": query, "key": key, "value": value, "out": out, "log_mass": log_mass,
        "scratch": torch.empty(num_threads, scratch_bytes, dtype=torch.uint8),
    }  # fmt: skip
    layouts = ["keys_by_width", "values_by_width", "values_by_key"]
    if grad_out is not None and grads is not None:
        layouts.append("keys_by_key")
        tensors["grad_out"] = grad_out
        tensors |= dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
        for name in ("key_sums", "value_sums"):
            tensors[name] = torch.empty(num_kv_heads, plan.num_sums, width)
    for name in layouts:
        tensors[name] = torch.empty(num_kv_heads, plan.num_keys, width, dtype=query.dtype)
    arguments = _Attention(
        is_bf16=query.dtype == torch.bfloat16, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=width,
        num_threads=num_threads, num_tokens=num_tokens, num_keys=plan.num_keys, num_sums=plan.num_sums,
        num_segments=len(plan.segments), num_chunks=len(plan.chunks), num_items=len(plan.items), max_rows=max_rows,
        scale=scaling, query_token=query.stride(0), query_head=query.stride(1), key_token=key.stride(0),
        key_head=key.stride(1), value_token=value.stride(0), value_head=value.stride(1), scratch_bytes=scratch_bytes,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip
    library.attention(ctypes.byref(arguments), library.instruction_set, grad_out is not None)
