"""The vLLM engine: what the contract asks, over a vLLM that runs in a process of its own.

    step = hand over waiting requests · let vLLM prefill them and draw their first token · let it decode one token
           of all, or verify what drafters propose for them · collect

This side keeps what every request has written, so that vLLM's requests may be forgotten at any time: an aborted
request, and one in flight when a policy comes, go on as a prompt that ends with what was written. Since noise belongs
to (seed, position), they come out as if they had never stopped.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from swarm.config import EngineConfig
from swarm.drafting.base import Drawing, Seen, SequenceState
from swarm.drafting.speculator import MAX_DEPTH, Speculator, make_speculator
from swarm.engine.base import (
    Engine,
    EngineStats,
    Request,
    check_request,
    check_weights,
    joined_segments,
    sequence_limit,
    weight_shapes,
)
from swarm.engine.vllm.host import VllmHost
from swarm.engine.vllm.memory import kv_cache_bytes
from swarm.lora import AdaptedState
from swarm.types import Completion, FinishReason, Segment

__all__ = ["VllmEngine"]

_CPU_STEP_COST_TOKENS = 20.0  # smollm2-135m, two cores: 30, 41, 78 and 120 ms a step at 1, 8, 32 and 64 sequences


@dataclass(slots=True)
class _Writing:
    """A request and what it has."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    segments: tuple[Segment, ...] = ()
    start: int = 0  # tokens it had when it was handed to vLLM
    version: int = 0  # policy that writes it now
    is_prefilled: bool = False

    @classmethod
    def of(cls, request: Request) -> "_Writing":
        """Wrap a request that waits."""
        partial = request.partial
        if partial is None:
            return cls(request)
        num = len(partial.token_ids)
        return cls(request, list(partial.token_ids), list(partial.logprobs), partial.segments, start=num)

    def hand_over(self, version: int, eos_token_ids: Sequence[int]) -> list[Any]:
        """Return it as the engine process takes it; see `child`."""
        self.start, self.version, self.is_prefilled = len(self.token_ids), version, False
        request, sampling = self.request, self.request.sampling
        return [
            request.request_id,
            [*request.prompt_ids, *self.token_ids],
            sampling.max_new_tokens - self.start,
            [] if sampling.ignore_eos else eos_token_ids,
            {"start": self.start, **asdict(self.drawing())},
        ]

    def drawing(self) -> Drawing:
        """Return how its tokens are drawn."""
        seed, sampling = self.request.seed, self.request.sampling
        signed = seed - (1 << 64) if seed >> 63 else seed
        return Drawing(signed, sampling.temperature, sampling.top_k, sampling.top_p)

    def settle(self) -> None:
        """Put down what the present policy has written."""
        num = len(self.token_ids)
        if num > self.start:
            self.segments = joined_segments(self.segments, Segment(self.version, self.start, num))
        self.start = num

    def completion(self, reason: FinishReason) -> Completion:
        """Return what it has."""
        self.settle()
        number, tokens, logprobs = self.request.request_id, tuple(self.token_ids), tuple(self.logprobs)
        return Completion(number, tokens, logprobs, self.segments, reason)


