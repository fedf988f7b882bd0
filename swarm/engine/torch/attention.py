"""Attention over a cache of slots.

Decoding on a CPU: two batched matmuls whose rows are the query heads that share one KV head. A fused
scaled-dot-product kernel is built for prefill and several times slower for one query token there. Elsewhere: the
fused kernel, for which those query heads are the queries; scores then never leave it.
Prefill: the fused kernel. On a CPU one call per sequence, so that no sequence pays for another's length; elsewhere
one call for all sequences of about the same length, because there a call costs more than padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = [
    "Extension",
    "Rectangle",
    "attend_prefill",
    "attend_rectangles",
    "attend_rows",
    "attend_slots",
    "attend_within",
    "length_mask",
    "rectangles",
    "window_mask",
]

# Without cuDNN, which plans anew for every shape: prefills rarely have one twice.
_PREFILL_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    mask: [n * num_kv_heads, 1 or group, longest] or None. returns: [n, num_kv_heads * group * head_dim].
    """
    n, num_kv_heads, group, head_dim = query.shape
    keys = keys[:n, :, :longest].flatten(0, 1)  # [n * num_kv_heads, longest, head_dim], a view
    values = values[:n, :, :longest].flatten(0, 1)
    scores = torch.bmm(query.reshape(-1, group, head_dim), keys.transpose(1, 2))  # [n * num_kv_heads, group, longest]
    if mask is not None:
        scores += mask
    return torch.bmm(scores.softmax(-1), values).view(n, num_kv_heads * group * head_dim)


