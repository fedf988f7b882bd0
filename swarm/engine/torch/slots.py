"""The running requests of the torch engine, as columns over slots, kept dense from slot 0 on.

Bookkeeping on the host, whatever the device: a step reads its tokens back once and all else follows from them.
The KV cache belongs to the runner, which moves its slots when these move.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from swarm.drafting.base import Drawing
from swarm.engine.base import Request, joined_segments
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
        """Tokens to prefill: the prompt, what has been written, and what may come next."""
        partial = self.request.partial
        return self.request.prompt_ids + (partial.token_ids if partial else ()) + self.request.draft

    def unstarted(self) -> Completion:
        """What a request that has no slot holds."""
        number, partial = self.request.request_id, self.request.partial
        return replace(partial, request_id=number) if partial else Completion(number, (), (), (), "aborted")

    def resumed(self, partial: Completion) -> "Running":
        """The same request, to be continued from `partial`."""
        return Running.of(replace(self.request, partial=partial if partial.token_ids else None, draft=()))


class Slots:
    """Columns over slots: seeds, counters and what has been written. Slots 0 to len - 1 are occupied."""

    def __init__(self, num_slots: int, max_seq_len: int, eos_token_ids: Sequence[int]) -> None:
        self.num_slots = num_slots
        self.changed = True  # whether requests came, went or moved: `graphs` mirrors the columns on the device
        self._running: list[Running] = []
        self.last_tokens = np.zeros(num_slots, dtype=np.int64)
        self.seeds = np.zeros(num_slots, dtype=np.int64)  # by their bits
        self.generated = np.zeros(num_slots, dtype=np.int64)  # tokens of the completion
        self.cached = np.zeros(num_slots, dtype=np.int64)  # positions in the KV cache
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.temperature = np.ones(num_slots, dtype=np.float32)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self._budget = np.zeros(num_slots, dtype=np.int64)
        self._heeds_eos = np.zeros(num_slots, dtype=np.bool_)
        self._tokens = np.zeros((num_slots, max_seq_len), dtype=np.int64)
        self._logprobs = np.zeros((num_slots, max_seq_len), dtype=np.float32)
        self._columns = (
            self.last_tokens, self.seeds, self.generated, self.cached, self.top_k, self.temperature, self.top_p,
            self._budget, self._heeds_eos,
        )  # fmt: skip
        self._eos, self._ends = np.array(list(eos_token_ids), dtype=np.int64), frozenset(eos_token_ids)

    def __len__(self) -> int:
        """Slots that are occupied."""
        return len(self._running)

    def __iter__(self) -> Iterator[Running]:
        """The running requests, by slot."""
        return iter(self._running)

    @property
    def num_free(self) -> int:
        """Slots that are not occupied."""
        return self.num_slots - len(self._running)

    @property
    def request_ids(self) -> set[int]:
        """Ids of the running requests."""
        return {running.request.request_id for running in self._running}

    def add(self, running: Running, *, cached: int, version: int) -> None:
        """Give a request the next slot, whose cache will hold `cached` positions."""
        slot, request = len(self._running), running.request
        partial = request.partial.token_ids if request.partial else ()
        running.slot, running.start, running.version = slot, len(partial), version
        seed, sampling = request.seed, request.sampling
        self.seeds[slot] = seed - (1 << 64) if seed >> 63 else seed
        self.generated[slot] = len(partial)
        self.cached[slot] = cached
        self.top_k[slot], self.top_p[slot] = sampling.top_k, sampling.top_p
        self.temperature[slot] = sampling.temperature
        self._budget[slot] = sampling.max_new_tokens
        self._heeds_eos[slot] = not sampling.ignore_eos
        if request.partial and partial:
            self._tokens[slot, : len(partial)] = partial
            self._logprobs[slot, : len(partial)] = request.partial.logprobs
        self._running.append(running)
        self.changed = True

    def append(
        self, rows: slice | np.ndarray, tokens: np.ndarray, logprobs: np.ndarray
    ) -> list[tuple[Running, Literal["stop", "length"]]]:
        """Write one token to each of some slots; return those that have finished. tokens, logprobs: [len(rows)]."""
        generated = self.generated[rows] + 1
        index = np.arange(self.num_slots)[rows]
        self._tokens[index, generated - 1] = tokens
        self._logprobs[index, generated - 1] = logprobs
        self.last_tokens[rows] = tokens
        self.generated[rows] = generated
        stopped = np.isin(tokens, self._eos) & self._heeds_eos[rows]
        ended = (stopped | (generated >= self._budget[rows])).nonzero()[0]
        return [(self._running[index[row]], "stop" if stopped[row] else "length") for row in ended]

    def until_end(self, request: Request) -> Request:
        """Cut a draft after the token that would end the completion."""
        if request.sampling.ignore_eos or self._ends.isdisjoint(request.draft):
            return request
        return replace(request, draft=request.draft[: self._length(request.draft)])

    def _length(self, tokens: Sequence[int]) -> int:
        """Return how many tokens there are up to the first that ends a completion, which is among them."""
        return next(num for num, token in enumerate(tokens, 1) if token in self._ends)

    def written(self, slot: int, start: int) -> list[int]:
        """Return the tokens of a completion from `start` on."""
        tokens: list[int] = self._tokens[slot, start : self.generated[slot]].tolist()
        return tokens

    def drawing(self, slot: int) -> Drawing:
        """Return how the tokens of a slot are drawn."""
        sampling = float(self.temperature[slot]), int(self.top_k[slot]), float(self.top_p[slot])
        return Drawing(int(self.seeds[slot]), *sampling)

    def room(self, slot: int) -> int:
        """The longest draft that is worth verifying: one token fewer than the budget has left."""
        return int(self._budget[slot] - self.generated[slot]) - 1

    def verify(
        self, running: Running, draft: Sequence[int], tokens: np.ndarray, logprobs: np.ndarray
    ) -> tuple[int, Literal["stop", "length"] | None]:
        """Write what a policy draws along a draft, up to its first own token, which is kept as well.

        tokens, logprobs: [len(draft) + 1], drawn after the draft's first 0, 1, … tokens. Returns how many tokens of the
        draft were kept, and why the completion has finished, if it has.
        """
        slot = running.slot
        differs = (tokens[:-1] != np.array(draft, dtype=np.int64)).nonzero()[0]
        kept = int(differs[0]) if len(differs) else len(draft)
        before = int(self.generated[slot])
        num = min(kept + 1, int(self._budget[slot]) - before)
        drawn = tokens[:num].tolist()
        stopped = bool(self._heeds_eos[slot]) and not self._ends.isdisjoint(drawn)
        if stopped:
            num = self._length(drawn)
        total = before + num
        self._tokens[slot, before:total], self._logprobs[slot, before:total] = tokens[:num], logprobs[:num]
        self.last_tokens[slot], self.generated[slot] = tokens[num - 1], total
        self.cached[slot] = len(running.request.prompt_ids) + total - 1
        self.changed = True
        kept = min(kept, num)
        if stopped:
            return kept, "stop"
        return kept, "length" if total >= self._budget[slot] else None

    def completion(self, running: Running, reason: FinishReason) -> Completion:
        """Return what a slot holds."""
        slot, num = running.slot, int(self.generated[running.slot])
        segments = running.segments
        if num > running.start:
            segments = joined_segments(segments, Segment(running.version, running.start, num))
        return Completion(
            running.request.request_id,
            tuple(self._tokens[slot, :num].tolist()),
            tuple(self._logprobs[slot, :num].tolist()),
            segments,
            reason,
        )

    def remove(self, running: Running) -> None:
        """Free a slot; the last occupied one takes its place."""
        slot, last = running.slot, len(self._running) - 1
        if slot != last:
            for column in self._columns:
                column[slot] = column[last]
            num = self.generated[last]
            self._tokens[slot, :num], self._logprobs[slot, :num] = self._tokens[last, :num], self._logprobs[last, :num]
            self._running[slot] = self._running[last]
            self._running[slot].slot = slot
        self._running.pop()
        running.slot = -1
        self.changed = True
