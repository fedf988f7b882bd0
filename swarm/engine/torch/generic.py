"""The runner for any transformers causal LM whose attention function can be exchanged.

It drives the model's own forward pass, head and all, and puts two things in its place: the KV cache, which
becomes slots allocated once, and the attention function, which becomes the decode and prefill attention of
this engine. Linear layers are packed where that pays. Everything else is the model's own code.

Some models keep state or positions where this cannot reach. So a runner compares itself with the untouched
model once, when it is made, and refuses the model if they differ.
"""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from swarm.engine.torch.attention import (
    Extension,
    attend_rows,
    attend_slots,
    length_mask,
    window_mask,
)
from swarm.engine.torch.linear import PackedLinear, can_pack
from swarm.engine.torch.runner import ModelRunner
from swarm.errors import ModelError

__all__ = ["GenericRunner"]

_NAME = "swarm_slots"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_CHECKED_TOKENS = 12  # compared with the untouched model when a runner is made
_TOLERANCE = {torch.float32: 1e-3}  # of the mean absolute logit
_TOLERANCE_HALF = 0.1  # the same for narrower dtypes


class _Pass:
    """What the attention function needs to know of the forward pass that runs."""

    def __init__(
        self, slots: torch.Tensor, positions: torch.Tensor, longest: int, lengths: Sequence[int] | None = None,
        *, fused: bool = False,
    ) -> None:  # fmt: skip
        """slots: [batch]. positions: [batch, num_new]. longest: more than any position.

        lengths: of decoding on a CPU, tokens that each slot holds; None elsewhere and in prefill. fused: whether slots
        are attended to by the fused kernel.
        """
        self.slots, self.positions, self.longest, self.lengths = slots, positions, longest, lengths
        self.fused = fused
        self.decoding = False
        self.masks: dict[tuple[int, int], torch.Tensor | None] = {}  # (num_kv_heads or -group, window) -> mask

    def wide_mask(self, group: int, window: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what to add to the scores of new tokens of each slot; made once for all layers of one kind."""
        key = (-group, window)
        if key not in self.masks:
            self.masks[key] = window_mask(self.positions + 1, group, self.longest, dtype, window)
        mask = self.masks[key]
        assert mask is not None
        return mask

    def mask(self, lengths: Sequence[int], num_kv_heads: int, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what to add to the scores of a decode step on a CPU; made once likewise."""
        key = (num_kv_heads, window)
        if key not in self.masks:
            self.masks[key] = self._mask(lengths, num_kv_heads, window, dtype)
        return self.masks[key]

    def _mask(self, lengths: Sequence[int], num_kv_heads: int, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        totals = [length + 1 for length in lengths]
        mask = length_mask(totals, num_kv_heads, self.slots.device, dtype)
        if window and self.longest > window:
            limits = torch.tensor(totals).repeat_interleave(num_kv_heads)[:, None]
            old = torch.arange(self.longest) < limits - window
            mask = torch.zeros_like(old[:, None], dtype=dtype) if mask is None else mask
            mask = mask.masked_fill(old[:, None], -torch.inf)
        return mask


class _SlotCache(transformers.Cache):  # type: ignore[misc]
    """Keys and values by slot. `update` stores; the attention function reads."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.sides: dict[int, torch.Tensor] = {}  # layer -> [2, num_slots, num_kv_heads, capacity, head_dim]
        self.current: _Pass | None = None
        self.layers: list[Any] = []

    def side(self, layer: int, like: torch.Tensor) -> torch.Tensor:
        """Return the layer's cache; made at its first use, in float32 on CPUs."""
        if layer not in self.sides:
            dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            shape = (2, self.num_slots, like.shape[1], self.capacity, like.shape[3])
            self.sides[layer] = torch.zeros(shape, dtype=dtype, device=like.device)
        return self.sides[layer]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values. Both: [batch, num_kv_heads, num_new, head_dim]."""
        current = self.current
        if current is None:
            raise RuntimeError("the cache is written outside a pass of the engine")
        side = self.side(layer, keys)
        for stored, new in zip(side, (keys, values), strict=True):
            stored[current.slots[:, None], :, current.positions] = new.transpose(1, 2).to(side.dtype)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so this is only read to be ignored."""
        return 0

    def get_mask_sizes(self, *_: object, **__: object) -> tuple[int, int]:
        """No mask is built from the cache."""
        return self.capacity, 0


_cache_of_pass: list[_SlotCache] = []  # the cache of the forward pass that runs, innermost last


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer. query: [batch, num_heads, num_new, head_dim]; keys, values as stored."""
    if softcap is not None or unknown.get("s_aux") is not None:
        raise ModelError("the torch engine cannot run models with attention soft caps or sinks; choose another --model")
    cache = _cache_of_pass[-1]
    current = cache.current
    assert current is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not current.decoding:
        length = query.shape[2]
        mask = None
        if sliding_window and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - sliding_window)
        out = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2), None
    side = cache.side(int(module.layer_idx), keys)  # type: ignore[arg-type]
    num_kv_heads = keys.shape[1]
    if current.lengths is None:
        rows = (query.to(side.dtype) * scale).unflatten(1, (num_kv_heads, -1))  # [batch, kv heads, group, num_new, dim]
        wide = current.wide_mask(rows.shape[2], sliding_window or 0, side.dtype)
        attended = attend_rows(rows, side[0], side[1], wide, fused=current.fused)
        return attended.to(query.dtype).unflatten(2, (query.shape[1], -1)), None
    mask = current.mask(current.lengths, num_kv_heads, sliding_window or 0, side.dtype)
    scaled = (query[:, :, 0].to(side.dtype) * scale).unflatten(1, (num_kv_heads, -1))
    attended = attend_slots(scaled, side[0], side[1], current.longest, mask)
    return attended.to(query.dtype).view(query.shape[0], 1, query.shape[1], -1), None


transformers.AttentionInterface.register(_NAME, _attend)
transformers.AttentionMaskInterface.register(_NAME, lambda *_, **__: None)


class _PackedModule(nn.Module):
    """An nn.Linear whose weight is packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = PackedLinear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in_features]. returns: [..., out_features]."""
        return self.packed(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class GenericRunner(ModelRunner):
    """Runs a transformers causal LM through its own forward pass."""

    max_prefill_rows = 1024  # its states are logits

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the model lets its attention be exchanged. Raises ModelError where not: it is the last resort."""
        name, config = type(model).__name__, model.config.get_text_config()
        if not getattr(model, "_supports_attention_backend", False):
            raise ModelError(f"{name} does not let its attention be exchanged; choose another --model")
        other = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
        if other:
            raise ModelError(f"the torch engine has no {other[0]}, which {name} needs; choose another --model")
        return True

    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        self.device, self.vocab_size = model.device, model.config.get_text_config().vocab_size
        self._model = copy.deepcopy(model).eval()
        takes = inspect.signature(self._model.forward).parameters
        self._takes_num_kept = "logits_to_keep" in takes
        tokens = [7 * index % self.vocab_size for index in range(min(_CHECKED_TOKENS, capacity))]
        expected = self._model(torch.tensor([tokens], device=self.device)).logits[0, -2:]
        self._model.set_attn_implementation(_NAME)
        self._cache = _SlotCache(num_slots, capacity)
        self._packed: dict[str, _PackedModule] = {}
        if can_pack(self.device, model.dtype):
            for name, module in list(self._model.named_modules()):
                if isinstance(module, nn.Linear):
                    self._packed[name] = _PackedModule(module)
                    self._model.set_submodule(name, self._packed[name])
        if len(tokens) > 1:
            self._compare(tokens, expected)

    def _compare(self, tokens: list[int], expected: torch.Tensor) -> None:
        """Raise ModelError unless all ways give the logits of the untouched model. expected: [2, vocab]."""
        first = self.prefill([tokens[:-1]], [0])
        last = self.decode(torch.tensor(tokens[-1:], device=self.device), [len(tokens) - 1])
        both = self.extend(torch.tensor(tokens[-2:], device=self.device), [2], [len(tokens) - 2])
        wanted = expected.float()
        error = max((rows.float() - wanted).abs().mean() for rows in (torch.cat([first, last]), both))
        if not error <= _TOLERANCE.get(expected.dtype, _TOLERANCE_HALF) * expected.float().abs().mean():
            name = type(self._model).__name__
            raise ModelError(f"the torch engine does not compute what {name} computes; choose another --model")

    def _forward(self, tokens: torch.Tensor, current: _Pass, *, decoding: bool, num_last: int = 1) -> torch.Tensor:
        """tokens: [batch, num_new]. returns: the logits after the last tokens, [batch, num_last, vocab]."""
        self._cache.current, current.decoding = current, decoding
        _cache_of_pass.append(self._cache)
        try:
            out = self._model(
                input_ids=tokens,
                position_ids=current.positions,
                past_key_values=self._cache,
                use_cache=True,
                **({"logits_to_keep": num_last} if self._takes_num_kept else {}),
            )
        finally:
            _cache_of_pass.pop()
            self._cache.current = None
        logits: torch.Tensor = out.logits[:, -num_last:]
        return logits

    def prefill(
        self, sequences: Sequence[Sequence[int]], slots: Sequence[int], num_last: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Fill slots, on a CPU one by one, elsewhere all of one length together; see ModelRunner."""
        num_last = num_last or [1] * len(sequences)
        batches: dict[int, list[int]] = {}
        for index, sequence in enumerate(sequences):
            batches.setdefault(index if self.device.type == "cpu" else len(sequence), []).append(index)
        last: dict[int, torch.Tensor] = {}
        for members in batches.values():
            tokens = torch.tensor([list(sequences[index]) for index in members], device=self.device)
            places = torch.tensor([slots[index] for index in members], device=self.device)
            length = tokens.shape[1]
            positions = torch.arange(length, device=self.device).expand(tokens.shape)
            current, most = _Pass(places, positions, length), max(num_last[index] for index in members)
            logits = self._forward(tokens, current, decoding=False, num_last=most)
            last.update((index, rows[most - num_last[index] :]) for index, rows in zip(members, logits, strict=True))
        return torch.cat([last[index] for index in range(len(sequences))])

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Append one token to each slot; see ModelRunner."""
        positions, longest = torch.tensor(lengths, device=self.device), max(lengths) + 1
        if self.device.type != "cpu":
            return self.extend_within(tokens[:, None], positions[:, None], longest)
        slots = torch.arange(len(tokens))
        return self._forward(tokens[:, None], _Pass(slots, positions[:, None], longest, lengths), decoding=True)[:, 0]

    def extend(self, tokens: torch.Tensor, counts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append several tokens to each slot, the last one again where others have more; see ModelRunner."""
        new = Extension(counts, lengths, self.device)
        ends = torch.tensor(counts, device=self.device)
        last = (ends - 1)[:, None].minimum(torch.arange(new.num_new, device=self.device))  # [n, num_new]
        rows = (ends.cumsum(0) - ends)[:, None] + last
        fused = self.device.type != "cpu"
        return self._extend(tokens[rows], new.positions[rows], new.longest, fused=fused)[new.places]

    def extend_within(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Append as many tokens to each slot, recordably where the model's own code is; see ModelRunner."""
        return self._extend(tokens, positions, longest, fused=True)

    def _extend(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int, *, fused: bool) -> torch.Tensor:
        slots = torch.arange(len(tokens), device=self.device)
        current = _Pass(slots, positions, longest, fused=fused)
        return self._forward(tokens, current, decoding=True, num_last=tokens.shape[1]).flatten(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own forward pass has applied its head; see ModelRunner."""
        return hidden

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the start of one slot to others; see ModelRunner."""
        to = torch.tensor(targets, device=self.device)
        for side in self._cache.sides.values():
            side[:, to, :, :length] = side[:, source : source + 1, :, :length]

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take new weights; see ModelRunner."""
        own = self._model.state_dict()
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for name, module in self._packed.items():
            bias = state.get(f"{name}.bias")
            weight = state.get(f"{name}.weight")
            if weight is None:  # a head that is tied to the embedding
                weight = self._model.get_input_embeddings().weight
            weight = weight.detach().to(self._model.dtype)
            module.packed.load(weight, None if bias is None else bias.detach().to(weight.dtype))
