"""What vLLM draws tokens with: noise that belongs to request and position, and drafts that it verifies by.

A *logits processor* is told which request stands in which row, with the parameters and the tokens that it has;
`CounterNoise` keeps from that what `swarm.engine.torch.sampling` wants to know. `CounterSampler` draws by it, so that a
completion is the same tokens as from the torch engine, whatever shares the batch. `CounterVerifier` takes the place of
vLLM's rejection sampler: that one is exact in distribution, but with chances of its own, so that a completion would be
another one with drafts than without, and after an interruption. Here a drafted token is kept where it is the token that
is drawn; see `verify`.

vLLM makes room for drafts, and takes them, when a *custom class* is its drafter: `NodeDrafts`. Its `propose` is called
before a step is over, in each of the processes that share a policy, and is shown no states. Drafters are the node's
instead, who knows what was written as soon as the step is over; `child` hands their drafts to vLLM's scheduler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality
from vllm.v1.sample.sampler import Sampler

from swarm.engine.torch.sampling import Mode, sample
from swarm.engine.vllm.verify import kept_along, spread

__all__ = ["CounterNoise", "CounterSampler", "CounterVerifier", "NodeDrafts"]


@dataclass(slots=True)
class _Row:
    """What draws the tokens of one row of the batch."""

    seed: int  # by its bits, as int64
    start: int  # tokens of the completion that were given as prompt
    written: list[int]  # vLLM's own list of what it has written since
    temperature: float
    top_k: int
    top_p: float


class CounterNoise(LogitsProcessor):  # type: ignore[misc]  # vLLM has no types
    """Knows which request each row of the batch belongs to. Leaves the logits as they are."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes nothing."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change nothing."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Follow what came, went and moved, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._rows[index] = _Row(written=written, **params.extra_args["swarm"])
        for first, second, direction in batch_update.moved:
            moved, other = self._rows.pop(first, None), self._rows.pop(second, None)
            if moved is not None:
                self._rows[second] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[first] = other

    def draw(self, logits: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens that come next, and their log-probabilities.

        logits: [sum(counts), vocab], of each row after its last token and after every further one of a draft.
        """
        rows = [self._rows[index] for index in range(len(counts))]
        ahead = np.arange(len(logits)) - np.repeat(np.cumsum(counts) - counts, counts)
        seeds = np.repeat(np.array([row.seed for row in rows], dtype=np.int64), counts)
        positions = np.repeat(np.array([row.start + len(row.written) for row in rows], dtype=np.int64), counts) + ahead
        temperature = np.repeat(np.array([row.temperature for row in rows], dtype=np.float32), counts)
        top_k = np.repeat(np.array([row.top_k for row in rows], dtype=np.int64), counts)
        top_p = np.repeat(np.array([row.top_p for row in rows], dtype=np.float32), counts)
        columns = (torch.from_numpy(each).to(self._device) for each in (seeds, positions, temperature, top_k, top_p))
        return sample(logits, *columns, mode=Mode.of(temperature, top_k, top_p))


def _noise_of(sampling_metadata: Any) -> CounterNoise:
    return next(each for each in sampling_metadata.logitsprocs.all if isinstance(each, CounterNoise))


def _output(tokens: torch.Tensor, logprobs: torch.Tensor) -> SamplerOutput:
    """Return what vLLM takes. tokens, logprobs: [num_rows, num_tokens]."""
    flat = tokens.to(torch.int32).reshape(-1, 1)
    ranks = torch.zeros_like(flat[:, 0], dtype=torch.int64)  # asked for by the record, read by nobody here
    return SamplerOutput(tokens.to(torch.int32), LogprobsTensors(flat, logprobs.reshape(-1, 1), ranks))


class CounterSampler(Sampler):  # type: ignore[misc]
    """Draws by the noise of (seed, position) alone, in place of vLLM's own generators."""

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *unused: Any, **unused_too: Any) -> SamplerOutput:
        """Draw one token a row. logits: [num_rows, vocab]."""
        tokens, logprobs = _noise_of(sampling_metadata).draw(logits, [1] * len(logits))
        return _output(tokens[:, None], logprobs[:, None])


class CounterVerifier(torch.nn.Module):
    """Draws along drafts by the same noise, and keeps what is equal; remembers the states that it drew from."""

    def __init__(self, runner: Any) -> None:
        """runner: vLLM's, whose model computes logits by a module of this name in all of its language models."""
        super().__init__()
        self._batch, self._discarded = runner.input_batch, runner.discard_request_mask
        self._states: torch.Tensor | None = None
        self._seen: list[list[Any]] = []
        runner.model.logits_processor.register_forward_pre_hook(self._look)

    def _look(self, module: torch.nn.Module, inputs: Sequence[Any]) -> None:
        self._states = inputs[1]

    def forward(self, metadata: Any, draft_probs: None, logits: torch.Tensor, sampling_metadata: Any) -> SamplerOutput:
        """Draw one token a row, and one for each of a draft. logits: [num_rows + num_drafted, vocab]."""
        nums: list[int] = metadata.num_draft_tokens
        counts = [num + 1 for num in nums]
        drawn, logprobs = _noise_of(sampling_metadata).draw(logits, counts)
        starts = (np.cumsum(counts) - counts).tolist()
        lengths = self._batch.num_tokens_no_spec[: len(nums)].tolist()
        self._seen = [
            [name, length - 1, start, count]
            for name, length, start, count, is_part in zip(
                self._batch.req_ids, lengths, starts, counts, self._discarded.np[: len(nums)], strict=True
            )
            if not is_part  # of a prompt that is not all there yet
        ]
        tokens = kept_along(drawn, metadata.draft_token_ids.to(drawn.dtype), nums)
        return _output(tokens, spread(logprobs, counts, 0.0))

    def states(self) -> dict[str, Any]:
        """Return the states that the last tokens were drawn from, as values that MessagePack has.

        seen: fields of `drafting.base.Seen`, with what vLLM calls a request inside.
        """
        assert self._states is not None
        states = self._states.cpu().contiguous()
        raw = states.view(torch.uint8).numpy().tobytes()
        return {
            "seen": self._seen,
            "dtype": str(states.dtype).removeprefix("torch."),
            "size": states.shape[1],
            "raw": raw,
        }


class NodeDrafts:
    """vLLM's drafter, which proposes nothing: drafts come from the node."""

    def __init__(self, vllm_config: Any) -> None:
        """vllm_config: has nothing that is needed here."""

    def load_model(self, *unused: Any) -> None:
        """Nothing to load."""

    def propose(self, sampled_token_ids: Sequence[Sequence[int]], *unused: Any, **unused_too: Mapping[str, Any]) -> Any:
        """Leave it to the node."""
        return [[] for _ in sampled_token_ids]