def attend_within(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attend with scaled queries of each slot, those that share a KV head beside each other, by the fused kernel.

    query: [n, num_kv_heads, group, head_dim]. keys, values: [>= n, num_kv_heads, capacity, head_dim].
    mask: [n, 1, 1 or group, longest]. returns: [n, num_kv_heads * group * head_dim].
    """
    n, num_kv_heads, group, _ = query.shape
    longest = mask.shape[-1]
    attended = functional.scaled_dot_product_attention(
        query, keys[:n, :, :longest], values[:n, :, :longest],
        attn_mask=mask.expand(n, num_kv_heads, group, longest), scale=1.0,
    )  # fmt: skip
    return attended.reshape(n, -1)


class Extension:
    """Several new tokens of each slot: where they lie in a rectangle of slots, and what each of them attends to."""

    def __init__(self, counts: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """counts: of each slot, at least 1. lengths: positions that each slot holds before them."""
        num, had = torch.tensor(counts), torch.tensor(lengths)
        self.num_slots, self.num_new, self.longest = len(counts), max(counts), int((num + had).max())
        slots = torch.arange(len(counts)).repeat_interleave(num)  # [num_tokens]
        ahead = torch.arange(len(slots)) - (num.cumsum(0) - num)[slots]
        limits = torch.ones(self.num_slots * self.num_new, dtype=torch.int64)  # what is padding attends to something
        limits[slots * self.num_new + ahead] = had[slots] + ahead + 1
        self.slots, self.positions = slots.to(device), (had[slots] + ahead).to(device)
        self.places = (slots * self.num_new + ahead).to(device)  # [num_tokens], of num_slots * num_new
        self.limits = limits.view(self.num_slots, self.num_new).to(device)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attend with scaled queries. query: [num_tokens, num_kv_heads, group, head_dim].

        keys, values: [>= num_slots, num_kv_heads, capacity, head_dim]. mask: `window_mask` of the limits.
        returns: [num_tokens, num_kv_heads * group * head_dim].
        """
        num_kv_heads, group, head_dim = query.shape[1:]
        rectangle = query.new_zeros(self.num_slots * self.num_new, num_kv_heads, group, head_dim)
        rectangle[self.places] = query
        rows = rectangle.view(self.num_slots, self.num_new, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        attended = attend_rows(rows, keys, values, mask, fused=query.device.type != "cpu")
        return attended.flatten(0, 1)[self.places]


def window_mask(limits: torch.Tensor, group: int, longest: int, dtype: torch.dtype, window: int = 0) -> torch.Tensor:
    """Return what to add to the scores of queries, without a look at their limits on the host.

    limits: [n, num_new], positions to attend to. window: only the last so many of them; 0: all.
    returns: [n, 1, group * num_new, longest], or [n, 1, 1, longest] for one query token per slot.
    """
    position = torch.arange(longest, device=limits.device)
    outside = position >= limits[:, :, None]
    if window:
        outside |= position < limits[:, :, None] - window
    mask = torch.zeros(outside.shape, device=limits.device, dtype=dtype).masked_fill_(outside, -torch.inf)
    if limits.shape[1] == 1:
        return mask[:, None]
    return mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]


def attend_rows(
    rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, fused: bool
) -> torch.Tensor:
    """Attend with one or more scaled queries per slot. rows: [n, num_kv_heads, group, num_new, head_dim].

    keys, values: [>= n, num_kv_heads, capacity, head_dim]. mask: `window_mask`.
    fused: by the fused kernel, or by matmuls. returns: [n, num_new, num_kv_heads * group * head_dim].
    """
    n, num_kv_heads, group, num_new, head_dim = rows.shape
    query = rows.flatten(2, 3)
    if fused:
        attended = attend_within(query, keys, values, mask)
    else:
        wide = mask.expand(n, num_kv_heads, -1, -1).flatten(0, 1)
        attended = attend_slots(query, keys, values, mask.shape[-1], wide)
    heads = attended.view(n, num_kv_heads * group, num_new, head_dim)
    return heads.transpose(1, 2).flatten(2)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Sequences of about one length, among others that lie one after another, padded to their longest."""

    num_sequences: int
    longest: int
    tokens: torch.Tensor | None  # [num_sequences * longest], which token stands where; None: all, without padding
    places: torch.Tensor | None  # [num_tokens], where the tokens stand
    order: torch.Tensor | None  # [num_tokens], which tokens those are


def rectangles(lengths: Sequence[int], device: torch.device) -> list[Rectangle]:
    """Group sequences whose lengths have the same number of bits."""
    if min(lengths) == max(lengths):
        return [Rectangle(len(lengths), lengths[0], None, None, None)]
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    sizes: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        sizes.setdefault(length.bit_length(), []).append(index)
    found = []
    for members in sizes.values():
        longest = max(lengths[index] for index in members)
        tokens = torch.zeros(len(members), longest, dtype=torch.int64)
        filled = torch.zeros(len(members), longest, dtype=torch.bool)
        for row, index in enumerate(members):
            tokens[row, : lengths[index]] = torch.arange(starts[index], starts[index + 1])
            filled[row, : lengths[index]] = True
        tokens, places = tokens.flatten(), filled.flatten().nonzero()[:, 0]
        found.append(Rectangle(len(members), longest, tokens.to(device), places.to(device), tokens[places].to(device)))
    return found


def attend_rectangles(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, groups: Sequence[Rectangle]
) -> torch.Tensor:
    """Attend causally within each of several sequences that lie one after another, with scaled queries.

    query: [num_tokens, num_heads, head_dim]. keys, values: [num_tokens, num_kv_heads, head_dim].
    returns: [num_tokens, num_heads * head_dim].
    """
    out = torch.empty(len(query), query.shape[1] * query.shape[2], dtype=query.dtype, device=query.device)
    for group in groups:
        shape = group.num_sequences, group.longest
        padded = (x if group.tokens is None else x[group.tokens] for x in (query, keys, values))
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in padded)  # [num_sequences, heads, longest, head_dim]
        with sdpa_kernel(_PREFILL_KERNELS):
            attended = functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=1.0, enable_gqa=query.shape[1] != keys.shape[1]
            )
        flat = attended.transpose(1, 2).reshape(group.num_sequences * group.longest, -1)
        if group.places is None or group.order is None:
            return flat
        out[group.order] = flat[group.places]
    return out


def attend_prefill(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Sequence[int], scale: float
) -> torch.Tensor:
    """Attend causally within each of several sequences that lie one after another, one by one.

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
