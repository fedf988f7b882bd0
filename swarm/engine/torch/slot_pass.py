"""A pass over all slots on a GPU, of a bucket's shape, so that it is recorded once and launched as a whole.

A pass appends tokens to every occupied slot, one of each while it decodes, more where drafts are verified, and draws
the token after each of them. It works on columns that mirror those of `Slots` on the device. The host uploads them when
requests come, go or move, and with every draft, and reads the drawn tokens back: the one time per pass that it waits.
Which of them are kept, and who finishes, is its own business. A pass of one token advances its columns by itself.

Shapes are rounded up to buckets. Slots beyond the occupied ones append whatever lies there: they are filled before
they are read. A slot with fewer tokens than others has its last one again and again, at the same position, so that
nothing is written that it does not hold. A mask hides the positions beyond a length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from swarm.engine.torch.graphs import GraphPool, bucket
from swarm.engine.torch.runner import ModelRunner
from swarm.engine.torch.sampling import Mode, sample_by_operations
from swarm.engine.torch.slots import Slots

__all__ = ["Drawn", "SlotPass"]

_LEAST_POSITIONS = 64
_LEAST_SLOTS = 32  # of more than one, for decoding: fewer cost a GPU as much
_MAX_NEW = 16  # tokens of a slot
_MAX_ROWS = 512  # of a pass with drafts; bounds the logits, and so the memory that graphs share
_NUM_COLUMNS = 5  # beside the tokens: seeds, generated, cached, top_k, tokens that are new


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the occupied slots draw after each of their new tokens, slot after slot."""

    tokens: np.ndarray  # int64 [num_rows]
    logprobs: np.ndarray  # float32 [num_rows]
    states: torch.Tensor | None  # [num_rows, hidden], the policy's after each of the new tokens, if asked for


@dataclass(frozen=True, slots=True)
class _Shape:
    num_slots: int
    num_new: int  # tokens of each
    longest: int  # positions to attend to
    mode: Mode  # what the sampler has to do
    keeps_states: bool


