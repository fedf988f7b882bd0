"""Updates the policy from a training batch.

    split      groups into minibatches (one optimizer step each), and those into microbatches
    pack       a microbatch into one row in which completions share their prompt            (packing)
    forward    hidden states, then log-probabilities of completion tokens only              (logprobs)
    backward   through the objective, normalised over the whole optimizer step              (loss)
    step       clip, AdamW on fp32 master weights, round the compute weights                (optimizer)

The trainer owns the model that it is given: full weights are trained in place, and with LoRA adapters are put
into it. Rewards, advantages and the choice of groups come from `sapo`; files are `checkpoint`'s. Where several
processes share one policy, each has a `ShardedTrainer` (`sharded_trainer`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from swarm.config import TrainerConfig
from swarm.errors import CheckpointError, TrainingDiverged
from swarm.fused import fuse
from swarm.lora import add_adapters, policy_state
from swarm.loss import LossTerms, TokenTerms, policy_loss, token_weight
from swarm.optimizer import FlatAdamW, PolicyOptimizer
from swarm.packed_attention import supports_packed_attention
from swarm.packing import PackedRow, PaddedRows, Part, pack, pad, split_into_microbatches
from swarm.row_logprobs import RowLogprobs
from swarm.types import TrainingBatch, TrainingGroup

__all__ = ["StatesObserver", "Trainer", "UpdateStats"]

# (groups of the batch, a row of some of them, states [num_tokens of the row, hidden]); see swarm.drafting
StatesObserver: TypeAlias = Callable[[Sequence[TrainingGroup], PackedRow | PaddedRows, Tensor], None]
_NUM_SUMS = 7


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one update did. Means are over completion tokens and optimizer steps."""

    loss: float  # mean over optimizer steps
    grad_norm: float  # before clipping, mean over optimizer steps
    clip_fraction: float  # share of tokens whose ratio was clipped
    tis_mean: float  # mean weight of truncated importance sampling
    mismatch: float  # mean |log-prob of the trainer - that of what wrote the token|, nats; NaN where nobody knows it
    kl: float  # estimated KL to the reference, nats a token; 0 without a reference
    entropy: float  # estimated from the sampled tokens, nats a token
    learning_rate: float  # of the last optimizer step
    num_tokens: int  # completion tokens in the batch
    num_completions: int
    num_steps: int  # optimizer steps applied
    num_skipped_steps: int  # optimizer steps skipped for a non-finite loss or gradient
    policy_version: int  # after the update

    @property
    def skipped(self) -> bool:
        """Whether a non-finite loss or gradient kept the policy as it was."""
        return self.num_steps == 0 and self.num_skipped_steps > 0


@dataclass(slots=True)
class _Microbatch:
    row: PackedRow | PaddedRows
    terms: TokenTerms
    counts: bool  # whether it is learned from here: elsewhere it is, and runs here to keep ranks in step


@dataclass(frozen=True, slots=True)
class _Minibatch:
    microbatches: list[_Microbatch]
    num_tokens: int  # completion tokens, those of other ranks included


