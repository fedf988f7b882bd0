"""The fused runner for Llama-shaped models: RMSNorm, rotary attention with grouped KV heads, gated SiLU.

A decode step of a small model on a CPU is bound by reading the weights and by the number of operations,
so there are few: one matmul for query, key and value, one for gate and up, residuals added inside the
matmul, the rotation as one complex product. Rows of the query and key weights are reordered once so that
the two halves of a rotated pair lie side by side; scores do not change, since both get the same order.

On CPUs the cache and the attention are float32 whatever the weights are: batched matmuls of a few rows
are faster in float32 there, and more exact. Nothing in `extend_within` waits for the device, and new weights that are
not packed go where the old ones lie, so that a pass can be recorded as a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from swarm.engine.torch.attention import (
    Extension,
    attend_prefill,
    attend_rectangles,
    attend_rows,
    attend_slots,
    length_mask,
    rectangles,
    window_mask,
)
from swarm.engine.torch.linear import PackedLinear
from swarm.engine.torch.runner import ModelRunner, last_rows

__all__ = ["LlamaRunner", "LlamaShape"]

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama-shaped model."""

    vocab_size: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    num_layers: int
    epsilon: float

    @classmethod
    def of(cls, model: Any) -> "LlamaShape":
        """Read the sizes from a transformers model."""
        config = model.config
        return cls(
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            intermediate=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            epsilon=config.rms_norm_eps,
        )

    def rotary_tables(self, model: Any, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the model's own cosines and sines, float32, each [capacity, head_dim / 2]."""
        positions = torch.arange(capacity, device=model.device)[None]
        cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=model.device), positions)
        half = self.head_dim // 2
        return cos[0, :, :half].float(), sin[0, :, :half].float()


class _Layer:
    """The weights of one decoder layer, in the order in which they are used."""

    attention_norm: torch.Tensor | None  # a drafter's layer has none
    qkv: PackedLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    out: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear

    def copy_(self, other: "_Layer") -> None:
        """Take the weights of another layer, in place."""
        for name, own in vars(self).items():
            if own is not None:
                own.copy_(getattr(other, name))