class SlotPass:
    """Runs passes over the slots of a runner. All calls happen under `torch.inference_mode`."""

    def __init__(self, runner: ModelRunner, num_slots: int, capacity: int, graphs: GraphPool) -> None:
        """capacity: positions of a slot."""
        self._runner, self._num_slots, self._capacity, self._graphs = runner, num_slots, capacity, graphs
        device, self._max_rows = runner.device, max(num_slots, _MAX_ROWS)
        self._ints = torch.zeros(_NUM_COLUMNS + _MAX_NEW, num_slots, dtype=torch.int64, device=device)
        self._floats = torch.ones(2, num_slots, device=device)
        self._drawn = torch.zeros(self._max_rows, 2, dtype=torch.int32, device=device)  # tokens, bits of logprobs
        self._states: torch.Tensor | None = None  # [max_rows, hidden], made when they are first asked for

    @property
    def num_graphs(self) -> int:
        """Shapes that are recorded now."""
        return self._graphs.num_graphs

    def fits(self, drafts: Sequence[Sequence[int]]) -> bool:
        """Whether there is a bucket for drafts of all occupied slots; what has none is no business of a pass."""
        num_slots, num_new = self._rectangle(len(drafts), 1 + max(map(len, drafts)))
        return num_new <= _MAX_NEW and num_slots * num_new <= _MAX_ROWS

    def _rectangle(self, num_slots: int, num_new: int) -> tuple[int, int]:
        """Round up the slots of a pass, and the tokens of each.

        Decoding has a bucket for every 32 slots or so. With drafts there are as many rows as both make together: few
        slots stay few, and powers of two keep the number of graphs small.
        """
        if num_new == 1:
            return bucket(num_slots, self._num_slots, _LEAST_SLOTS) if num_slots > 1 else 1, 1
        return bucket(num_slots, self._num_slots, halves=False), bucket(num_new, 2 * num_new, halves=False)

    def __call__(
        self, slots: Slots, drafts: Sequence[Sequence[int]] | None = None, *, keep_states: bool = False
    ) -> Drawn:
        """Append the last token of each occupied slot, and its draft, and draw. The slots are left to the caller.

        drafts: of each occupied slot, maybe empty, such as `fits`; None: of none.
        """
        n = len(slots)
        counts = np.array([len(draft) + 1 for draft in drafts] if drafts is not None else [1] * n)
        num_slots, num_new = self._rectangle(n, int(counts.max()))
        self._upload(slots, drafts, counts, num_new)
        longest = int((slots.cached[:n] + counts).max())
        shape = _Shape(
            num_slots,
            num_new,
            bucket(longest, self._capacity, _LEAST_POSITIONS, halves=num_new == 1),
            Mode.of(slots.temperature[:n], slots.top_k[:n], slots.top_p[:n]),
            keep_states,
        )
        self._graphs.run(shape, partial(self._step, shape))
        rows = (np.arange(num_new) < counts[:, None]).flatten().nonzero()[0]
        drawn = self._drawn[: rows[-1] + 1].cpu().numpy()[rows]
        states = None
        if keep_states and self._states is not None:  # copied: the next pass overwrites them
            states = self._states[torch.from_numpy(rows).to(self._states.device)]
        return Drawn(drawn[:, 0].astype(np.int64), drawn[:, 1].copy().view(np.float32), states)

    def _upload(self, slots: Slots, drafts: Sequence[Sequence[int]] | None, counts: np.ndarray, num_new: int) -> None:
        """Bring the columns to the device where they are not what it has, and the drafts."""
        if num_new == 1 and not slots.changed:
            return
        ints = np.zeros((_NUM_COLUMNS + num_new, self._num_slots), dtype=np.int64)
        ints[: _NUM_COLUMNS - 1] = slots.seeds, slots.generated, slots.cached, slots.top_k
        ints[_NUM_COLUMNS - 1] = 1
        ints[_NUM_COLUMNS - 1, : len(counts)] = counts
        ints[_NUM_COLUMNS] = slots.last_tokens
        for slot, draft in enumerate(drafts or ()):
            ints[_NUM_COLUMNS + 1 : _NUM_COLUMNS + 1 + len(draft), slot] = draft
        self._ints[: len(ints)].copy_(torch.from_numpy(ints))
        self._floats.copy_(torch.from_numpy(np.stack((slots.temperature, slots.top_p))))
        slots.changed = num_new > 1  # after drafts the device's columns are not advanced

    def _step(self, shape: _Shape) -> None:
        """Append and draw in the first slots. No operation here waits for the device."""
        num_slots, num_new = shape.num_slots, shape.num_new
        seeds, generated, cached, top_k, counts = self._ints[:_NUM_COLUMNS, :num_slots]
        temperature, top_p = self._floats[:, :num_slots]
        ahead = self._ahead(counts, num_new)  # [num_slots, num_new]
        tokens = self._ints[_NUM_COLUMNS : _NUM_COLUMNS + num_new, :num_slots].t().gather(1, ahead)
        positions = (cached[:, None] + ahead).clamp(max=shape.longest - 1)
        hidden = self._runner.extend_within(tokens, positions, shape.longest)
        logits = self._runner.logits(hidden)
        seeds, temperature, top_k, top_p = (  # [num_slots * num_new] each
            column[:, None].expand(-1, num_new).flatten() for column in (seeds, temperature, top_k, top_p)
        )
        places = (generated[:, None] + ahead).flatten()
        drawn, logprobs = sample_by_operations(logits, seeds, places, temperature, top_k, top_p, shape.mode)
        self._drawn[: len(drawn), 0] = drawn
        self._drawn[: len(drawn), 1] = logprobs.view(torch.int32)
        if shape.keeps_states:
            if self._states is None:
                self._states = hidden.new_zeros(self._max_rows, hidden.shape[1])
            self._states[: len(hidden)] = hidden
        if num_new == 1:
            self._ints[_NUM_COLUMNS, :num_slots] = drawn
            generated += 1
            cached += 1

    def _ahead(self, counts: torch.Tensor, num_new: int) -> torch.Tensor:
        """Return which of a slot's new tokens stands where in its row: its last one wherever it has no more."""
        return torch.arange(num_new, device=counts.device).minimum(counts[:, None] - 1)
