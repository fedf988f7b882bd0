"""The policy as the trainer runs it: a row of tokens in, the log-probability of each of its targets out.

A module of its own, so that whoever shards the weights (`sharding`) wraps all that a forward pass needs of them: the
decoder, and the head, whose weight is used without its module being called.
"""

from collections.abc import Callable

from torch import Tensor, nn

from swarm.logprobs import logits_head, target_logprobs
from swarm.packed_attention import use_packed_attention
from swarm.packing import PackedRow, PaddedRows

__all__ = ["RowLogprobs"]


class RowLogprobs(nn.Module):
    """A transformers causal LM and how its logits are read."""

    def __init__(self, model: nn.Module, *, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self._temperature, self._chunk_tokens = temperature, chunk_tokens

    def forward(self, row: PackedRow | PaddedRows, observe: Callable[[Tensor], None] | None = None) -> Tensor:
        """Return log-probabilities of the row's targets under the current weights, [num_targets], fp32.

        observe: is shown the last hidden states, [num_tokens, hidden].
        """
        decoder = self.model.get_decoder()  # type: ignore[operator]
        if isinstance(row, PackedRow):
            with use_packed_attention(self.model, row):
                output = decoder(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
        else:
            output = decoder(input_ids=row.input_ids, attention_mask=row.attention_mask, use_cache=False)
        states = output.last_hidden_state.flatten(0, 1)  # [num_tokens, hidden]
        if observe is not None:
            observe(states.detach())
        return target_logprobs(
            states.index_select(0, row.predictors),
            logits_head(self.model),
            row.targets,
            temperature=self._temperature,
            chunk_tokens=self._chunk_tokens,
        )
