"""Attention over a cache of slots.

Decoding: two batched matmuls whose rows are the query heads that share one KV head. A fused
scaled-dot-product kernel is built for prefill and several times slower for one query token on a CPU.
Prefill: the fused kernel, one call per sequence, so that no sequence pays for another's length.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

__all__ = ["attend_prefill", "attend_slots", "length_mask"]


def length_mask(
    lengths: Sequence[int], num_kv_heads: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return what to add to decode scores, or None where all lengths are equal.

    lengths: [n], positions to attend to. returns: [n * num_kv_heads, 1, max(lengths)].
    """
    longest = max(lengths)
    if min(lengths) == longest:
        return None
    limits = torch.tensor(lengths, device=device).repeat_interleave(num_kv_heads)  # [n * num_kv_heads]
    outside = torch.arange(longest, device=device) >= limits[:, None]
    return torch.zeros(outside.shape, device=device, dtype=dtype).masked_fill_(outside, -torch.inf)[:, None, :]


def attend_slots(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, longest: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attend with one query token per slot, already scaled.

    query: [n, num_kv_heads, group, head_dim]. keys, values: [>= n, num_kv_heads, capacity, head_dim].
    mask: [n * num_kv_heads, 1, longest] or None. returns: [n, num_kv_heads * group * head_dim].
    """
    n, num_kv_heads, group, head_dim = query.shape
    keys = keys[:n, :, :longest].flatten(0, 1)  # [n * num_kv_heads, longest, head_dim], a view
    values = values[:n, :, :longest].flatten(0, 1)
    scores = torch.bmm(query.reshape(-1, group, head_dim), keys.transpose(1, 2))  # [n * num_kv_heads, group, longest]
    if mask is not None:
        scores += mask
    return torch.bmm(scores.softmax(-1), values).view(n, num_kv_heads * group * head_dim)


def attend_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], scale: float
) -> torch.Tensor:
    """Attend causally within each of several sequences that lie one after another.

    query: [num_heads, num_tokens, head_dim]. keys, values: [num_kv_heads, num_tokens, head_dim].
    returns: [num_tokens, num_heads * head_dim].
    """
    grouped = query.shape[0] != keys.shape[0]
    parts = [
        functional.scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped
        )[0]
        for q, k, v in zip(
            query.split(list(lengths), 1), keys.split(list(lengths), 1), values.split(list(lengths), 1), strict=True
        )
    ]
    return torch.cat(parts, dim=1).transpose(0, 1).flatten(1)
