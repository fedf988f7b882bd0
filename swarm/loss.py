"""The policy-gradient objective over tokens, and its normalisations.

Per token, with ratio r = exp(logprob - old_logprob) and advantage A of its completion:

    loss = - weight * tis * min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)  +  weight * kl_coef * k3

`weight` is the normalisation, taken over the whole optimizer step so that microbatches only add up:

    grpo     1 / (num_completions * length)       mean over a completion's tokens, then over completions
    dapo     1 / num_tokens                       mean over all tokens (arXiv 2503.14476, equation 8)
    dr_grpo  1 / (num_completions * max_length)   a constant: length is not rewarded (arXiv 2503.20783, section 3)
    gspo     as grpo, with the completion's ratio exp(mean(logprob - old_logprob)) in place of r, so that a
             completion is clipped as a whole (GSPO, arXiv 2507.18071, section 4.1, equations 5 to 7)

`tis` = min(exp(old_logprob - behavior_logprob), tis_cap), without gradient, corrects for what the engine
sampled from something other than the trainer's policy (an older version, another dtype, top-p). Where the behaviour
is unknown, since another node wrote the completion, it is 1; with `external_probability` p it is
min(exp(old_logprob) / p, 1) for tokens of negative advantage: the truncated ratio of tapered REINFORCE (arXiv
2503.14286, section 3), token by token, with p in place of what the author's policy gave. k3 =
exp(ref - logprob) - (ref - logprob) - 1 estimates the KL to the reference.

Departures from the papers:
- Clip-higher (DAPO, section 3.1) holds under every normalisation; GSPO's own ranges (3e-4 and 4e-4) are
  settings.
- gspo is written in the token form of its section 4.3, ratio = sg(s) * p / sg(p): the same value and, for one
  advantage per completion, the same gradient, and it leaves room for a per-token `tis`.
- num_completions and num_tokens count what is trained on. Groups without advantage are no part of a batch.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from swarm.config import TrainerConfig

__all__ = ["LossTerms", "TokenTerms", "policy_loss", "token_weight"]


@dataclass(frozen=True, slots=True)
class TokenTerms:
    """What the loss knows about each token besides its log-probability under the policy. Shapes [num_tokens]."""

    old_logprobs: Tensor | None  # under the policy before the first optimizer step; None: the current ones
    behavior_logprobs: Tensor  # under what wrote the tokens; NaN where that is unknown
    reference_logprobs: Tensor | None  # under the reference policy; None: no KL penalty
    advantages: Tensor
    weights: Tensor  # see `token_weight`
    completion_numbers: Tensor  # int64, from 0, which completion a token belongs to
    completion_lengths: Tensor  # [num_completions], float

    def with_old(self, logprobs: Tensor) -> "TokenTerms":
        """Return the same terms with log-probabilities under the policy before the first step."""
        return replace(self, old_logprobs=logprobs)

    def with_reference(self, logprobs: Tensor) -> "TokenTerms":
        """Return the same terms with log-probabilities under the reference policy."""
        return replace(self, reference_logprobs=logprobs)


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss, and sums over tokens that describe it (no gradient). All scalars."""

    loss: Tensor
    num_clipped: Tensor
    tis_sum: Tensor  # over all tokens
    kl_sum: Tensor
    surprisal_sum: Tensor  # of -logprob: its mean estimates the policy's entropy
    mismatch_sum: Tensor  # of |old_logprob - behavior_logprob|, over the tokens whose behavior is known
    num_known: Tensor  # tokens whose behavior is known


def token_weight(
    config: TrainerConfig, *, length: int, num_completions: int, num_tokens: int, max_completion_tokens: int
) -> float:
    """Return the weight of each token of a completion of this length, in a step over so many completions."""
    if config.normalization == "dapo":
        return 1.0 / num_tokens
    if config.normalization == "dr_grpo":
        return 1.0 / (num_completions * max_completion_tokens)
    return 1.0 / (num_completions * length)


def policy_loss(logprobs: Tensor, terms: TokenTerms, config: TrainerConfig) -> LossTerms:
    """Return the loss of a microbatch. `logprobs` [num_tokens] carries the gradient."""
    current = logprobs.detach()
    old = current if terms.old_logprobs is None else terms.old_logprobs
    if config.normalization == "gspo":
        log_ratios = _sequence_mean(current - old, terms)[terms.completion_numbers]
        ratios = torch.exp(log_ratios + (logprobs - current))
    else:
        ratios = torch.exp(logprobs - old)
    clipped = ratios.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    gains = ratios * terms.advantages
    clipped_gains = clipped * terms.advantages
    known = ~terms.behavior_logprobs.isnan()
    correction = torch.exp(old - terms.behavior_logprobs).clamp(max=config.tis_cap)
    tis = torch.where(known, correction, _external_weights(old, terms, config))
    losses = -tis * torch.minimum(gains, clipped_gains)
    kl_sum = torch.zeros((), device=logprobs.device)
    if terms.reference_logprobs is not None:
        to_reference = terms.reference_logprobs - logprobs
        kl = torch.exp(to_reference) - to_reference - 1.0
        losses = losses + config.kl_coef * kl
        kl_sum = kl.detach().sum()
    return LossTerms(
        loss=(losses * terms.weights).sum(),
        num_clipped=(clipped_gains < gains).detach().sum(),
        tis_sum=tis.sum(),
        kl_sum=kl_sum,
        surprisal_sum=-current.sum(),
        mismatch_sum=torch.where(known, (old - terms.behavior_logprobs).abs(), 0.0).sum(),
        num_known=known.sum(),
    )


def _external_weights(old: Tensor, terms: TokenTerms, config: TrainerConfig) -> Tensor:
    """Weight of each token if another node wrote it, [num_tokens]."""
    if not config.external_probability:
        return torch.ones_like(old)
    ratios = (torch.exp(old) / config.external_probability).clamp(max=1.0)
    return torch.where(terms.advantages < 0, ratios, 1.0)


def _sequence_mean(values: Tensor, terms: TokenTerms) -> Tensor:
    """Mean over the tokens of each completion, [num_completions]."""
    total = torch.zeros_like(terms.completion_lengths).index_add_(0, terms.completion_numbers, values)
    return total / terms.completion_lengths
