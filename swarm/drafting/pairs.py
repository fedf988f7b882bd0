"""What the learned drafter learns from: sequences with the policy's states after each token.

They come for free from the trainer's forward pass (`sequences_of`). `PairBuffer` keeps a bounded number of tokens
over rounds; it prefers long sequences, since those are what a round waits for, and lets the oldest and shortest go.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from swarm.packing import PackedRow, PaddedRows
from swarm.types import TrainingGroup

__all__ = ["CONTEXT_TOKENS", "PairBuffer", "StatedSequence", "sequences_of"]

CONTEXT_TOKENS = 64  # of a prompt, that go with a completion: as many as the drafter sees when it begins
_AGEING = 0.9  # by which what a sequence is worth falls with each round that has come since


@dataclass(slots=True)
class StatedSequence:
    """The end of a prompt and a completion, and the policy's last states after all but the last token."""

    tokens: Tensor  # int64 [num_tokens], on the CPU
    states: Tensor  # [num_tokens - 1, hidden], of the policy's dtype, on its device
    num_context: int  # tokens of the prompt
    round_index: int = 0

    @property
    def num_pairs(self) -> int:
        """Places to learn from: (state, next token) and the state after that."""
        return len(self.states) - 1


def sequences_of(groups: Sequence[TrainingGroup], row: PackedRow | PaddedRows, states: Tensor) -> list[StatedSequence]:
    """Cut what the trainer's forward pass gave into sequences. states: [num_tokens of the row, hidden]."""
    found, at = [], 0
    predictors = row.predictors
    for ref in row.refs:
        group = groups[ref.group]
        completion = group.completion_ids[ref.completion]
        num, num_context = len(completion), min(len(group.prompt_ids), CONTEXT_TOKENS)
        own = predictors[at : at + num]
        at += num
        if num < 2:
            continue
        context = own[0] - torch.arange(num_context - 1, -1, -1, device=own.device)  # a prompt lies in one piece
        rows = torch.cat([context, own[1:]])
        tokens = torch.tensor(group.prompt_ids[len(group.prompt_ids) - num_context :] + completion)
        found.append(StatedSequence(tokens, states.index_select(0, rows), num_context))
    return found


class PairBuffer:
    """Sequences of the last rounds, at most `max_tokens` of them. Not thread-safe."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._held: list[StatedSequence] = []
        self._round_index = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        """Sequences that are held."""
        return len(self._held)

    def next_round(self) -> None:
        """What comes from now on is newer than what is here."""
        self._round_index += 1

    def add(self, sequences: Sequence[StatedSequence]) -> None:
        """Take sequences, and let go of those that are worth least."""
        for sequence in sequences:
            sequence.round_index = self._round_index
            self._held.append(sequence)
            self.num_tokens += len(sequence.tokens)
        if self.num_tokens > self._max_tokens:
            self._held.sort(key=self._worth, reverse=True)
            while self.num_tokens > self._max_tokens and self._held:
                self.num_tokens -= len(self._held.pop().tokens)

    def draw(self, num_pairs: int, rng: random.Random) -> list[StatedSequence]:
        """Return different sequences with about so many pairs, the more likely the more they are worth."""
        # Efraimidis and Spirakis: the largest of u ** (1 / weight) are a weighted sample without replacement
        keyed = sorted(self._held, key=lambda one: rng.random() ** (1 / self._worth(one)), reverse=True)
        drawn: list[StatedSequence] = []
        for sequence in keyed:
            if num_pairs <= 0:
                break
            drawn.append(sequence)
            num_pairs -= sequence.num_pairs
        return drawn

    def _worth(self, sequence: StatedSequence) -> float:
        return float(len(sequence.tokens) * _AGEING ** (self._round_index - sequence.round_index))
