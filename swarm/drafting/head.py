"""The learned drafter in use: drafts from the policy's last states, with the noise that the policy itself will draw by.

It has a KV cache of its own, a slot for each running sequence. What the engine computes anyway, the states after each
token, is handed to it (`saw`) and kept for a few steps; a draft begins with all that is new of a sequence in one pass,
and goes on token by token on the drafter's own states. Each token is drawn from the drafter's distribution with the
noise of its request and position: where drafter and policy agree, they draw the same token, at any temperature.

A sequence that was decoded plainly for long begins anew from its last tokens: attention over positions counts distances
alone. The network and its weights are `head_model`'s and `learner`'s.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swarm.drafting.base import Drafter, Seen, SequenceState, within_budget
from swarm.drafting.head_model import HeadModel
from swarm.drafting.pairs import CONTEXT_TOKENS
from swarm.drafting.worth import UNKNOWN, Worth
from swarm.engine.torch.attention import Extension, window_mask
from swarm.engine.torch.linear import PackedLinear
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeLinear, NativeRunner
from swarm.engine.torch.sampling import Mode, draw

__all__ = ["HeadDrafter"]

_PRIOR_KEPT, _PRIOR_TRIED = 3.0, 4.0
_MARGINS = np.array([0.25, 0.5, 1.0, 2.0, 3.0, 4.5, 7.0])  # of noisy scores, between classes of tokens
_NUM_CLASSES = len(_MARGINS) + 1
_STEPS_REMEMBERED = 32
_MEMORY_TOKENS = 256.0  # observations after which they count half


class _NativeLayer(NativeRunner):
    """Runs the drafter's layer through the compiled kernels, on inputs that are no embeddings of tokens."""

    linear = NativeLinear
    states_dtype = torch.float32  # what `linear` takes

    def place(self, inputs: Tensor) -> Tensor:
        """Put inputs where embeddings are looked up, and return the "tokens" that stand for them."""
        self._tensors["embedding"][: len(inputs)] = inputs
        return torch.arange(len(inputs))

    def extend_slots(
        self, tokens: Tensor, counts: Sequence[int], lengths: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        """Like `extend`, with the slots named. slots: [len(counts)]."""
        places, positions = self._places[torch.tensor(slots)], torch.tensor(lengths)
        if max(counts) > 1:
            positions = torch.cat([torch.arange(at, at + num) for at, num in zip(lengths, counts, strict=True)])
            places = places.repeat_interleave(torch.tensor(counts))
        return self._forward(tokens, places, positions)


class _TorchLayer(LlamaRunner):
    """The same by torch's own operations, on any device."""

    linear = PackedLinear

    @property
    def states_dtype(self) -> torch.dtype:
        """See _NativeLayer."""
        return self.embedding.dtype

    def place(self, inputs: Tensor) -> Tensor:
        """See _NativeLayer."""
        self.embedding[: len(inputs)] = inputs
        return torch.arange(len(inputs), device=self.device)

    def extend_slots(
        self, tokens: Tensor, counts: Sequence[int], lengths: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        """See _NativeLayer."""
        new, chosen = Extension(counts, lengths, self.device), torch.tensor(slots, device=self.device)
        mask = window_mask(new.limits, self.num_heads // self.num_kv_heads, new.longest, self.cache_dtype)

        def attend(query: Tensor, cache: Tensor) -> Tensor:
            return new.attend(query, cache[0][chosen], cache[1][chosen], mask)

        return self._decode(tokens, new.positions, attend, chosen[new.slots])


class _Pass:
    """States of one forward pass of the policy."""

    __slots__ = ("_gone", "_places", "_seen", "states")

    def __init__(self, seen: Callable[[], Iterable[Seen]], states: Tensor) -> None:
        self.states = states  # [num_rows, hidden]
        self._seen = seen
        self._places: dict[int, Seen] | None = None  # by request id; None: nobody has asked yet
        self._gone: set[int] = set()

    def place(self, request_id: int) -> Seen | None:
        """Return where a sequence's states are."""
        if self._places is None:
            self._places = {one.request_id: one for one in self._seen()}
        return None if request_id in self._gone else self._places.get(request_id)

    def forget(self, request_id: int) -> None:
        """The sequence has ended, and its number may be used again."""
        self._gone.add(request_id)


class _Draws:
    """How the tokens of some sequences are drawn; a row of each tensor is a sequence."""

    def __init__(self, states: Sequence[SequenceState], device: torch.device) -> None:
        """Every sequence has a `drawing`."""
        drawings = [state.drawing for state in states if state.drawing is not None]
        temperature, top_p = np.array([[one.temperature, one.top_p] for one in drawings], dtype=np.float32).T
        top_k = np.array([one.top_k for one in drawings])
        self._mode = Mode.of(temperature, top_k, top_p)
        self._seeds = torch.tensor([one.seed for one in drawings], device=device)
        self._positions = torch.tensor([state.num_written for state in states], device=device)
        self._settings = [torch.from_numpy(one.copy()).to(device) for one in (temperature, top_k, top_p)]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of them."""
        self._seeds, self._positions = self._seeds[rows], self._positions[rows]
        self._settings = [one[rows] for one in self._settings]

    def next(self, logits: Tensor, vocabulary: Tensor, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw the next token of each by the noise that the policy will draw it by; return them and their margins."""
        drawn, _, margins = draw(
            logits, self._seeds, self._positions, *self._settings, mode=self._mode, vocabulary=vocabulary,
            vocab_size=vocab_size,
        )  # fmt: skip
        self._positions = self._positions + 1
        return drawn.cpu().numpy(), margins.cpu().numpy()


@dataclass(slots=True)
class _Cached:
    """What the drafter's cache holds of a sequence: the pairs of positions `begin` to `end` - 1."""

    slot: int
    begin: int
    end: int


class HeadDrafter(Drafter):
    """Drafts by a network that learns from the policy."""

    name = "head"
    num_states = CONTEXT_TOKENS

    def __init__(
        self,
        model: HeadModel,
        policy: Any,
        vocabulary: Callable[[], Tensor],
        *,
        num_slots: int,
        capacity: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """model: taken over at every `policy_changed`, as are the policy's weights, whose first ones `policy` holds.

        vocabulary: the tokens that drafts are made of, int64, in order. capacity: tokens of one sequence.
        """
        self._model, self._vocabulary_now = model, vocabulary
        self._num_slots, self._capacity = num_slots, capacity
        self._device, self._dtype = policy.device, policy.dtype
        self._vocab_size = policy.config.vocab_size
        self._runner: _NativeLayer | _TorchLayer | None = None
        self._seen: deque[_Pass] = deque(maxlen=CONTEXT_TOKENS)
        self._cached: dict[int, _Cached] = {}
        self._holders: list[int | None] = [None] * num_slots  # request id by slot
        self._kept = [_PRIOR_KEPT] * _NUM_CLASSES  # by the margin of a token
        self._tried = [_PRIOR_TRIED] * _NUM_CLASSES
        self._classes: dict[int, list[int]] = {}  # request id -> of its last draft's tokens
        self._clock, self._step_s = clock, 0.0  # what one more token of all drafts takes
        self.take(policy.state_dict())

    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Take the drafter's weights as they are now, and what it shares with the policy: live tensors, not copied."""
        config, own = self._model.config, self._model.state_dict()
        embedding = weights["model.embed_tokens.weight"].detach()
        self._embedding = embedding
        self._vocabulary = self._vocabulary_now().to(self._device)
        head = weights.get("lm_head.weight", embedding).detach().index_select(0, self._vocabulary)
        state = {f"model.{name}": one.detach() for name, one in own.items() if name.startswith("layers.")}
        num_inputs = self._num_slots * (CONTEXT_TOKENS + 1)
        state["model.embed_tokens.weight"] = embedding.new_zeros(num_inputs, config.hidden_size)
        state["lm_head.weight"] = head
        if self._runner is None or self._runner.vocab_size != len(head):
            shape = SimpleNamespace(**{**config.to_dict(), "vocab_size": len(head)})
            layer = SimpleNamespace(
                config=shape, device=self._device, dtype=self._dtype, model=self._model, state_dict=lambda: state
            )
            kind = _NativeLayer if _NativeLayer.supports(layer) else _TorchLayer
            self._runner = kind(layer, self._num_slots, self._capacity)
        else:
            self._runner.load(state)
        self._fc = self._runner.linear(own["fc.weight"].detach().clone())

    def saw(self, seen: Callable[[], Iterable[Seen]], states: Tensor) -> None:
        """See Drafter."""
        self._seen.append(_Pass(seen, states))

    def _find(self, state: SequenceState, position: int) -> tuple[Tensor, Seen] | None:
        """Return the pass that has the state after the token of a position, and where the sequence's states are."""
        for seen in reversed(self._seen):
            place = seen.place(state.request_id)
            if place is not None and place.first <= position < place.first + place.num:
                return seen.states, place
        return None

    @torch.inference_mode()
    def propose(
        self, states: Sequence[SequenceState], depth: int, budget: int, worth: Worth = UNKNOWN
    ) -> list[list[int]]:
        """See Drafter. Where the budget is short, it goes to the likeliest tokens."""
        assert self._runner is not None
        drafts: list[list[int]] = [[] for _ in states]
        chances: list[list[float]] = [[] for _ in states]
        self._arrange(states)
        ready = [index for index, state in enumerate(states) if state.room > 0 and len(state.tokens) >= 2]
        found = self._catch_up(states, ready)
        if found is None:
            return drafts
        places, hidden = found  # of those whose last state is known; [len(places), hidden]
        likely = np.ones(len(places))
        draws = _Draws([states[index] for index in places], self._device)
        logits = self._runner.logits(hidden)
        for step in range(min(depth, budget)):
            tokens, margins = draws.next(logits, self._vocabulary, self._vocab_size)
            kinds = np.searchsorted(_MARGINS, margins)
            for at, (index, kind) in enumerate(zip(places, kinds.tolist(), strict=True)):
                likely[at] *= self._kept[kind] / self._tried[kind]
                drafts[index].append(int(tokens[at]))
                chances[index].append(float(likely[at]))
                self._classes[states[index].request_id].append(kind)
            if step + 1 == min(depth, budget) or sum(map(len, drafts)) >= budget:
                break
            go_on = self._worth_going_on(
                likely, [min(depth, states[index].room) - len(drafts[index]) for index in places], worth
            )
            if not go_on:
                break
            began_s = self._clock()
            if len(go_on) < len(places):
                keep = torch.tensor(go_on, device=hidden.device)
                hidden, tokens, likely = hidden[keep], tokens[go_on], likely[go_on]
                draws.keep(keep)
                places = [places[at] for at in go_on]
            hidden = self._advance(hidden, tokens, [states[index] for index in places], step)
            logits = self._runner.logits(hidden)
            self._step_s += (self._clock() - began_s - self._step_s) / _STEPS_REMEMBERED
        for draft, chance in zip(drafts, chances, strict=True):
            del draft[sum(one >= worth.least_chance for one in chance) :]  # drawn, and not worth verifying
        return within_budget(drafts, [one[: len(draft)] for draft, one in zip(drafts, chances, strict=True)], budget)

    def _worth_going_on(self, likely: np.ndarray, room: Sequence[int], worth: Worth) -> list[int]:
        """Return which sequences one more token shall be drafted for; none where that takes longer than it saves.

        likely: the chance that the draft of each is right so far. room: tokens that it may still get.
        """
        chance = sum(self._kept) / sum(self._tried)  # of one more token
        saved = [float(one) * chance - worth.least_chance for one in likely]  # in tokens
        chosen = [at for at, left in enumerate(room) if left > 0 and saved[at] > 0]
        if worth.token_s and worth.token_s * sum(saved[at] for at in chosen) < self._step_s:
            return []
        return chosen

    def _arrange(self, states: Sequence[SequenceState]) -> None:
        """Let the n-th sequence have the n-th slot; one whose slot is taken begins anew."""
        assert self._runner is not None
        for slot, state in enumerate(states):
            self._classes[state.request_id] = []
            cached = self._cached.get(state.request_id)
            if cached is not None and cached.slot == slot:
                continue
            holder = self._holders[slot]
            if holder is not None:
                del self._cached[holder]
            if cached is not None:
                self._runner.move(cached.slot, slot, cached.end - cached.begin)
                self._holders[cached.slot] = None
                cached.slot = slot
            self._holders[slot] = state.request_id if cached is not None else None

    def _catch_up(self, states: Sequence[SequenceState], ready: Sequence[int]) -> tuple[list[int], Tensor] | None:
        """Run the pairs that are new; return which sequences have a last state, and the drafter's own after it."""
        assert self._runner is not None
        counts = [0] * len(states)
        parts: list[Tensor] = []
        tokens: list[int] = []
        for index in ready:
            state = states[index]
            end = len(state.tokens) - 1  # the pair of a position needs the token after it
            cached = self._cached.get(state.request_id)
            begin = cached.end if cached is not None and cached.end < end else end
            rows: list[Tensor] = []
            position = end - 1
            least = max(begin if begin < end else 0, end - CONTEXT_TOKENS)
            while position >= least and (found := self._find(state, position)) is not None:
                shown, place = found
                first = max(least, place.first)
                row = place.row + first - place.first
                rows.append(shown[row : row + position - first + 1])
                position = first - 1
            if not rows:
                continue
            first = position + 1
            if cached is None or first != cached.end:
                cached = self._cached[state.request_id] = _Cached(index, first, first)
                self._holders[index] = state.request_id
            parts += reversed(rows)
            counts[index] = end - first
            tokens += state.tokens[first + 1 : end + 1]
        places = [index for index in ready if counts[index]]
        if not places:
            return None
        lengths = []
        for index in places:
            cached = self._cached[states[index].request_id]
            lengths.append(cached.end - cached.begin)
            cached.end += counts[index]
        hidden = self._run(torch.cat(parts), tokens, [counts[index] for index in places], lengths, places)
        last = torch.tensor([counts[index] for index in places]).cumsum(0) - 1
        return places, hidden[last.to(hidden.device)]

    def _advance(self, hidden: Tensor, tokens: np.ndarray, members: Sequence[SequenceState], step: int) -> Tensor:
        """Append drafted tokens, on the drafter's own states. hidden: [n, hidden]. returns: likewise."""
        cached = [self._cached[state.request_id] for state in members]
        lengths = [one.end - one.begin + step for one in cached]
        return self._run(hidden, tokens.tolist(), [1] * len(members), lengths, [one.slot for one in cached])

    def _run(
        self, states: Tensor, tokens: Sequence[int], counts: Sequence[int], lengths: Sequence[int], slots: Sequence[int]
    ) -> Tensor:
        """Run pairs of states and the tokens after them. states: [sum(counts), hidden]. returns: likewise."""
        assert self._runner is not None
        dtype = self._runner.states_dtype
        embedded = self._embedding[torch.tensor(tokens, device=self._device)]
        inputs = self._fc(torch.cat([embedded.to(dtype), states.to(dtype)], dim=-1))
        return self._runner.extend_slots(self._runner.place(inputs), counts, lengths, slots)

    def verified(self, state: SequenceState, draft: Sequence[int], num_kept: int) -> None:
        """Count, by class, the tokens that were right, and the first that was not."""
        for index, kind in enumerate(self._classes.get(state.request_id, [])[: min(num_kept + 1, len(draft))]):
            if self._tried[kind] >= _MEMORY_TOKENS:
                self._kept[kind], self._tried[kind] = self._kept[kind] / 2, self._tried[kind] / 2
            self._tried[kind] += 1
            self._kept[kind] += index < num_kept

    def observe(self, state: SequenceState) -> None:
        """Forget a sequence that does not run any more."""
        self._classes.pop(state.request_id, None)
        cached = self._cached.pop(state.request_id, None)
        if cached is not None:
            self._holders[cached.slot] = None
        for seen in self._seen:
            seen.forget(state.request_id)

    def policy_changed(self, version: int, weights: Mapping[str, Any] | None = None) -> None:
        """Take new weights. States of the old policy are forgotten: every sequence is prefilled again."""
        if weights is not None:
            self.take(weights)
        self._seen.clear()
        self._cached.clear()
        self._holders = [None] * self._num_slots
        for kind in range(_NUM_CLASSES):
            self._kept[kind] = (self._kept[kind] + _PRIOR_KEPT) / 2
            self._tried[kind] = (self._tried[kind] + _PRIOR_TRIED) / 2
