"""What a model is to the engine: prefill sequences into slots, and decode one token of every slot.

    ModelRunner   the contract
    LlamaRunner   Llama, Mistral, Qwen2, Qwen3 and their kin, as few fused operations (llama.py)
    GenericRunner any transformers causal LM with an exchangeable attention function (generic.py)

A runner owns its copy of the weights and the KV cache. Slots 0 to n - 1 are the ones that decode: the
engine keeps them dense by `move`. Nothing is reallocated per step.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

__all__ = ["ModelRunner", "last_rows"]


def last_rows(lengths: Sequence[int], num_last: Sequence[int] | None) -> torch.Tensor:
    """Return which rows are the last ones of sequences that lie one after another, int64 [sum(num_last)]."""
    if num_last is None or max(num_last) == 1:
        return torch.tensor(lengths).cumsum(0) - 1
    ends = np.cumsum(lengths)
    return torch.from_numpy(np.concatenate([np.arange(e - n, e) for e, n in zip(ends, num_last, strict=True)]))


class ModelRunner(ABC):
    """Runs the model over slots of a KV cache. All calls happen under `torch.inference_mode`."""

    device: torch.device
    vocab_size: int
    decodes_while_prefilling: ClassVar[bool] = False  # whether it has `decode_and_prefill`
    max_prefill_rows = 8192  # whose states one prefill is asked for, as far as single sequences allow; bounds memory

    @abstractmethod
    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        """model: a transformers causal LM; its weights are copied. capacity: positions of one slot."""

    @staticmethod
    @abstractmethod
    def supports(model: Any) -> bool:
        """Whether this runner computes the model exactly."""

    @abstractmethod
    def prefill(
        self, sequences: Sequence[Sequence[int]], slots: Sequence[int], num_last: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Fill each slot with a whole sequence from position 0.

        num_last: of each sequence, at least 1; None: 1. returns: [sum(num_last), hidden], the states after so many last
        tokens of each sequence, for `logits`.
        """

    @abstractmethod
    def decode(self, tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Append one token to each of the slots 0 to n - 1 and return the state after it, for `logits`.

        tokens: int64 [n]. lengths: tokens that each slot holds before this one. returns: [n, hidden].
        """

    def decode_and_prefill(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int],
        sequences: Sequence[Sequence[int]],
        slots: Sequence[int],
        num_last: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """`decode` the slots 0 to n - 1 and `prefill` others, in one pass: a pass costs as much as several tokens.

        returns: [n + sum(num_last), hidden].
        """
        raise NotImplementedError(f"{type(self).__name__} prefills by itself")

    @abstractmethod
    def extend(self, tokens: torch.Tensor, counts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """Append several tokens to each of the slots 0 to n - 1 and return the states after each, for `logits`.

        tokens: int64 [sum(counts)], slot after slot. counts: of each slot, at least 1. lengths: as for `decode`.
        returns: [sum(counts), hidden], those that `decode` gives token by token.
        """

    def extend_within(self, tokens: torch.Tensor, positions: torch.Tensor, longest: int) -> torch.Tensor:
        """Append as many tokens to each of the slots 0 to n - 1, at positions that lie on the device.

        tokens, positions: int64 [n, num_new]; a token may come again at its position. longest: more than any position.
        returns: [n * num_new, hidden], slot after slot. Nothing in it waits for the device, so that it can be recorded
        as a graph. Runners for the CPU alone lack it.
        """
        raise NotImplementedError(f"{type(self).__name__} runs on the CPU alone")

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [num_rows, hidden]. returns: [num_rows, vocab]."""

    @abstractmethod
    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first `length` positions of one slot to others."""

    @abstractmethod
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take new weights by the names of the model's `state_dict`. The cache is stale afterwards.

        They go where the old ones lie, but for packed ones: recorded graphs hold their addresses.
        """

    def move(self, source: int, target: int, length: int) -> None:
        """Make what slot `source` holds the content of slot `target`; what `target` held is lost."""
        self.copy_prefix(source, [target], length)
