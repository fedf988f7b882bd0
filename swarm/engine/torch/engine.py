"""The torch engine: continuous batching over slots of a KV cache, with counter-based sampling.

    step = admit waiting requests (prefill each prompt once, verify drafts) · draw their first token · decode one
           token of all, or verify what drafters propose for them

What it is made of: `runner` runs the model, `sampling` draws tokens, `slots` holds what is running, `admission` says
what comes next, and off the CPU `slot_pass` runs and draws as one piece, which `graphs` records. It exists because no
library gives batched speculation, partial rollouts and live weights at once.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from swarm.config import EngineConfig
from swarm.drafting.base import Seen, SequenceState
from swarm.drafting.speculator import Speculator, make_speculator
from swarm.engine.base import (
    Engine,
    EngineStats,
    Request,
    check_request,
    check_weights,
    sequence_limit,
    weight_shapes,
)
from swarm.engine.torch.admission import Admitted, admit
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.graphs import CudaRecorder, GraphPool
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeRunner
from swarm.engine.torch.runner import ModelRunner
from swarm.engine.torch.sampling import Mode, sample
from swarm.engine.torch.slot_pass import SlotPass
from swarm.engine.torch.slots import Running, Slots
from swarm.types import Completion, FinishReason

__all__ = ["TorchEngine"]

_CPU_STEP_COST_TOKENS = 10.0  # measured: 7 to 11 for `tiny`, 15 to 17 for `smollm2-135m`, on two cores
_CPU_PREFILL_COST_TOKENS = 1.2  # likewise: 0.7 to 1.3, and 1.5
_DRAWN_ROWS = 512  # rows of logits that exist at one time while drafts are verified


_Finished: TypeAlias = Sequence[tuple[Running, FinishReason]]  # who, and why; they have their slots still


class TorchEngine(Engine):
    """Samples from a transformers causal LM. Keeps its own copy of the weights of `model`."""

    verifies_drafts = True
    speculates = True

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Collection[int],
        config: EngineConfig,
        max_seq_len: int = 0,
        runner: type[ModelRunner] | None = None,
        record_graphs: bool = True,
        speculator: Speculator | None = None,
    ) -> None:
        """max_seq_len: prompt and completion, in tokens; 0 takes the config's, or the model's limit.

        runner: what runs the model; None takes the first that supports it.
        record_graphs: whether to record passes as graphs on a device that has them.
        speculator: what drafts; None: what the config names.
        """
        kinds = (NativeRunner, LlamaRunner, GenericRunner) if runner is None else (runner,)
        kind = next((kind for kind in kinds if kind.supports(model)), None)
        if kind is None:
            raise ValueError(f"the chosen runner cannot run {type(model).__name__}")
        self.max_seq_len = sequence_limit(model, max_seq_len or config.max_seq_len)
        self.num_slots = config.max_slots
        with torch.inference_mode():
            self._runner: ModelRunner = kind(model, config.max_slots, self.max_seq_len)
            self._slots = Slots(config.max_slots, self.max_seq_len, sorted(eos_token_ids))
            self._slot_pass: SlotPass | None = None
            device = self._runner.device
            if device.type != "cpu":
                graphs = GraphPool(CudaRecorder(device) if record_graphs and device.type == "cuda" else None)
                self._slot_pass = SlotPass(self._runner, config.max_slots, self.max_seq_len, graphs)
            else:
                self.step_cost_tokens, self.prefill_cost_tokens = _CPU_STEP_COST_TOKENS, _CPU_PREFILL_COST_TOKENS
        self.speculator = speculator or make_speculator(config.speculation)
        self._waiting: deque[Running] = deque()
        self._shapes = weight_shapes(model.state_dict())
        self._version = 0
        self.stats = EngineStats()

    @property
    def policy_version(self) -> int:
        """See Engine."""
        return self._version

    @property
    def num_unfinished(self) -> int:
        """See Engine."""
        return len(self._waiting) + len(self._slots)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; see Engine."""
        held = {running.request.request_id for running in self._waiting} | self._slots.request_ids
        fresh = []
        for request in requests:
            if request.request_id in held:
                raise ValueError(f"request {request.request_id} is already in the engine")
            held.add(request.request_id)
            check_request(request, self.max_seq_len, self._runner.vocab_size)  # the runners check nothing
            fresh.append(Running.of(self._slots.until_end(request) if request.draft else request))
        self._waiting.extend(fresh)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Admit, then decode every running request: one token, or more where drafts are kept; see Engine.

        Where the runner can, what is admitted is prefilled in the pass that decodes the others.
        """
        done: list[Completion] = []
        n, before, speculator = len(self._slots), self.stats.num_tokens_generated, self.speculator
        if self._waiting and self._slots.num_free:
            admitted = admit(self._waiting, self._slots, version=self._version, max_rows=self._runner.max_prefill_rows)
            self.stats.num_tokens_prefilled += admitted.num_tokens
            if n and speculator is None and self._runner.decodes_while_prefilling:
                finished = self._decode_and_prefill(n, admitted)
                self._count_step(n)
                return self._finish(finished)
            done = self._finish(self._prefill(admitted))
            n, before = len(self._slots), self.stats.num_tokens_generated
        if n:
            states = self._states() if speculator is not None and speculator.begin(n) else []
            drafts = speculator.propose(states, self._runner.vocab_size) if speculator is not None and states else []
            finished = self._decode_drafts(states, drafts) if any(drafts) else self._decode()
            if speculator is not None:
                speculator.end(n, self.stats.num_tokens_generated - before)
            self._count_step(n)
            done += self._finish(finished)
        return done

    def _count_step(self, num_decoded: int) -> None:
        """Count a step that decoded so many slots."""
        self.stats.num_steps += 1
        self.stats.num_slot_steps += num_decoded

    def _decode(self) -> _Finished:
        """Decode one token of every slot; return those that have finished."""
        slots, n = self._slots, len(self._slots)
        cached = slots.cached[:n].tolist()
        if self._slot_pass is not None:
            drawn = self._slot_pass(slots, keep_states=self._shows_states)
            self._show(cached, [1] * n, drawn.states)
            tokens, logprobs = drawn.tokens, drawn.logprobs
        else:
            hidden = self._runner.decode(torch.from_numpy(slots.last_tokens[:n]), cached)
            self._show(cached, [1] * n, hidden)
            tokens, logprobs = self._draw(self._runner.logits(hidden), slice(0, n))
        slots.cached[:n] += 1
        return self._append(slice(0, n), tokens, logprobs)

    def _states(self) -> list[SequenceState]:
        """Return what drafters are to know of each slot."""
        slots, states = self._slots, []
        assert self.speculator is not None
        for running in slots:
            request = running.request
            state = self.speculator.state_of(
                request.request_id, request.prompt_ids, partial(slots.drawing, running.slot)
            )
            state.append(slots.written(running.slot, state.num_written))
            state.room = slots.room(running.slot)
            states.append(state)
        return states

    @property
    def _shows_states(self) -> bool:
        """Whether a drafter wants to see states."""
        return self.speculator is not None and self.speculator.num_states > 0

    def _show(self, firsts: Sequence[int], counts: Sequence[int], hidden: torch.Tensor | None) -> None:
        """Hand states to drafters that want them: `counts` of each slot, one after another, from `firsts` on."""
        if self.speculator is not None and self.speculator.num_states:
            ids = [running.request.request_id for running in self._slots]

            def seen() -> list[Seen]:
                rows = (np.cumsum(counts) - counts).tolist()
                return [Seen(*one) for one in zip(ids, firsts, rows, counts, strict=True)]

            self.speculator.saw(seen, hidden)

    def _decode_drafts(self, states: Sequence[SequenceState], drafts: Sequence[Sequence[int]]) -> _Finished:
        """Verify a draft, maybe empty, for every slot in one forward pass; return those that have finished."""
        slots, members = self._slots, list(self._slots)
        num_drawn = [len(draft) + 1 for draft in drafts]
        cached = slots.cached[: len(members)].tolist()
        if self._slot_pass is not None and self._slot_pass.fits(drafts):
            drawn = self._slot_pass(slots, drafts, keep_states=self._shows_states)
            self._show(cached, num_drawn, drawn.states)
            tokens, logprobs = drawn.tokens, drawn.logprobs
        else:
            flat: list[int] = []
            for draft, last in zip(drafts, slots.last_tokens[: len(members)].tolist(), strict=True):
                flat += [last, *draft]
            hidden = self._runner.extend(torch.tensor(flat, device=self._runner.device), num_drawn, cached)
            self._show(cached, num_drawn, hidden)
            starts = (np.cumsum(num_drawn) - num_drawn).tolist()
            tokens, logprobs = self._draw_along(hidden, [running.slot for running in members], starts, num_drawn)
        finished: list[tuple[Running, FinishReason]] = []
        outcome = self._keep(members, drafts, tokens, logprobs)
        for running, state, draft, (gained, kept, reason) in zip(members, states, drafts, outcome, strict=True):
            self.stats.num_speculated_tokens += len(draft)
            self.stats.num_speculated_tokens_kept += kept
            self.stats.num_tokens_generated += gained
            if self.speculator is not None:
                self.speculator.verified(state, draft, kept)
            if reason is not None:
                finished.append((running, reason))
        return finished

    def _decode_and_prefill(self, n: int, admitted: Admitted) -> _Finished:
        """Decode one token of the slots 0 to n - 1, and begin what was admitted; return those that have finished."""
        slots = self._slots
        tokens, cached = torch.from_numpy(slots.last_tokens[:n]), slots.cached[:n].tolist()
        slots.cached[:n] += 1
        hidden = self._runner.decode_and_prefill(
            tokens, cached, admitted.sequences, admitted.first_slots, admitted.num_drawn
        )
        return self._begin(admitted, hidden, n)

    def _prefill(self, admitted: Admitted) -> _Finished:
        """Begin what was admitted; drafters that want more states of a prompt are shown them."""
        sequences, num_drawn, speculator = admitted.sequences, admitted.num_drawn, self.speculator
        if speculator is None or not speculator.num_states:
            return self._begin(admitted, self._runner.prefill(sequences, admitted.first_slots, num_drawn))
        nums = [max(num, min(speculator.num_states, len(one))) for num, one in zip(num_drawn, sequences, strict=True)]
        hidden = self._runner.prefill(sequences, admitted.first_slots, nums)
        ends = np.cumsum(nums).tolist()
        seen = [
            Seen(running.request.request_id, len(sequence) - num, end - num, num)
            for sequence, group, num, end in zip(sequences, admitted.groups, nums, ends, strict=True)
            for running in group
        ]
        speculator.saw(lambda: seen, hidden)
        drawn = np.concatenate([np.arange(end - num, end) for num, end in zip(num_drawn, ends, strict=True)])
        return self._begin(admitted, hidden[torch.from_numpy(drawn).to(hidden.device)])

    def _begin(self, admitted: Admitted, hidden: torch.Tensor, n: int = 0) -> _Finished:
        """Draw the first token of what was admitted, or verify its drafts; and one of each of the slots 0 to n - 1.

        hidden: [n + sum(num_drawn), hidden]. Returns those that have finished.
        """
        for sequence, group in zip(admitted.sequences, admitted.groups, strict=True):
            if len(group) > 1:
                self._runner.copy_prefix(group[0].slot, [running.slot for running in group[1:]], len(sequence))
        if max(admitted.num_drawn) > 1:
            decoded = self._append(slice(0, n), *self._draw(self._runner.logits(hidden[:n]), slice(0, n))) if n else []
            return [*decoded, *self._take_drafts(hidden[n:], admitted)]
        where = np.array([*range(n), *(running.slot for group in admitted.groups for running in group)])
        rows = [*range(n), *(row for row, group in enumerate(admitted.groups, n) for _ in group)]
        logits = self._runner.logits(hidden)[torch.tensor(rows, device=hidden.device)]
        return self._append(where, *self._draw(logits, where))

    def _take_drafts(self, hidden: torch.Tensor, admitted: Admitted) -> _Finished:
        """Verify the drafts of slots that were just filled; return those that have finished.

        hidden: [sum(num_drawn), hidden], what each group of requests with one sequence draws from.
        """
        starts = (np.cumsum(admitted.num_drawn) - admitted.num_drawn).tolist()
        places = [(running, start) for group, start in zip(admitted.groups, starts, strict=True) for running in group]
        members, drafts = [running for running, _ in places], [running.request.draft for running, _ in places]
        nums = [len(draft) + 1 for draft in drafts]
        drawn = self._draw_along(hidden, [running.slot for running in members], [start for _, start in places], nums)
        finished: list[tuple[Running, FinishReason]] = []
        outcome = self._keep(members, drafts, *drawn)
        for running, draft, (gained, kept, reason) in zip(members, drafts, outcome, strict=True):
            self.stats.num_draft_tokens += len(draft)
            self.stats.num_draft_tokens_kept += kept
            self.stats.num_tokens_generated += gained - kept
            if self.speculator is not None and kept < len(draft):  # what an older policy went on with is worth knowing
                partial = running.request.partial
                self.speculator.learn(running.request.prompt_ids, (partial.token_ids if partial else ()) + draft)
            if reason is not None:
                finished.append((running, reason))
        return finished

    def _draw_along(
        self, hidden: torch.Tensor, slots: Sequence[int], starts: Sequence[int], nums: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw every token along drafts. hidden: [num_rows, hidden].

        slots, starts, nums: where each draft is verified, its first row of `hidden`, and its rows. Returns the tokens
        and their log-probabilities, draft after draft.
        """
        sources = np.concatenate([np.arange(at, at + num) for at, num in zip(starts, nums, strict=True)])
        ahead = np.concatenate([np.arange(num) for num in nums])
        where = np.repeat(slots, nums)
        parts = []
        for first in range(0, len(sources), _DRAWN_ROWS):
            rows = slice(first, first + _DRAWN_ROWS)
            source = torch.from_numpy(sources[rows]).to(hidden.device)
            parts.append(self._draw(self._runner.logits(hidden[source]), where[rows], ahead[rows]))
        tokens, logprobs = (np.concatenate(part) for part in zip(*parts, strict=True))
        return tokens, logprobs

    def _keep(
        self, members: Sequence[Running], drafts: Sequence[Sequence[int]], tokens: np.ndarray, logprobs: np.ndarray
    ) -> list[tuple[int, int, FinishReason | None]]:
        """Keep of drafts what is equal to the drawn tokens, and the first own token.

        tokens, logprobs: drawn along the drafts, one after another. Returns for each of them how many tokens it gained,
        how many of these are the draft's, and why it has finished, if it has.
        """
        outcome: list[tuple[int, int, FinishReason | None]] = []
        end = 0
        for running, draft in zip(members, drafts, strict=True):
            begin, end = end, end + len(draft) + 1
            before = int(self._slots.generated[running.slot])
            kept, reason = self._slots.verify(running, draft, tokens[begin:end], logprobs[begin:end])
            outcome.append((int(self._slots.generated[running.slot]) - before, kept, reason))
        return outcome

    def _draw(
        self, logits: torch.Tensor, rows: slice | np.ndarray, ahead: np.ndarray | int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the next token of some slots, and its log-probability. logits: [len(rows), vocab].

        ahead: tokens between what a slot has and the drawn one, [len(rows)].
        """
        slots = self._slots
        settings = slots.temperature[rows], slots.top_k[rows], slots.top_p[rows]
        columns = slots.seeds[rows], slots.generated[rows] + ahead, *settings
        tensors = (torch.from_numpy(column).to(logits.device) for column in columns)
        tokens, logprobs = sample(logits, *tensors, mode=Mode.of(*settings))
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _append(self, rows: slice | np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> _Finished:
        """Write the next token of some slots and return those that have finished."""
        self.stats.num_tokens_generated += len(tokens)
        return self._slots.append(rows, tokens, logprobs)

    def _finish(self, finished: _Finished) -> list[Completion]:
        """Free slots, keeping the occupied ones dense, and return what they hold."""
        slots = self._slots
        completions = [slots.completion(running, reason) for running, reason in finished]
        if self.speculator is not None:
            for (running, _), completion in zip(finished, completions, strict=True):
                self.speculator.observe(completion.request_id, running.request.prompt_ids, completion.token_ids)
        # from the last slot on: what fills a gap is then never about to leave itself
        for running in sorted((running for running, _ in finished), key=lambda running: -running.slot):
            last = len(slots) - 1
            if running.slot != last:
                self._runner.move(last, running.slot, int(slots.cached[last]))
            slots.remove(running)
        return completions

    @torch.inference_mode()
    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        """Stop requests and return what they have; see Engine."""
        wanted = None if request_ids is None else set(request_ids)
        stopped = []
        for running in list(self._waiting):
            if wanted is None or running.request.request_id in wanted:
                self._waiting.remove(running)
                stopped.append(running.unstarted())
                if self.speculator is not None:
                    self.speculator.drop(running.request.request_id)
        running_too = [one for one in self._slots if wanted is None or one.request.request_id in wanted]
        return stopped + self._finish([(running, "aborted") for running in running_too])

    @torch.inference_mode()
    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take new weights; see Engine. Running requests are prefilled again under them.

        Raises ValueError where a weight is missing or has another shape; the old weights then stay.
        """
        check_weights(state, self._shapes)
        interrupted = []
        for running in list(self._slots):
            interrupted.append(running.resumed(self._slots.completion(running, "aborted")))
            self._slots.remove(running)
        self._waiting.extendleft(reversed(interrupted))
        self._runner.load(state)
        self._version = version
        if self.speculator is not None:
            self.speculator.policy_changed(version, state)
        self.stats.num_policy_loads += 1

    def close(self) -> None:
        """Drop the requests, the weights and the cache; the engine cannot be used afterwards."""
        self._waiting.clear()
        self.__dict__.pop("_slot_pass", None)
        self.__dict__.pop("_runner", None)
        self.__dict__.pop("_slots", None)
