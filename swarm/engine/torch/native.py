"""The runner that calls the compiled kernels: Llama-shaped models on a CPU.

A token's logits have the same bits whatever is computed beside it (kernels.h), in prefill as in decoding.
Weights are packed at every `load`, in the layouts that kernels.h names.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from swarm.engine.torch.llama import LlamaRunner, LlamaShape
from swarm.engine.torch.runner import ModelRunner
from swarm.native import Kernels, huge_pages, kernels

__all__ = ["NativeLinear", "NativeRunner"]

_MAX_ROWS = 512  # tokens of one call; bounds the scratch memory
_LANES = 16
_PADDED_ROWS = 2 * _LANES  # outputs that are computed together
_MAX_HEAD_DIM = 256
_MAX_GROUP = 4  # as in kernels.c
_MAX_THREADS = 128

_POINTERS = (
    "embedding", "head", "final_norm", "cosine", "sine",
    "keys", "values", "residual", "qkv", "scores", "input", "attended", "activation",
)  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in (
            "qkv", "out", "gate_up", "down", "qkv_bias", "out_bias",
            "attention_norm", "mlp_norm", "query_norm", "key_norm",
        )
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in (
            "is_bf16", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate", "num_layers", "vocab",
            "num_slots", "capacity", "num_threads",
        )),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS[:5]),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in _POINTERS[5:]),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [
        ("num", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tokens", "slots", "positions", "first_sharer", "sharers")),
    ]  # fmt: skip


class _Prefixes:
    """Sequences as a tree: what several begin with is one chain of rows, which is computed once for all of them."""

    def __init__(self, sequences: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        none = np.zeros(0, dtype=np.int64)
        before, rows_before, num_rows = tuple[int, ...](), none, 0
        tokens, positions, owners = [none], [none], [none]
        self.sharers: dict[int, list[int]] = {}  # row -> slots that are to have it, beside the one it is computed in
        self.rows_of: list[npt.NDArray[np.int64]] = [none] * len(sequences)  # the rows of each sequence
        alike_together = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
        for index in alike_together:
            sequence = sequences[index]
            shared = _num_shared(before, sequence)
            num_new = len(sequence) - shared
            tokens.append(np.array(sequence[shared:], dtype=np.int64))
            positions.append(np.arange(shared, len(sequence)))
            owners.append(np.full(num_new, slots[index]))
            rows = np.concatenate([rows_before[:shared], np.arange(num_rows, num_rows + num_new)])
            for row in rows[:shared].tolist():
                self.sharers.setdefault(row, []).append(slots[index])
            self.rows_of[index] = rows
            before, rows_before, num_rows = tuple(sequence), rows, num_rows + num_new
        self.tokens, self.positions, self.slots = map(np.concatenate, (tokens, positions, owners))  # of each row


def _num_shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


def _pad_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Append zeros to the first dimension, up to whole panels of outputs."""
    short = -tensor.shape[0] % _PADDED_ROWS
    return torch.cat([tensor, tensor.new_zeros(short, *tensor.shape[1:])]) if short else tensor


class _Packed:
    """Matrices in the layouts of kernels.h, one after another in one piece of memory: a huge page takes 2 MiB of it."""

    def __init__(self, num_bytes: int) -> None:
        self._memory = huge_pages(torch.empty(num_bytes, dtype=torch.uint8))
        self._end = 0

    @staticmethod
    def size(num_out: int, num_in: int, dtype: torch.dtype) -> int:
        """Return the bytes of a packed matrix."""
        return (num_out + -num_out % _PADDED_ROWS) * num_in * dtype.itemsize

    def clear(self) -> None:
        """Begin anew, in the same memory."""
        self._end = 0

    def add(self, weight: torch.Tensor) -> torch.Tensor:
        """Append [out, in] as [out / 16][in / 2][16][2] in bf16, or [out / 16][in][16] in float32; return it there."""
        lanes = _pad_rows(weight.contiguous())
        if weight.dtype == torch.bfloat16:
            lanes = lanes.view(torch.int32)  # two inputs side by side are one item
        blocks = lanes.view(-1, _LANES, lanes.shape[1]).transpose(1, 2)
        num_out, num_in = weight.shape
        begin, self._end = self._end, self._end + self.size(num_out, num_in, weight.dtype)
        packed = self._memory[begin : self._end].view(blocks.dtype).view(blocks.shape)
        return packed.copy_(blocks)


