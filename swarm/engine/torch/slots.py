"""The running requests of the torch engine, as columns over slots, kept dense from slot 0 on.

Bookkeeping only: the KV cache belongs to the runner, which moves its slots when these move.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from swarm.engine.base import Request
from swarm.types import Completion, FinishReason, Segment

__all__ = ["Running", "Slots"]


@dataclass(slots=True, eq=False)
class Running:
    """A request with its slot and the segments that earlier policies wrote."""

    request: Request
    segments: tuple[Segment, ...]
    slot: int = -1
    start: int = 0  # tokens it had when it took its slot
    version: int = 0  # policy that writes it now

    @classmethod
    def of(cls, request: Request) -> "Running":
        """Wrap a request that waits."""
        return cls(request, request.partial.segments if request.partial else ())

    def sequence(self) -> tuple[int, ...]:
        """Tokens to prefill: the prompt and what has been written."""
        partial = self.request.partial
        return self.request.prompt_ids + partial.token_ids if partial else self.request.prompt_ids

    def unstarted(self) -> Completion:
        """What a request that has no slot holds."""
        return self.request.partial or Completion(self.request.request_id, (), (), (), "aborted")

    def resumed(self, partial: Completion) -> "Running":
        """The same request, to be continued from `partial`."""
        return Running.of(replace(self.request, partial=partial if partial.token_ids else None))


class Slots:
    """Columns over slots: seeds, counters and what has been written. Slots 0 to len - 1 are occupied."""

    def __init__(self, num_slots: int, max_seq_len: int, eos_token_ids: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._running: list[Running] = []
        self._num_slots = num_slots
        self.cached = np.zeros(0, dtype=np.int64)  # [num occupied], positions in the KV cache
        self._columns = {
            "last_tokens": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "seeds": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "generated": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "budget": torch.zeros(num_slots, dtype=torch.int64, device=device),
            "heeds_eos": torch.zeros(num_slots, dtype=torch.bool, device=device),
            "temperature": torch.ones(num_slots),  # on the CPU: read by control flow
            "top_k": torch.zeros(num_slots, dtype=torch.int64),
            "top_p": torch.ones(num_slots),
            "tokens": torch.zeros(num_slots, max_seq_len, dtype=torch.int64, device=device),
            "logprobs": torch.zeros(num_slots, max_seq_len, dtype=torch.float32, device=device),
        }
        self.last_tokens, self.seeds = self._columns["last_tokens"], self._columns["seeds"]
        self.generated = self._columns["generated"]
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Slots that are occupied."""
        return len(self._running)

    def __iter__(self) -> Iterator[Running]:
        """The running requests, by slot."""
        return iter(self._running)

    @property
    def num_free(self) -> int:
        """Slots that are not occupied."""
        return self._num_slots - len(self._running)

    @property
    def request_ids(self) -> set[int]:
        """Ids of the running requests."""
        return {running.request.request_id for running in self._running}

    def add(self, running: Running, *, cached: int, version: int) -> None:
        """Give a request the next slot, whose cache will hold `cached` positions."""
        slot, request, columns = len(self._running), running.request, self._columns
        partial = request.partial.token_ids if request.partial else ()
        running.slot, running.start, running.version = slot, len(partial), version
        seed = request.seed
        columns["seeds"][slot] = seed - (1 << 64) if seed >> 63 else seed
        columns["generated"][slot] = len(partial)
        columns["budget"][slot] = request.sampling.max_new_tokens
        columns["heeds_eos"][slot] = not request.sampling.ignore_eos
        columns["temperature"][slot] = request.sampling.temperature
        columns["top_k"][slot] = request.sampling.top_k
        columns["top_p"][slot] = request.sampling.top_p
        if request.partial and partial:
            columns["tokens"][slot, : len(partial)] = torch.tensor(partial, device=self.device)
            columns["logprobs"][slot, : len(partial)] = torch.tensor(request.partial.logprobs, device=self.device)
        self._running.append(running)
        self.cached = np.append(self.cached, cached)

    def rows(self, where: Sequence[int]) -> slice | torch.Tensor:
        """Return an index for some slots: a slice where they are the first ones."""
        if isinstance(where, range):
            return slice(where.start, where.stop)
        return torch.tensor(where, device=self.device)

    def temperatures(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return the temperatures of some slots, on the CPU."""
        return self._columns["temperature"][rows if isinstance(rows, slice) else rows.cpu()]

    def truncation(self, rows: slice | torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return top-k and top-p of some slots, or None twice where all have them off."""
        host = rows if isinstance(rows, slice) else rows.cpu()
        top_k, top_p = self._columns["top_k"][host], self._columns["top_p"][host]
        if bool((top_k == 0).all()) and bool((top_p == 1).all()):
            return None, None
        return top_k.to(self.device), top_p.to(self.device)

    def append(
        self, rows: slice | torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor
    ) -> list[tuple[Running, Literal["stop", "length"]]]:
        """Write one token to each of some slots; return those that have finished. tokens, logprobs: [len(rows)]."""
        columns = self._columns
        generated = columns["generated"][rows] + 1
        index = torch.arange(self._num_slots, device=self.device)[rows]
        columns["tokens"][index, generated - 1] = tokens
        columns["logprobs"][index, generated - 1] = logprobs
        columns["last_tokens"][rows] = tokens
        columns["generated"][rows] = generated
        stopped = torch.isin(tokens, self._eos) & columns["heeds_eos"][rows]
        full = generated >= columns["budget"][rows]
        if not bool((stopped | full).any()):
            return []
        ended = (stopped | full).nonzero().flatten()
        slots, stops = index[ended].tolist(), stopped[ended].tolist()
        return [(self._running[slot], "stop" if stop else "length") for slot, stop in zip(slots, stops, strict=True)]

    def completion(self, running: Running, reason: FinishReason) -> Completion:
        """Return what a slot holds."""
        num = int(self._columns["generated"][running.slot])
        segments = running.segments
        if num > running.start:
            segments = _join(segments, Segment(running.version, running.start, num))
        return Completion(
            running.request.request_id,
            tuple(self._columns["tokens"][running.slot, :num].tolist()),
            tuple(self._columns["logprobs"][running.slot, :num].tolist()),
            segments,
            reason,
        )

    def remove(self, running: Running) -> None:
        """Free a slot; the last occupied one takes its place."""
        slot, last = running.slot, len(self._running) - 1
        if slot != last:
            for column in self._columns.values():
                column[slot] = column[last]
            self.cached[slot] = self.cached[last]
            self._running[slot] = self._running[last]
            self._running[slot].slot = slot
        self._running.pop()
        self.cached = self.cached[:last].copy()
        running.slot = -1


def _join(segments: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """Append a segment, merging it with the last one where the same policy wrote both."""
    if segments and segments[-1].policy_version == new.policy_version:
        return (*segments[:-1], Segment(new.policy_version, segments[-1].start, new.end))
    return (*segments, new)
