"""Log-probabilities of target tokens from hidden states, without ever holding the logits of a batch.

The head's matmul runs over chunks of positions, in the dtype of the weights; the softmax runs in fp32 over blocks of
rows: on a CPU a few, which stay in its cache, elsewhere many, which keep the device busy. Between the two passes one
number per position is kept, and the logits of the last chunk: the backward pass begins with it, so it adds nothing to
the peak. The other chunks' logits are computed again; where there is only one chunk, none are.

Which positions predict which tokens is `packing`'s business; what is done with the numbers is `loss`'s.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from swarm.native import training as native_training

__all__ = ["LogitsHead", "logits_head", "target_logprobs"]

_Context: TypeAlias = Any  # torch types neither what is saved in a context nor what is stored on it
_BLOCK_ELEMENTS_CPU = 1 << 20  # fp32 logits that are worked on at one time: 4 MiB
_BLOCK_ELEMENTS = 1 << 26  # the same elsewhere: 256 MiB


@dataclass(frozen=True, slots=True)
class LogitsHead:
    """What turns a hidden state into logits: `cap(scale * (weight @ hidden + bias))`."""

    weight: Tensor  # [vocab, hidden]
    bias: Tensor | None  # [vocab]
    scale: float = 1.0  # Cohere's logit_scale, the inverse of Granite's logits_scaling
    softcap: float | None = None  # Gemma 2: cap(x) = softcap * tanh(x / softcap)


def logits_head(model: nn.Module) -> LogitsHead:
    """Return the head of a transformers causal LM."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    config: Any = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitsHead(head.weight, getattr(head, "bias", None), scale, softcap)


def target_logprobs(
    hidden: Tensor,  # [num_positions, hidden]
    head: LogitsHead,
    targets: Tensor,  # [num_positions], int64
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> Tensor:  # [num_positions], fp32
    """Return log p(target) at every position under softmax(logits / temperature)."""
    result: Tensor = _TargetLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, targets, head.scale, head.softcap, temperature, chunk_tokens
    )
    return result


def _matmul_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return raw logits of a chunk in the weights' dtype, [chunk, vocab]."""
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