def _interleave(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Alternate blocks of 16 rows of two weights. Both: [intermediate, hidden]."""
    return torch.stack([gate.view(-1, _LANES, gate.shape[1]), up.view(-1, _LANES, up.shape[1])], 1).flatten(0, 2)


def _times(library: Kernels, model: _Model, x: torch.Tensor, num_out: int) -> torch.Tensor:
    """Multiply rows with a model's head. x: float32 [num_rows, in_features]. returns: float32 [num_rows, num_out]."""
    out = torch.empty(len(x), num_out)
    for start in range(0, len(x), _MAX_ROWS):
        part = x[start : start + _MAX_ROWS].contiguous()
        library.logits(ctypes.byref(model), library.instruction_set, part.data_ptr(), len(part), out[start:].data_ptr())
    return out


class NativeRunner(ModelRunner):
    """Runs a Llama-shaped model through the compiled kernels."""

    decodes_while_prefilling = True

    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        library = kernels()
        if library is None:
            raise RuntimeError("the decode kernels are not compiled")
        self._library: Kernels = library
        shape = self._shape = LlamaShape.of(model)
        self.device, self.vocab_size, self.dtype = model.device, shape.vocab_size, model.dtype
        capacity += -capacity % _LANES
        cosine, sine = shape.rotary_tables(model, capacity)
        rows, widest = _MAX_ROWS, max(shape.hidden, shape.num_heads * shape.head_dim)
        total_heads = shape.num_heads + 2 * shape.num_kv_heads
        num_threads = min(torch.get_num_threads(), _MAX_THREADS)
        cache = (shape.num_layers, num_slots, shape.num_kv_heads, capacity * shape.head_dim)
        self._tensors = {
            "keys": huge_pages(torch.empty(cache, dtype=self.dtype)).zero_(),
            "values": huge_pages(torch.empty(cache, dtype=self.dtype)).zero_(),
            "cosine": cosine.contiguous(),
            "sine": sine.contiguous(),
            "residual": torch.zeros(rows, shape.hidden),
            "qkv": torch.zeros(rows, total_heads * shape.head_dim),
            "scores": torch.zeros(num_threads, _MAX_GROUP, capacity + _LANES),
            "input": torch.zeros(max(rows, num_slots), widest, dtype=self.dtype),
            "attended": torch.zeros(rows, shape.num_heads * shape.head_dim, dtype=self.dtype),
            "activation": torch.zeros(rows, shape.intermediate, dtype=self.dtype),
        }
        self._model = _Model(
            is_bf16=self.dtype == torch.bfloat16, hidden=shape.hidden, num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate=shape.intermediate,
            num_layers=shape.num_layers, vocab=shape.vocab_size, num_slots=num_slots, capacity=capacity,
            num_threads=num_threads, epsilon=shape.epsilon,
        )  # fmt: skip
        self._places = torch.arange(num_slots)  # where in the cache each slot lies: moving a slot moves no data
        of_a_layer = (
            (total_heads * shape.head_dim, shape.hidden), (shape.hidden, shape.num_heads * shape.head_dim),
            (2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate),
        )  # fmt: skip
        matrices = [*(shape.num_layers * of_a_layer), (shape.vocab_size, shape.hidden)]
        self._packed = _Packed(sum(_Packed.size(*one, self.dtype) for one in matrices))
        self._layers = (_Layer * shape.num_layers)()
        self._model.layers = self._layers
        self.load(model.state_dict())

    @staticmethod
    def supports(model: Any) -> bool:
        """Whether the kernels are there and compute this model exactly."""
        if model.device.type != "cpu" or model.dtype not in (torch.float32, torch.bfloat16):
            return False
        if kernels() is None or not LlamaRunner.supports(model):
            return False
        if getattr(model.config, "mlp_bias", False):
            return False
        shape = LlamaShape.of(model)
        widths = (shape.hidden, shape.head_dim, shape.intermediate)
        return all(width % _LANES == 0 for width in widths) and shape.head_dim <= _MAX_HEAD_DIM

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take new weights; see ModelRunner."""
        state = {name: tensor.detach() for name, tensor in state.items()}
        keep = self._tensors

        def weight(name: str, tensor: torch.Tensor | None) -> int | None:
            """Keep a tensor alive and return its address."""
            if tensor is None:
                return None
            keep[name] = tensor
            return tensor.data_ptr()

        def matrix(*names: str) -> torch.Tensor:
            return torch.cat([state[f"{name}.weight"].to(self.dtype) for name in names])

        def vector(*names: str) -> torch.Tensor | None:
            parts = [state[name] for name in names if name in state]
            return torch.cat([part.float() for part in parts]).contiguous() if parts else None

        def bias(*names: str) -> torch.Tensor | None:
            found = vector(*(f"{name}.bias" for name in names))
            return None if found is None else _pad_rows(found)

        pack = self._packed.add
        self._packed.clear()
        for index in range(self._shape.num_layers):
            at = f"model.layers.{index}."
            qkv = tuple(f"{at}self_attn.{name}_proj" for name in "qkv")
            gate, up = matrix(f"{at}mlp.gate_proj"), matrix(f"{at}mlp.up_proj")
            fields = {
                "qkv": pack(matrix(*qkv)),
                "out": pack(matrix(f"{at}self_attn.o_proj")),
                "gate_up": pack(_interleave(gate, up)),
                "down": pack(matrix(f"{at}mlp.down_proj")),
                "qkv_bias": bias(*qkv),
                "out_bias": bias(f"{at}self_attn.o_proj"),
                "attention_norm": vector(f"{at}input_layernorm.weight"),
                "mlp_norm": vector(f"{at}post_attention_layernorm.weight"),
                "query_norm": vector(f"{at}self_attn.q_norm.weight"),
                "key_norm": vector(f"{at}self_attn.k_norm.weight"),
            }
            for name, tensor in fields.items():
                setattr(self._layers[index], name, weight(at + name, tensor))
        embedding = state["model.embed_tokens.weight"].to(self.dtype)
        head = state.get("lm_head.weight")
        keep["embedding"] = embedding.clone()
        keep["head"] = pack(embedding if head is None else head.to(self.dtype))
        final_norm = vector("model.norm.weight")
        if final_norm is not None:  # a drafter's layer has none
            keep["final_norm"] = final_norm
        for name in _POINTERS:
            setattr(self._model, name, keep[name].data_ptr() if name in keep else None)

    def _forward(
        self,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        sharers: Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """tokens, slots, positions: int64 [num_tokens]. returns: float32 [num_tokens, hidden].

        sharers: of each token, other slots that hold the same tokens up to it, and are to have its keys and values too.
        """
        hidden = torch.empty(len(tokens), self._shape.hidden)
        for start in range(0, len(tokens), _MAX_ROWS):
            rows = slice(start, start + _MAX_ROWS)
            part = [tokens[rows].contiguous(), slots[rows].contiguous(), positions[rows].contiguous()]
            if sharers is not None:
                ends = np.cumsum([0, *(len(others) for others in sharers[rows])])
                others = self._places[[slot for others in sharers[rows] for slot in others]]
                part += [torch.from_numpy(ends), others]
            pointers = [tensor.data_ptr() for tensor in part]
            self._library.forward(
                ctypes.byref(self._model), self._library.instruction_set,
                ctypes.byref(_Rows(len(part[0]), *pointers)), hidden[rows].data_ptr(),
            )  # fmt: skip
        return hidden

    def decode(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Append one token to each slot; see ModelRunner."""
        return self._forward(tokens, self._places[: len(lengths)], torch.tensor(lengths))

    def extend(self, tokens: torch.Tensor, counts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append several tokens to each slot; see ModelRunner."""
        repeats = torch.tensor(counts)
        positions = torch.cat([torch.arange(at, at + num) for at, num in zip(lengths, counts, strict=True)])
        return self._forward(tokens, self._places[: len(counts)].repeat_interleave(repeats), positions)

    def prefill(
        self, sequences: Sequence[Sequence[int]], slots: Sequence[int], num_last: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Fill slots with whole sequences; see ModelRunner."""
        return self.decode_and_prefill(torch.zeros(0, dtype=torch.int64), [], sequences, slots, num_last)

    def decode_and_prefill(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        sequences: Sequence[Sequence[int]],
        slots: Sequence[int],
        num_last: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Do both in one pass; see ModelRunner."""
        tree, num = _Prefixes(sequences, slots), len(lengths)
        places = torch.cat([self._places[:num], self._places[torch.from_numpy(tree.slots)]])
        positions = torch.from_numpy(np.concatenate([np.array(lengths, dtype=np.int64), tree.positions]))
        sharers = None
        if tree.sharers:
            sharers = [*([()] * num), *(tree.sharers.get(row, ()) for row in range(len(tree.tokens)))]
        hidden = self._forward(torch.cat([tokens, torch.from_numpy(tree.tokens)]), places, positions, sharers)
        counts = num_last or [1] * len(slots)
        wanted = [num + rows[-count:] for rows, count in zip(tree.rows_of, counts, strict=True)]
        return hidden[torch.from_numpy(np.concatenate([np.arange(num), *wanted]))]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the language model head; see ModelRunner."""
        return _times(self._library, self._model, hidden, self.vocab_size)

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the start of one slot to others; see ModelRunner."""
        width = (length + -length % _LANES) * self._shape.head_dim  # keys lie in blocks of 16 positions
        places = self._places.tolist()
        for side in (self._tensors["keys"], self._tensors["values"]):
            for target in targets:
                side[:, places[target], :, :width].copy_(side[:, places[source], :, :width])

    def move(self, source: int, target: int, length: int) -> None:
        """Exchange the places of two slots; see ModelRunner."""
        self._places[[source, target]] = self._places[[target, source]]


class NativeLinear:
    """`x @ weight.T` through the compiled kernels, with the weight packed once."""

    def __init__(self, weight: torch.Tensor) -> None:
        """weight: [out_features, in_features], float32 or bfloat16; in_features a multiple of 16."""
        library = kernels()
        if library is None:
            raise RuntimeError("the decode kernels are not compiled")
        self._library: Kernels = library
        self._num_out, width = weight.shape
        self._packed = _Packed(_Packed.size(self._num_out, width, weight.dtype))
        self._scratch = torch.zeros(_MAX_ROWS, width, dtype=weight.dtype)
        self._model = _Model(
            is_bf16=weight.dtype == torch.bfloat16, hidden=width, vocab=self._num_out,
            head=self._packed.add(weight).data_ptr(), input=self._scratch.data_ptr(),
            num_threads=min(torch.get_num_threads(), _MAX_THREADS),
        )  # fmt: skip

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [num_rows, in_features]. returns: float32 [num_rows, out_features]."""
        return _times(self._library, self._model, x, self._num_out)
