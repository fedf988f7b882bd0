"""Log-probabilities of target tokens from hidden states, without ever holding the logits of a batch.

The head's matmul runs over chunks of positions, in the dtype of the weights; the softmax runs in fp32 over
blocks of a few rows, which stay in the processor's cache. Between the two passes one number per position is
kept, and the logits of the last chunk: the backward pass begins with it, so it adds nothing to the peak. The
other chunks' logits are computed again; where there is only one chunk, none are.

Which positions predict which tokens is `packing`'s business; what is done with the numbers is `loss`'s.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["LogitsHead", "logits_head", "target_logprobs"]

_Context: TypeAlias = Any  # torch types neither what is saved in a context nor what is stored on it
_BLOCK_ELEMENTS = 1 << 20  # fp32 logits that are worked on at one time: 4 MiB


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


def _block_rows(vocab_size: int) -> int:
    return max(1, _BLOCK_ELEMENTS // vocab_size)


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
        rows = _block_rows(weight.shape[0])
        raw: Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_tokens):
            raw = _matmul_logits(hidden[start : start + chunk_tokens], weight, bias)
            for low in range(0, raw.shape[0], rows):
                logits = raw[low : low + rows].to(torch.float32)
                if softcap is not None:
                    logits = torch.tanh(logits.mul(scale / softcap)).mul_(softcap / temperature)
                elif scale != temperature:
                    logits = logits.mul(scale / temperature)
                at = slice(start + low, start + low + logits.shape[0])
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
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device) if need_bias else None
        single_chunk = hidden.shape[0] <= chunk_tokens
        raw, ctx.last_raw = ctx.last_raw, None
        for start in reversed(range(0, hidden.shape[0], chunk_tokens)):
            at = slice(start, min(start + chunk_tokens, hidden.shape[0]))
            raw = _matmul_logits(hidden[at], weight, bias) if raw is None else raw
            _logits_gradient_(raw, targets[at], log_normalizers[at], grad[at], scale, softcap, temperature)
            if grad_hidden is not None:
                torch.mm(raw, weight, out=grad_hidden[at])
            if grad_weight is not None:
                part = torch.mm(raw.t(), hidden[at])
                grad_weight = part if single_chunk else grad_weight.add_(part)
            if grad_bias is not None:
                grad_bias += raw.sum(dim=0, dtype=torch.float32)
            raw = None
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


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
    rows = _block_rows(raw.shape[1])
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