class VllmEngine(Engine):
    """Samples from a model that vLLM knows, with a copy of the weights of `model`."""

    speculates = True

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Collection[int],
        config: EngineConfig,
        max_seq_len: int = 0,
        host: VllmHost | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        """max_seq_len: prompt and completion, in tokens; 0 takes the config's, or the model's limit.

        host: an engine process that has the weights of `model` already; None: one of its own.
        speculator: what drafts; None: what the config names.
        """
        self.max_seq_len = sequence_limit(model, max_seq_len or config.max_seq_len)
        if model.device.type == "cpu":
            self.step_cost_tokens = _CPU_STEP_COST_TOKENS
        self.num_slots = config.max_slots
        self._vocab_size = model.config.get_text_config().vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._max_slots = config.max_slots
        self._shapes = weight_shapes(model.state_dict())
        self._host = host or VllmHost(
            model,
            max_slots=config.max_slots,
            max_seq_len=self.max_seq_len,
            kv_cache_bytes=kv_cache_bytes(model, config, self.max_seq_len),
            num_draft_tokens=0 if config.speculation == "off" else MAX_DEPTH,
            num_gpus=config.tensor_parallel_size,
        )
        self.speculator = speculator or make_speculator(config.speculation)
        self._device, self._dtype = model.device, model.dtype
        self._waiting: deque[_Writing] = deque()
        self._running: dict[int, _Writing] = {}
        self._version = 0
        self._gives_back = model.device.type == "cuda"  # on a CPU the cache is of a fixed size from the start
        self._is_asleep = False
        self.stats = EngineStats()

    @property
    def policy_version(self) -> int:
        """See Engine."""
        return self._version

    @property
    def num_unfinished(self) -> int:
        """See Engine."""
        return len(self._waiting) + len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; see Engine."""
        held = {writing.request.request_id for writing in self._waiting} | self._running.keys()
        for request in requests:
            if request.request_id in held:
                raise ValueError(f"request {request.request_id} is already in the engine")
            held.add(request.request_id)
            check_request(request, self.max_seq_len, self._vocab_size)
            if request.draft:
                raise ValueError(f"request {request.request_id} has a draft, which the vLLM engine does not verify")
        self._waiting.extend(_Writing.of(request) for request in requests)

    def step(self) -> list[Completion]:
        """Hand over what waits, decode, and return what has finished; see Engine."""
        if self._is_asleep:
            raise RuntimeError("a step before the policy was loaded that the engine gave up its memory for")
        fresh = []
        while self._waiting and len(self._running) < self._max_slots:
            writing = self._waiting.popleft()
            fresh.append(writing.hand_over(self._version, self._eos_token_ids))
            self._running[writing.request.request_id] = writing
        done = self._take(self._host.admit(fresh, self._wants_states)) if fresh else []
        if self._running:
            done += self._decode()
            self.stats.num_steps += 1
        return done

    @property
    def _wants_states(self) -> bool:
        return self.speculator is not None and self.speculator.num_states > 0

    def _decode(self) -> list[Completion]:
        """Let vLLM decode one token of all, or verify drafts; return what has finished."""
        speculator = self.speculator
        running = [writing for writing in self._running.values() if writing.is_prefilled]
        if speculator is None or not running:
            return self._take(self._host.decode())
        before, states, drafts = self.stats.num_tokens_generated, [], []
        if speculator.begin(len(running)):
            states = [self._state_of(speculator, writing) for writing in running]
            drafts = speculator.propose(states, self._vocab_size)
        drafted = {state.request_id: (state, draft) for state, draft in zip(states, drafts, strict=True) if draft}
        given = [[number, draft] for number, (_, draft) in drafted.items()]
        done = self._take(self._host.decode(given, self._wants_states), drafted)
        speculator.end(len(running), self.stats.num_tokens_generated - before)
        return done

    def _state_of(self, speculator: Speculator, writing: _Writing) -> SequenceState:
        """Return what drafters are to know of a request."""
        request, num = writing.request, len(writing.token_ids)
        state = speculator.state_of(request.request_id, request.prompt_ids, writing.drawing)
        state.append(writing.token_ids[state.num_written :])
        state.room = min(MAX_DEPTH, request.sampling.max_new_tokens - num - 1)
        return state

    def _take(
        self,
        told: Sequence[Any],
        drafted: Mapping[int, tuple[SequenceState, list[int]]] = MappingProxyType({}),
    ) -> list[Completion]:
        """Take what vLLM wrote, and what it was drawn from (`child`); return what has finished.

        drafted: by request id.
        """
        written, states = told
        self._show(states)
        done = []
        for number, tokens, logprobs, reason, num_prefilled in written:
            writing = self._running[number]
            writing.token_ids += tokens
            writing.logprobs += logprobs
            num_slot_steps = len(tokens) - (not writing.is_prefilled)  # prefill draws the first
            if number in drafted:
                num_slot_steps = 1
                self._judge(*drafted[number], tokens)
            self.stats.num_tokens_generated += len(tokens)
            self.stats.num_slot_steps += num_slot_steps
            self.stats.num_tokens_prefilled += 0 if writing.is_prefilled else num_prefilled
            writing.is_prefilled = True
            if reason is not None:
                done.append(self._finish(number, reason))
        return done

    def _show(self, passes: Sequence[Mapping[str, Any]]) -> None:
        """Hand the states of vLLM's passes to drafters that want them."""
        for one in passes:
            dtype = getattr(torch, one["dtype"])
            states = torch.frombuffer(bytearray(one["raw"]), dtype=dtype).view(-1, one["size"])
            seen = [Seen(*fields) for fields in one["seen"]]
            assert self.speculator is not None
            self.speculator.saw(partial(list, seen), states.to(self._device, self._dtype))

    def _judge(self, state: SequenceState, draft: Sequence[int], tokens: Sequence[int]) -> None:
        """Tell drafters how much of a draft is among the tokens that were drawn."""
        pairs = enumerate(zip(draft, tokens, strict=False))
        num_kept = next((place for place, (one, drawn) in pairs if one != drawn), min(len(draft), len(tokens)))
        self.stats.num_speculated_tokens += len(draft)
        self.stats.num_speculated_tokens_kept += num_kept
        assert self.speculator is not None
        self.speculator.verified(state, draft, num_kept)

    def _finish(self, number: int, reason: FinishReason) -> Completion:
        """Return what a running request holds, and let it go."""
        writing = self._running.pop(number)
        completion = writing.completion(reason)
        if self.speculator is not None:
            self.speculator.observe(number, writing.request.prompt_ids, completion.token_ids)
        return completion

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        """Stop requests and return what they have; see Engine."""
        wanted = None if request_ids is None else set(request_ids)
        waiting = [one for one in self._waiting if wanted is None or one.request.request_id in wanted]
        for writing in waiting:
            self._waiting.remove(writing)
            if self.speculator is not None:
                self.speculator.drop(writing.request.request_id)
        running = [number for number in self._running if wanted is None or number in wanted]
        if running:
            self._host.drop(running)
        return [writing.completion("aborted") for writing in waiting] + [
            self._finish(number, "aborted") for number in running
        ]

    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Take new weights; see Engine. Running requests are prefilled again under them."""
        check_weights(state.base if isinstance(state, AdaptedState) else state, self._shapes)
        self._take_back()
        self._host.load(state)
        self._is_asleep = False
        self._version = version
        if self.speculator is not None:
            self.speculator.policy_changed(version, state)
        self.stats.num_policy_loads += 1

    def release_memory(self) -> None:
        """Leave the memory of a GPU to the trainer; see Engine."""
        if self._gives_back and not self._is_asleep:
            self._take_back()
            self._host.sleep()
            self._is_asleep = True

    def _take_back(self) -> None:
        """Let the requests that vLLM holds wait again, in their order: it is about to forget them."""
        for writing in self._running.values():
            writing.settle()
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()

    def close(self) -> None:
        """Drop the requests and end the engine process; the engine cannot be used afterwards."""
        self._waiting.clear()
        self._running.clear()
        self._host.close()
