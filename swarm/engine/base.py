"""The contract of a rollout engine: token ids in, token ids out.

An engine samples completions for requests in continuous batches. It holds its own copy of the policy's
weights, replaced by `load_policy` between two decode steps. Everything that an engine does is a function
of its requests: the noise that draws a token depends on (request seed, position) and on nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from swarm.types import Completion, Segment

if TYPE_CHECKING:
    import torch

    from swarm.drafting.speculator import Speculator

__all__ = [
    "Engine",
    "EngineStats",
    "Request",
    "SamplingParams",
    "check_request",
    "check_weights",
    "joined_segments",
    "sequence_limit",
    "weight_shapes",
]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn."""

    max_new_tokens: int  # budget of the whole completion, a resumed prefix included
    temperature: float = 1.0  # 0 is greedy; log-probabilities are then those at temperature 1
    top_p: float = 1.0  # nucleus: the smallest set of tokens with at least this mass
    top_k: int = 0  # 0: no limit
    ignore_eos: bool = False  # run to the budget, for benchmarks with enforced lengths

    def __post_init__(self) -> None:
        """Refuse values that have no meaning."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write. Requests with equal `prompt_ids` share one prefill where they start together."""

    request_id: int  # unique among the requests that an engine holds
    prompt_ids: tuple[int, ...]
    seed: int  # unsigned 64-bit; with the position it determines the noise of every token
    sampling: SamplingParams
    partial: Completion | None = None  # resume: tokens already written, kept and continued
    draft: tuple[int, ...] = ()  # tokens that may come next, from anywhere; kept as far as the policy draws the same


@dataclass(slots=True)
class EngineStats:
    """Counters since the engine was made."""

    num_tokens_generated: int = 0
    num_tokens_prefilled: int = 0
    num_steps: int = 0
    num_policy_loads: int = 0
    num_slot_steps: int = 0  # decode slots that were busy, summed over steps
    num_draft_tokens: int = 0  # tokens of requests' drafts that were verified
    num_draft_tokens_kept: int = 0  # those that the policy draws as well
    num_speculated_tokens: int = 0  # tokens that the engine's own drafters proposed
    num_speculated_tokens_kept: int = 0  # likewise


class Engine(ABC):
    """Samples completions. Not thread-safe: one thread calls it at a time.

    An engine that `verifies_drafts` writes for a request with a draft exactly what it writes for the request without
    it: draft tokens are kept up to the first that the policy, with the request's noise, does not draw itself.
    """

    verifies_drafts: ClassVar[bool] = False
    speculates: ClassVar[bool] = False  # whether it asks a `speculator` for drafts, where it has one
    speculator: "Speculator | None" = None
    step_cost_tokens: float = 300.0  # decoding so many tokens takes about as long as a step does beside its tokens
    prefill_cost_tokens: float = 0.5  # prefilling a token, and drawing at its position, against decoding one
    num_slots: int = 64  # requests that are written at one time
    max_seq_len: int = 2**31  # longest prompt and budget of one request, in tokens
    stats: EngineStats

    @property
    @abstractmethod
    def policy_version(self) -> int:
        """The version of the weights that the next step uses."""

    @property
    @abstractmethod
    def num_unfinished(self) -> int:
        """Requests that wait or run."""

    @abstractmethod
    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests.

        Raises ValueError, and queues nothing, for a request id that is in use, an empty prompt, a token outside
        the vocabulary, a seed of more than 64 bits, a partial completion that has already finished, a prompt and
        budget that do not fit the engine's sequence length, or a draft that is longer than the budget or that the
        engine cannot verify.
        """

    @abstractmethod
    def step(self) -> list[Completion]:
        """Decode one step of every running request; return the completions that finished in it."""

    @abstractmethod
    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        """Stop requests (all of them by default) and return what they have, to be resumed or thrown away.

        A draft that has not been verified yet is no part of that: who gave it still has it.
        """

    @abstractmethod
    def load_policy(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Take new weights, in the names of the model's `state_dict`, between two steps.

        Requests in flight go on under the new weights; no attention state of the old weights is used.
        Raises ValueError, and keeps the old weights, where one is missing or has another shape.
        """

    def release_memory(self) -> None:  # noqa: B027 (nothing to do is what most engines do)
        """Give back what can be done without until the next `load_policy`, which must come before the next step.

        Requests in flight go on after it.
        """

    @abstractmethod
    def close(self) -> None:
        """Free memory and end every process the engine started."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Submit and run to the end. Returns completions in the order of the requests."""
        self.submit(requests)
        done: dict[int, Completion] = {}
        while self.num_unfinished:
            done.update((completion.request_id, completion) for completion in self.step())
        return [done[request.request_id] for request in requests]


def check_request(request: Request, max_seq_len: int, vocab_size: int) -> None:
    """Raise ValueError for a request that no engine of this length and vocabulary can run; see `Engine.submit`."""
    name, partial = f"request {request.request_id}", request.partial
    if not request.prompt_ids:
        raise ValueError(f"{name} has an empty prompt")
    if request.seed >> 64:
        raise ValueError(f"{name} has seed {request.seed}, which is not an unsigned 64-bit number")
    need = len(request.prompt_ids) + request.sampling.max_new_tokens
    if need > max_seq_len:
        raise ValueError(f"{name} needs {need} tokens, engine.max_seq_len is {max_seq_len}")
    token_ids = request.prompt_ids + (partial.token_ids if partial else ()) + request.draft
    if len(token_ids) > need:
        raise ValueError(f"{name} has a draft of more tokens than its budget leaves")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise ValueError(f"{name} holds a token outside the vocabulary of {vocab_size}")
    if partial is None:
        return
    if partial.finish_reason != "aborted" or len(partial.token_ids) >= request.sampling.max_new_tokens:
        raise ValueError(f"{name} resumes a completion that has already finished")
    if len(partial.logprobs) != len(partial.token_ids):
        raise ValueError(
            f"{name} resumes {len(partial.token_ids)} tokens with {len(partial.logprobs)} log-probabilities"
        )


def sequence_limit(model: Any, wanted: int) -> int:
    """Return how long prompt and completion may be, in tokens: what is wanted, or where that is 0 the model's limit.

    Raises ValueError where neither says.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        if not wanted:
            raise ValueError(f"{type(model).__name__} names no limit of its own: max_seq_len must be given")
        return wanted
    return min(wanted or limit, limit)


def weight_shapes(state: "Mapping[str, torch.Tensor]") -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by its name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_weights(state: "Mapping[str, torch.Tensor]", shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a weight is missing or has another shape; see `Engine.load_policy`."""
    given = weight_shapes(state)
    for name, shape in shapes.items():
        if given.get(name) != shape:
            raise ValueError(f"the policy's {name} should have shape {shape}, not {given.get(name)}")


def joined_segments(segments: tuple[Segment, ...], new: Segment) -> tuple[Segment, ...]:
    """Append a segment, merging it with the last one where the same policy wrote both."""
    if segments and segments[-1].policy_version == new.policy_version:
        return (*segments[:-1], Segment(new.policy_version, segments[-1].start, new.end))
    return (*segments, new)