def _pairs_side_by_side(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of each head from (first half, second half) to pairs. rows: [num_heads * head_dim, ...]."""
    paired: torch.Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2)
    return paired.flatten(0, 2).contiguous()


class LlamaRunner(ModelRunner):
    """Runs a Llama-shaped model from a state dict of its own."""

    embedding: torch.Tensor
    head: PackedLinear
    final_norm: torch.Tensor | None  # likewise

    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        shape = LlamaShape.of(model)
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size, self.num_layers, self.epsilon = shape.vocab_size, shape.num_layers, shape.epsilon
        self.num_heads, self.num_kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.cache = torch.zeros(  # [num_layers, key or value, num_slots, num_kv_heads, capacity, head_dim]
            self.num_layers, 2, num_slots, self.num_kv_heads, capacity, self.head_dim,
            dtype=self.cache_dtype, device=self.device,
        )  # fmt: skip
        kv_stride, slot_stride = num_slots * self.num_kv_heads * capacity, self.num_kv_heads * capacity
        side = torch.arange(2, device=self.device)[:, None] * kv_stride
        head = torch.arange(self.num_kv_heads, device=self.device) * capacity
        self._head_rows = (side + head).flatten()  # [2 * num_kv_heads]: rows of a slot's position 0
        self._slot_stride = slot_stride
        cosine, sine = shape.rotary_tables(model, capacity)
        self._rotation = torch.complex(cosine, sine)  # [capacity, head_dim / 2]
        scale = torch.ones(self.num_heads + self.num_kv_heads, 1, device=self.device)
        scale[: self.num_heads] = self.head_dim**-0.5
        self._head_scale = scale  # queries carry the attention scale
        self._layers: list[_Layer] = []
        self.load(model.state_dict())

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether this runner computes the model exactly."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in _MODEL_TYPES
            and getattr(config, "hidden_act", None) == "silu"
            and not getattr(config, "sliding_window", None)
            and rope.get("rope_type", "default") in _STATIC_ROPE
            and rope.get("partial_rotary_factor", 1.0) == 1.0
        )

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take new weights; see ModelRunner."""
        state = {name: tensor.detach().to(self.device, self.dtype) for name, tensor in state.items()}
        if self._layers and not self.head.packed:
            self.embedding.copy_(state["model.embed_tokens.weight"])
            self.head.weight.copy_(state.get("lm_head.weight", self.embedding))
            if self.final_norm is not None:
                self.final_norm.copy_(state["model.norm.weight"])
            for index, layer in enumerate(self._layers):
                layer.copy_(self._layer(state, f"model.layers.{index}."))
            return
        self.embedding = state["model.embed_tokens.weight"].clone()
        head = state.get("lm_head.weight", self.embedding)
        self.head = PackedLinear(head.clone() if head is not self.embedding else head)
        final_norm = state.get("model.norm.weight")
        self.final_norm = None if final_norm is None else final_norm.clone()
        self._layers = [self._layer(state, f"model.layers.{index}.") for index in range(self.num_layers)]

    def _layer(self, state: Mapping[str, torch.Tensor], prefix: str) -> _Layer:
        """Pack one layer."""

        def fused(names: Sequence[str], suffix: str) -> torch.Tensor | None:
            parts = []
            for name in names:
                part = state.get(f"{prefix}{name}.{suffix}")
                if part is None:
                    return None
                paired = name.endswith(("q_proj", "k_proj"))
                parts.append(_pairs_side_by_side(part, self.head_dim) if paired else part)
            return torch.cat(parts)

        def linear(*names: str) -> PackedLinear:
            weight = fused(names, "weight")
            if weight is None:
                raise KeyError(f"{prefix}{names[0]}.weight is not in the policy's state")
            return PackedLinear(weight, fused(names, "bias"))

        def norm(name: str) -> torch.Tensor | None:
            weight = state.get(f"{prefix}self_attn.{name}.weight")
            return None if weight is None else _pairs_side_by_side(weight, self.head_dim)

        layer = _Layer()
        attention_norm = state.get(f"{prefix}input_layernorm.weight")
        layer.attention_norm = None if attention_norm is None else attention_norm.clone()
        layer.qkv = linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        layer.query_norm, layer.key_norm = norm("q_norm"), norm("k_norm")
        layer.out = linear("self_attn.o_proj")
        layer.mlp_norm = state[f"{prefix}post_attention_layernorm.weight"].clone()
        layer.gate_up = linear("mlp.gate_proj", "mlp.up_proj")
        layer.down = linear("mlp.down_proj")
        return layer

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Normalise states where there is a norm. hidden: [n, hidden]. returns: likewise."""
        return hidden if weight is None else torch.rms_norm(hidden, hidden.shape[-1:], weight, self.epsilon)

    def _project(
        self, layer: _Layer, hidden: torch.Tensor, rotation: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled, rotated queries and the keys and values to store, in the cache's dtype.

        hidden: [n, hidden]. rotation: [n, num_heads + num_kv_heads, head_dim / 2].
        returns: [n, num_heads, head_dim] and [n, 2 * num_kv_heads, head_dim].
        """
        normed = self._normed(hidden, layer.attention_norm)
        projected = layer.qkv(normed).unflatten(-1, (-1, self.head_dim))  # [n, heads + 2 * kv heads, head_dim]
        num_rotated = self.num_heads + self.num_kv_heads
        if layer.query_norm is not None and layer.key_norm is not None:
            shape, epsilon = (self.head_dim,), self.epsilon
            projected[:, : self.num_heads] = torch.rms_norm(
                projected[:, : self.num_heads], shape, layer.query_norm, epsilon
            )
            keys = projected[:, self.num_heads : num_rotated]
            projected[:, self.num_heads : num_rotated] = torch.rms_norm(keys, shape, layer.key_norm, epsilon)
        wide = projected.float()
        torch.view_as_complex(wide[:, :num_rotated].unflatten(-1, (-1, 2))).mul_(rotation)
        wide = wide.to(self.cache_dtype)
        return wide[:, : self.num_heads], wide[:, self.num_heads :]

    def _feed_forward(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [n, hidden], after attention. returns: [n, hidden]."""
        normed = torch.rms_norm(hidden, hidden.shape[-1:], layer.mlp_norm, self.epsilon)
        gate, up = layer.gate_up(normed).chunk(2, dim=-1)
        return layer.down.plus(functional.silu(gate).mul_(up), hidden)

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Append one token to each slot; see ModelRunner."""
        positions, longest = torch.tensor(lengths, device=self.device), max(lengths) + 1
        if self.device.type != "cpu":
            return self.extend_within(tokens[:, None], positions[:, None], longest)
        mask = length_mask([length + 1 for length in lengths], self.num_kv_heads, self.device, self.cache_dtype)
        return self._decode(
            tokens, positions, lambda query, cache: attend_slots(query, cache[0], cache[1], longest, mask)
        )

    def extend_within(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Append as many tokens to each slot, recordably; see ModelRunner."""
        slots = torch.arange(len(tokens), device=self.device)[:, None].expand_as(tokens)
        mask = window_mask(positions + 1, self.num_heads // self.num_kv_heads, longest, self.cache_dtype)

        def attend(query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            rows = query.unflatten(0, tokens.shape).permute(0, 2, 3, 1, 4)  # [n, kv heads, group, num_new, head_dim]
            return attend_rows(rows, cache[0], cache[1], mask, fused=True).flatten(0, 1)

        return self._decode(tokens.flatten(), positions.flatten(), attend, slots.flatten())

    def _decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, positions: int64 [n]. attend: from scaled queries and a layer's cache to [n, heads * head_dim].

        slots: int64 [n], which each token extends; None: each its own.
        """
        rotation = self._rotation[positions][:, None] * self._head_scale  # [n, rotated heads, head_dim / 2]
        slots = torch.arange(len(tokens), device=self.device) if slots is None else slots
        rows = (slots * self._slot_stride + positions)[:, None] + self._head_rows  # [n, 2 * num_kv_heads]
        group = self.num_heads // self.num_kv_heads
        hidden = self.embedding[tokens]  # [n, hidden]
        for layer, cache in zip(self._layers, self.cache, strict=True):
            query, new = self._project(layer, hidden, rotation)
            cache.view(-1, self.head_dim)[rows] = new
            query = query.unflatten(1, (self.num_kv_heads, group))
            hidden = layer.out.plus(attend(query, cache).to(self.dtype), hidden)
            hidden = self._feed_forward(layer, hidden)
        return self._normed(hidden, self.final_norm)

    def extend(self, tokens: torch.Tensor, counts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append several tokens to each slot; see ModelRunner."""
        new = Extension(counts, lengths, self.device)
        mask = window_mask(new.limits, self.num_heads // self.num_kv_heads, new.longest, self.cache_dtype)
        return self._decode(
            tokens, new.positions, lambda query, cache: new.attend(query, cache[0], cache[1], mask), new.slots
        )

    def prefill(
        self, sequences: Sequence[Sequence[int]], slots: Sequence[int], num_last: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Fill slots with whole sequences; see ModelRunner."""
        lengths = [len(sequence) for sequence in sequences]
        tokens = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        rotation = self._rotation[positions][:, None] * self._head_scale
        starts = torch.tensor(slots).repeat_interleave(torch.tensor(lengths)).to(self.device)
        rows = ((starts * self._slot_stride + positions)[:, None] + self._head_rows).flatten()
        groups = rectangles(lengths, self.device) if self.device.type != "cpu" else []
        hidden = self.embedding[tokens]  # [num_tokens, hidden]
        for layer, cache in zip(self._layers, self.cache, strict=True):
            query, new = self._project(layer, hidden, rotation)
            cache.view(-1, self.head_dim).index_copy_(0, rows, new.reshape(-1, self.head_dim))
            if groups:
                attended = attend_rectangles(query, new[:, : self.num_kv_heads], new[:, self.num_kv_heads :], groups)
            else:
                keys, values = new.transpose(0, 1).split(self.num_kv_heads)  # [num_kv_heads, num_tokens, head_dim]
                attended = attend_prefill(query.transpose(0, 1), keys, values, lengths, scale=1.0)
            hidden = layer.out.plus(attended.to(self.dtype), hidden)
            hidden = self._feed_forward(layer, hidden)
        last = last_rows(lengths, num_last).to(self.device)
        return self._normed(hidden[last], self.final_norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the language model head; see ModelRunner."""
        return self.head(hidden)

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the start of one slot to others; see ModelRunner."""
        prefix = self.cache[:, :, source : source + 1, :, :length]
        if len(targets) == 1:  # a view, not an index that must be brought to the device
            self.cache[:, :, targets[0] : targets[0] + 1, :, :length] = prefix
        else:
            self.cache[:, :, torch.tensor(targets, device=self.device), :, :length] = prefix