def _block_rows(vocab_size: int, device: torch.device) -> int:
    return max(1, (_BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS) // vocab_size)


class _TargetLogprobs(torch.autograd.Function):
    """Chunked log-softmax and gather; one backward pass only, which uses up the logits of the last chunk."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        chunk_tokens: int,
    ) -> Tensor:
        log_normalizers = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        target_logits = torch.empty_like(log_normalizers)
        rows = _block_rows(weight.shape[0], weight.device)
        raw: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_tokens):
            raw = _matmul_logits(hidden[start : start + chunk_tokens], weight, bias)
            if softcap is None and native_training.supports_native_training(raw):
                at = slice(start, start + raw.shape[0])
                found = native_training.logit_mass(raw, targets[at], scale / temperature)
                log_normalizers[at], target_logits[at] = found
                continue
            for low in range(0, raw.shape[0], rows):
                at = slice(start + low, start + min(low + rows, raw.shape[0]))
                if raw.device.type != "cpu":
                    fused, _ = _scaled_logits(raw[low : low + rows], scale, softcap, temperature)
                    target_logits[at] = fused.gather(1, targets[at, None])[:, 0].float()
                    logprobs = torch.log_softmax(fused, dim=-1, dtype=torch.float32).gather(1, targets[at, None])[:, 0]
                    log_normalizers[at] = target_logits[at] - logprobs
                    continue
                logits = raw[low : low + rows].to(torch.float32)
                if softcap is not None:
                    logits = torch.tanh(logits.mul(scale / softcap)).mul_(softcap / temperature)
                elif scale != temperature:
                    logits = logits.mul(scale / temperature)
                torch.logsumexp(logits, dim=-1, out=log_normalizers[at])
                target_logits[at] = logits.gather(1, targets[at, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, targets, log_normalizers)
        ctx.settings = (scale, softcap, temperature, chunk_tokens)
        ctx.last_raw = raw
        return target_logits - log_normalizers

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs  # [num_positions]
        hidden, weight, bias, targets, log_normalizers = ctx.saved_tensors
        scale, softcap, temperature, chunk_tokens = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Summed over chunks in fp32: partial sums in bf16 would lose what many positions add up to.
        grad_weight: Tensor | None = None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
        single_chunk = hidden.shape[0] <= chunk_tokens
        raw, ctx.last_raw = ctx.last_raw, None
        for start in reversed(range(0, hidden.shape[0], chunk_tokens)):
            at = slice(start, min(start + chunk_tokens, hidden.shape[0]))
            raw = _matmul_logits(hidden[at], weight, bias) if raw is None else raw
            states, factor = hidden[at], None
            if raw.device.type == "cpu":
                _logits_gradient_(raw, targets[at], log_normalizers[at], grad[at], scale, softcap, temperature)
            else:  # each row's factor goes where rows are narrow
                raw = _unscaled_gradient(raw, targets[at], log_normalizers[at], scale, softcap, temperature)
                factor = -grad[at, None] * (1.0 if softcap is not None else scale / temperature)
                states = (states * factor).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(raw, weight, out=grad_hidden[at])
                if factor is not None:
                    grad_hidden[at].mul_(factor)
            if need_weight:
                part = torch.mm(raw.t(), states)
                if not single_chunk:
                    part = part.float()
                grad_weight = part if grad_weight is None else grad_weight.add_(part)
            if grad_bias is not None:
                grad_bias += (raw if factor is None else raw * factor).sum(dim=0, dtype=torch.float32)
            raw = None
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _scaled_logits(
    raw: Tensor, scale: float, softcap: float | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Return the logits that the softmax is taken of, as they are where nothing scales them, and a cap's slope."""
    if softcap is not None:
        capped = torch.tanh(raw.float().mul(scale / softcap))
        return capped * (softcap / temperature), capped.square().neg_().add_(1.0).mul_(scale / temperature)
    return (raw if scale == temperature else raw.float().mul(scale / temperature)), None


def _unscaled_gradient(
    raw: Tensor, targets: Tensor, log_normalizers: Tensor, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """Return softmax - onehot(target), times the slope of a cap, in the dtype of the raw logits, which it uses up.

    What `_logits_gradient_` returns but for the factor of each row, in the few large operations that devices other
    than CPUs are fast at. The target's probability is not rounded: its distance from one is what is learned from.
    """
    target = targets[:, None]
    if softcap is None and scale == temperature:
        of_target = torch.expm1(raw.gather(1, target).float() - log_normalizers[:, None])
        return torch.softmax(raw, dim=-1).scatter_(1, target, of_target.to(raw.dtype))
    rows = _block_rows(raw.shape[1], raw.device)
    for low in range(0, raw.shape[0], rows):
        at = slice(low, min(low + rows, raw.shape[0]))
        logits, slope = _scaled_logits(raw[at], scale, softcap, temperature)
        of_target = torch.expm1(logits.gather(1, target[at]) - log_normalizers[at, None])
        gradient = torch.softmax(logits, dim=-1).scatter_(1, target[at], of_target)
        raw[at] = gradient if slope is None else gradient.mul_(slope)
    return raw


def _logits_gradient_(
    raw: Tensor,  # [chunk, vocab]: raw logits on entry, their gradient on return
    targets: Tensor,  # [chunk]
    log_normalizers: Tensor,  # [chunk]
    grad: Tensor,  # [chunk]: gradient of the log-probabilities
    scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Replace raw logits by d(loss)/d(raw logits) = grad * (onehot(target) - softmax) * d(logits)/d(raw)."""
    if softcap is None and native_training.supports_native_training(raw):
        native_training.logit_gradient_(raw, targets, log_normalizers, grad, scale / temperature)
        return
    rows = _block_rows(raw.shape[1], raw.device)
    for low in range(0, raw.shape[0], rows):
        at = slice(low, min(low + rows, raw.shape[0]))
        logits = raw[at].to(torch.float32, copy=True)
        slope: Tensor | None = None
        if softcap is not None:
            capped = torch.tanh(logits.mul_(scale / softcap))
            slope = capped.square().neg_().add_(1.0).mul_(scale / temperature)
            logits = capped.mul_(softcap / temperature)
        elif scale != temperature:
            logits.mul_(scale / temperature)
        # The chain rule's constant goes into the gradient of each row: one pass over the block less.
        factor = grad[at, None] if slope is not None else grad[at, None] * (scale / temperature)
        gradient = logits.sub_(log_normalizers[at, None]).exp_().mul_(-factor)
        gradient.scatter_add_(1, targets[at, None], factor)
        raw[at] = gradient if slope is None else gradient.mul_(slope)