class Trainer:
    """A policy under training. Not thread-safe."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainerConfig,
        *,
        temperature: float = 1.0,
        max_completion_tokens: int | None = None,
    ) -> None:
        """Take over a transformers causal LM.

        `temperature` is that of the rollouts: log-probabilities are compared under the distribution that was
        sampled from. `max_completion_tokens` is a completion's budget, which dr_grpo divides by.
        """
        if config.normalization == "dr_grpo" and not max_completion_tokens:
            raise ValueError("dr_grpo needs max_completion_tokens, the constant that it divides by")
        self._model, self._config = model, config
        self._max_completion_tokens = max_completion_tokens or 1
        if config.lora.rank:
            add_adapters(model, config.lora)
        model.eval()
        fuse(model)
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not trainable:
            raise ValueError("the model has no trainable weights")
        self._device = trainable[0][1].device
        self._row_logprobs = RowLogprobs(model, temperature=temperature, chunk_tokens=config.logprob_chunk_tokens)
        self._optimizer = self._make_optimizer(trainable)
        self._reference = self._optimizer.snapshot() if config.kl_coef else None
        self.observer: StatesObserver | None = None  # shown the last hidden states of every update's first pass
        self._policy_version = 0
        self._num_steps = 0
        self._num_nonfinite = 0
        self._num_nonfinite_in_a_row = 0

    def _make_optimizer(self, trainable: Sequence[tuple[str, nn.Parameter]]) -> PolicyOptimizer:
        return FlatAdamW(trainable, self._config)

    @property
    def policy_version(self) -> int:
        """Updates that have changed the policy."""
        return self._policy_version

    @property
    def num_nonfinite(self) -> int:
        """Optimizer steps skipped since the beginning of the run."""
        return self._num_nonfinite

    def update(self, batch: TrainingBatch) -> UpdateStats:
        """Learn from a batch: `num_epochs` passes of `num_minibatches` optimizer steps.

        A step with a non-finite loss or gradient is skipped and counted. Raises TrainingDiverged after
        `max_nonfinite_updates` of them in a row; the policy is then the last good one.
        """
        minibatches = self._prepare(batch.groups)
        if self._config.num_epochs * len(minibatches) > 1:
            self._record_old_logprobs(minibatches)
        sums = torch.zeros(_NUM_SUMS, dtype=torch.float64)
        norm_sum, num_steps, num_skipped, num_tokens_seen = 0.0, 0, 0, 0
        for epoch in range(self._config.num_epochs):
            for minibatch in minibatches:
                step_sums, grad_norm = self._step(minibatch, batch.groups if epoch == 0 else None)
                if not (math.isfinite(grad_norm) and bool(step_sums.isfinite().all())):
                    num_skipped += 1
                    continue
                sums += step_sums
                norm_sum += grad_norm
                num_steps += 1
                num_tokens_seen += minibatch.num_tokens
        self._policy_version += num_steps > 0
        loss, num_clipped, tis, kl, surprisal, mismatch, num_known = sums.tolist()
        per_step, per_token = max(1, num_steps), max(1, num_tokens_seen)
        return UpdateStats(
            loss=loss / per_step if num_steps or not num_skipped else math.nan,
            grad_norm=norm_sum / per_step if num_steps or not num_skipped else math.nan,
            clip_fraction=num_clipped / per_token,
            tis_mean=tis / per_token,
            mismatch=mismatch / num_known if num_known else math.nan,
            kl=kl / per_token,
            entropy=surprisal / per_token,
            learning_rate=self._learning_rate(self._num_steps - 1) if num_steps else 0.0,
            num_tokens=sum(len(ids) for group in batch.groups for ids in group.completion_ids),
            num_completions=batch.num_completions,
            num_steps=num_steps,
            num_skipped_steps=num_skipped,
            policy_version=self._policy_version,
        )

    def _step(self, minibatch: _Minibatch, shown: Sequence[TrainingGroup] | None) -> tuple[Tensor, float]:
        """Accumulate gradients and apply one optimizer step, or skip it. Returns sums and the gradient norm.

        shown: the batch's groups, where the observer is to see the hidden states.
        """
        self._optimizer.zero_grad()
        parts = [torch.zeros(_NUM_SUMS, device=self._device)]
        for micro in minibatch.microbatches:
            logprobs = self._logprobs(micro.row, shown if micro.counts else None)
            if not micro.counts:
                (logprobs.sum() * 0.0).backward()
                continue
            result = policy_loss(logprobs, micro.terms, self._config)
            result.loss.backward()
            parts.append(_sums(result))
        # Read once a step: each reading makes the host wait for the device.
        sums = self._over_ranks(torch.stack(parts).to("cpu").sum(0, dtype=torch.float64))
        grad_norm = float(self._optimizer.grad_norm())
        if not (math.isfinite(grad_norm) and bool(sums.isfinite().all())):
            self._num_nonfinite += 1
            self._num_nonfinite_in_a_row += 1
            if self._num_nonfinite_in_a_row >= self._config.max_nonfinite_updates:
                raise TrainingDiverged(
                    f"{self._num_nonfinite_in_a_row} updates in a row had a non-finite loss or gradient"
                )
            return sums, grad_norm
        self._num_nonfinite_in_a_row = 0
        scale = min(1.0, self._config.max_grad_norm / grad_norm) if grad_norm > 0 else 1.0
        self._optimizer.step(self._learning_rate(self._num_steps), scale)
        self._num_steps += 1
        return sums, grad_norm

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Return what all processes that share the policy have added up, [_NUM_SUMS]; gradients likewise."""
        return sums

    def _learning_rate(self, step: int) -> float:
        warmup = self._config.warmup_updates
        return self._config.learning_rate * (min(1.0, (step + 1) / warmup) if warmup else 1.0)

    def _own_microbatches(
        self, groups: Sequence[TrainingGroup], chosen: Sequence[int], *, shares_prompts: bool
    ) -> list[tuple[list[Part], bool]]:
        """Return what this process runs of the chosen groups, and whether each microbatch counts here."""
        max_tokens = self._config.max_tokens_per_microbatch
        return [
            (parts, True)
            for parts in split_into_microbatches(groups, chosen, max_tokens, shares_prompts=shares_prompts)
        ]

    def _prepare(self, groups: Sequence[TrainingGroup]) -> list[_Minibatch]:
        """Lay out the batch: minibatches of microbatches. Every n-th group goes into the n-th minibatch."""
        longest = max((len(g.prompt_ids) + len(ids) for g in groups for ids in g.completion_ids), default=0)
        packs = supports_packed_attention(self._model, longest)
        num_minibatches = min(self._config.num_minibatches, len(groups))
        minibatches = []
        for first in range(num_minibatches):
            chosen = range(first, len(groups), num_minibatches)
            totals = [
                len(ids) - _num_masked(groups[index], number)
                for index in chosen
                for number, ids in enumerate(groups[index].completion_ids)
            ]
            microbatches = []
            for parts, counts in self._own_microbatches(groups, chosen, shares_prompts=packs):
                row = (pack if packs else pad)(groups, parts, self._device)
                microbatches.append(_Microbatch(row, self._terms(groups, row, len(totals), sum(totals)), counts))
            num_tokens = sum(len(ids) for index in chosen for ids in groups[index].completion_ids)
            minibatches.append(_Minibatch(microbatches, num_tokens))
        if self._reference is not None:
            with self._optimizer.swapped(self._reference), torch.no_grad():
                for micro in (micro for minibatch in minibatches for micro in minibatch.microbatches):
                    micro.terms = micro.terms.with_reference(self._logprobs(micro.row))
        return minibatches

    def _record_old_logprobs(self, minibatches: Sequence[_Minibatch]) -> None:
        """Compute log-probabilities under the policy before the first step."""
        with torch.no_grad():
            for micro in (micro for minibatch in minibatches for micro in minibatch.microbatches):
                micro.terms = micro.terms.with_old(self._logprobs(micro.row))

    def _terms(
        self, groups: Sequence[TrainingGroup], row: PackedRow | PaddedRows, num_completions: int, num_tokens: int
    ) -> TokenTerms:
        """Spread what is known per completion over the row's tokens. Totals are those of the optimizer step."""
        advantages: list[float] = []
        weights: list[float] = []
        masked: list[int] = []
        behavior: list[float] = []
        lengths: list[int] = []
        for ref in row.refs:
            group = groups[ref.group]
            length = len(group.completion_ids[ref.completion])
            known = group.behavior_logprobs[ref.completion]
            if known is not None and len(known) != length:
                raise ValueError(f"{len(known)} behaviour log-probabilities for {length} tokens")
            behavior.extend((math.nan,) * length if known is None else known)
            advantages.append(group.advantages[ref.completion])
            masked.append(_num_masked(group, ref.completion))
            weights.append(
                token_weight(
                    self._config,
                    length=max(1, length - masked[-1]),
                    num_completions=num_completions,
                    num_tokens=max(1, num_tokens),
                    max_completion_tokens=self._max_completion_tokens,
                )
            )
            lengths.append(length)
        lengths_tensor = torch.tensor(lengths)
        numbers = torch.arange(len(lengths)).repeat_interleave(lengths_tensor)
        weight = torch.tensor(weights)[numbers]
        if any(masked):
            begins = lengths_tensor.cumsum(0) - lengths_tensor
            weight[torch.arange(len(numbers)) < (begins + torch.tensor(masked))[numbers]] = 0.0
        return TokenTerms(
            old_logprobs=None,
            behavior_logprobs=torch.tensor(behavior).to(self._device),
            reference_logprobs=None,
            advantages=torch.tensor(advantages)[numbers].to(self._device),
            weights=weight.to(self._device),
            completion_numbers=numbers.to(self._device),
            completion_lengths=lengths_tensor.float().to(self._device),
        )

    def _logprobs(self, row: PackedRow | PaddedRows, shown: Sequence[TrainingGroup] | None = None) -> Tensor:
        """Return log-probabilities of the row's targets under the current weights, [num_targets], fp32."""
        observe = None if self.observer is None or shown is None else partial(self.observer, shown, row)
        logprobs: Tensor = self._row_logprobs(row, observe)
        return logprobs

    def policy_state(self) -> Mapping[str, Tensor]:
        """Return the policy's weights in compute dtype, under the names of the model's `state_dict`.

        They are live: copy what is to outlast the next update. With LoRA it is an `AdaptedState`, which merges.
        """
        return policy_state(self._model)

    def num_state_bytes(self) -> int:
        """Return what `state_tensors` takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state_tensors().values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Return what a resumed trainer needs: live tensors, good until the next update."""
        tensors = self._optimizer.state_tensors()
        for number, tensor in enumerate(self._reference or ()):
            tensors[f"reference.{number}"] = tensor
        return tensors

    def state_meta(self) -> dict[str, int | float | str]:
        """Return the counters that go with `state_tensors`."""
        return {
            "layout": self._optimizer.layout,
            "policy_version": self._policy_version,
            "num_steps": self._num_steps,
            "num_nonfinite": self._num_nonfinite,
            "num_nonfinite_in_a_row": self._num_nonfinite_in_a_row,
        }

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, int | float | str]) -> None:
        """Continue, bit for bit, where `state_tensors` and `state_meta` were taken."""
        if meta.get("layout") != self._optimizer.layout:
            raise CheckpointError("the checkpoint belongs to another model or LoRA setting: resume with its own")
        self._optimizer.load_state(tensors)
        self._load_reference(tensors)
        self._policy_version = int(meta["policy_version"])
        self._num_steps = int(meta["num_steps"])
        self._num_nonfinite = int(meta["num_nonfinite"])
        self._num_nonfinite_in_a_row = int(meta["num_nonfinite_in_a_row"])

    def _load_reference(self, tensors: Mapping[str, Tensor]) -> None:
        for number, tensor in enumerate(self._reference or ()):
            tensor.copy_(self._reference_in(tensors, number))

    def _reference_in(self, tensors: Mapping[str, Tensor], number: int) -> Tensor:
        if f"reference.{number}" not in tensors:
            raise CheckpointError("the checkpoint has no reference policy: resume with trainer.kl_coef=0")
        return tensors[f"reference.{number}"]


def _num_masked(group: TrainingGroup, completion: int) -> int:
    """Return how many first tokens of a completion are not trained on."""
    return group.num_masked[completion] if group.num_masked else 0


def _sums(result: LossTerms) -> Tensor:
    """Return what a microbatch adds to the statistics, [_NUM_SUMS], on its device."""
    parts = (
        result.loss.detach(),
        result.num_clipped,
        result.tis_sum,
        result.kl_sum,
        result.surprisal_sum,
        result.mismatch_sum,
        result.num_known,
    )
    return torch.stack([part.to(torch.float32) for part in parts])
