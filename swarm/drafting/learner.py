"""Teaches the learned drafter, step by step, wherever there is time: `HeadLearner`.

A step takes sequences from the buffer, packs them into one row in which none sees another, and brings what the
drafter says nearer to the policy's states (smooth L1) and to the distribution that the LM head makes of them (soft
cross-entropy, over the tokens that drafts are made of). When a step is to be given up, it is, between any two of its
parts, and nothing of it remains.

Departures from TLT: the cross-entropy is over frequent tokens alone (as in FR-Spec, arXiv 2502.14856), which is
most of what a step costs on a CPU; states of earlier rounds are used as they were, under today's LM head.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from swarm.config import TrainerConfig
from swarm.drafting.head_model import HeadModel, head_config
from swarm.drafting.pairs import PairBuffer, StatedSequence, sequences_of
from swarm.optimizer import FlatAdamW
from swarm.packed_attention import use_packed_attention
from swarm.packing import PackedRow, PaddedRows, Part, pack
from swarm.types import TrainingGroup

__all__ = ["HeadLearner"]

_LEAST_VOCABULARY, _MAX_VOCABULARY = 1024, 8192  # tokens that drafts are made of, where the policy has more
_COVERED = 0.997  # share of the tokens seen that they are to be
_STEP_PAIRS = 512
_MAX_TOKENS = 1 << 15  # that the buffer holds
_STATE_WEIGHT = 1.0  # of the distance between states, beside the cross-entropy
_CONFIG = TrainerConfig(learning_rate=5e-4, weight_decay=0.0, beta2=0.95, max_grad_norm=0.5)
_WARMUP_STEPS = 20


class HeadLearner:
    """A drafter under training. One thread calls it at a time."""

    def __init__(self, policy: nn.Module, *, seed: int = 0, max_tokens: int = _MAX_TOKENS) -> None:
        """policy: the trainer's model, whose embedding and LM head are used as they are at every step."""
        embedding: Any = policy.get_input_embeddings()  # type: ignore[operator]
        head: Any = policy.get_output_embeddings()  # type: ignore[operator]
        self._embedding, self._head = embedding, head
        weight: Tensor = head.weight
        self.model = HeadModel(head_config(policy), seed).to(weight.device, weight.dtype)
        named = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        self._optimizer = FlatAdamW(named, _CONFIG)
        self._buffer = PairBuffer(max_tokens)
        self._rng = random.Random(seed)
        self._counts = torch.zeros(len(weight), dtype=torch.int64)  # how often each token was seen
        self._vocabulary: Tensor | None = None
        self.num_steps = 0
        self.loss: float | None = None  # of the last step

    def observe(self, groups: Sequence[TrainingGroup], row: PackedRow | PaddedRows, states: Tensor) -> None:
        """Take what the trainer's forward pass gave. states: [num_tokens of the row, hidden], without a graph."""
        sequences = sequences_of(groups, row, states)
        for sequence in sequences:
            self._counts += torch.bincount(sequence.tokens, minlength=len(self._counts))
        self._buffer.add(sequences)

    def next_round(self) -> None:
        """The policy has changed: what is held is of an older one, and other tokens may be frequent."""
        self._buffer.next_round()
        self._vocabulary = None

    @property
    def vocabulary(self) -> Tensor:
        """The tokens that drafts are made of, int64, in order: those seen most, then those of low numbers.

        As many as nearly all that is written consists of, a power of two: each costs time in every draft and step.
        """
        if self._vocabulary is None:
            counts, order = self._counts.sort(descending=True, stable=True)
            covered = int((counts.cumsum(0) < _COVERED * counts.sum()).sum()) + 1
            num = min(max(1 << (covered - 1).bit_length(), _LEAST_VOCABULARY), _MAX_VOCABULARY, len(counts))
            self._vocabulary = order[:num].sort().values
        return self._vocabulary

    @property
    def can_learn(self) -> bool:
        """Whether there is anything to learn from."""
        return len(self._buffer) > 0

    def step(self, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Make one optimizer step; returns whether it was made. `given_up` is asked between its parts."""
        drawn = self._buffer.draw(_STEP_PAIRS, self._rng)
        if not drawn or given_up():
            return False
        self._optimizer.zero_grad()
        loss = self._loss(drawn)
        if given_up():
            return False
        loss.backward()
        if given_up():
            return False
        norm = float(self._optimizer.grad_norm())
        scale = min(1.0, _CONFIG.max_grad_norm / max(norm, 1e-9))
        self._optimizer.step(_CONFIG.learning_rate * min(1.0, (self.num_steps + 1) / _WARMUP_STEPS), scale)
        self.num_steps += 1
        self.loss = float(loss.detach())
        return True

    def _loss(self, drawn: Sequence[StatedSequence]) -> Tensor:
        """Return the loss over sequences that see themselves alone, a scalar."""
        device = self._embedding.weight.device
        # a prompt of one token, so that each becomes one piece of the row: the tokens that states come after
        groups = [
            TrainingGroup(tuple(one.tokens[1:2].tolist()), (tuple(one.tokens[2:].tolist()),), (0.0,), (None,))
            for one in drawn
        ]
        row = pack(groups, [Part(number, (0,)) for number in range(len(drawn))], device)
        given = torch.cat([one.states[:-1] for one in drawn])[None]  # [1, num_pairs, hidden]
        wanted = torch.cat([one.states[1:] for one in drawn])
        with torch.no_grad():
            embedded = self._embedding(row.input_ids)
        with use_packed_attention(self.model, row):
            said = self.model(embedded, given, row.position_ids)[0]  # [num_pairs, hidden]
        counted = torch.cat([torch.arange(len(one.states) - 1) >= one.num_context - 2 for one in drawn]).to(device)
        said, wanted = said[counted], wanted[counted]
        rows = self._head.weight.detach().index_select(0, self.vocabulary.to(device))  # [vocabulary, hidden]
        with torch.no_grad():
            chances = functional.linear(wanted, rows).float().softmax(-1)
        logits = functional.linear(said, rows).float()
        surprise = -(chances * logits.log_softmax(-1)).sum(-1).mean()
        distance = functional.smooth_l1_loss(said.float(), wanted.float())
        return surprise + _STATE_WEIGHT * distance

    def weights(self) -> dict[str, Tensor]:
        """Return the drafter's weights: live tensors, under the names of EAGLE's checkpoints."""
        return {name: one.detach() for name, one in self.model.state_dict().items()}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of what a resumed learner needs; nothing of it belongs to the policy."""
        tensors = {name: tensor.detach().clone() for name, tensor in self._optimizer.state_tensors().items()}
        return {**tensors, "counts": self._counts.clone()}

    def state_meta(self) -> dict[str, Any]:
        """Return what goes with `state_tensors`."""
        return {"layout": self._optimizer.layout, "num_steps": self.num_steps, "loss": self.loss}

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bool:
        """Go on from `state_tensors`; returns whether they fit: those of another model do not."""
        if meta["layout"] != self._optimizer.layout:
            return False
        self._optimizer.load_state({name: one for name, one in tensors.items() if name != "counts"})
        self._counts.copy_(tensors["counts"])
        self.num_steps, self.loss, self._vocabulary = meta["num_steps"], meta["loss"], None
        return True
