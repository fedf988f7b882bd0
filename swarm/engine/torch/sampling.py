"""Drawing tokens: the Gumbel-max trick over counter-based noise, in two levels.

The vocabulary is cut into equal blocks of about its square root. The block is drawn first, by Gumbel-max
over the blocks' log-sum-exp, then the token inside it, by Gumbel-max over its logits. The product of the
two is exactly the softmax, and a row needs noise for about 2 sqrt(V) lanes instead of V: on a CPU, noise
for each of 49,152 tokens would cost as much as the model.

As with one level (arXiv 2408.07978), two distributions that share the noise draw the same token unless
the noise falls where they differ: each level agrees with probability at least (1 - TV) / (1 + TV).

On a CPU the compiled kernels do all of it in one call (swarm/native/draw.h); elsewhere torch's operations do.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from swarm.engine.torch.noise import gumbel
from swarm.native import kernels

__all__ = ["Mode", "block_size", "draw", "sample", "sample_by_operations"]


@dataclass(frozen=True, slots=True)
class Mode:
    """What the rows of a batch ask for together: steps that no row needs are left out."""

    greedy: Literal["none", "some", "all"]
    scaled: bool  # some temperature is neither 0 nor 1
    truncated: bool  # some row has a top-k or a top-p

    @classmethod
    def of(cls, temperature: np.ndarray, top_k: np.ndarray | None = None, top_p: np.ndarray | None = None) -> "Mode":
        """Look at the settings of the rows, [num_rows] each, on the host."""
        greedy = temperature == 0
        truncated = top_k is not None and top_p is not None and bool((top_k != 0).any() or (top_p != 1).any())
        return cls(
            "all" if greedy.all() else "some" if greedy.any() else "none",
            bool((~greedy & (temperature != 1)).any()),
            truncated,
        )


def block_size(vocab_size: int) -> int:
    """Return the width of a block: the power of two nearest sqrt(V), halved while it does not divide V."""
    size = 1 << round(math.log2(max(vocab_size, 2)) / 2)
    while size > 16 and vocab_size % size:
        size //= 2
    return size


def _keep_top(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Set logits outside the top-k and the nucleus to -inf. top_k, top_p: [num_rows]; 0 and 1 are off."""
    ordered, order = logits.sort(dim=-1, descending=True)  # [num_rows, vocab]
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    ordered = ordered.masked_fill(rank >= limit, -math.inf)
    mass = ordered.softmax(-1)
    outside = (mass.cumsum(-1) - mass >= top_p[:, None]) & (top_p < 1)[:, None]  # the first token always stays
    ordered = ordered.masked_fill(outside, -math.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _block_mass(blocks: torch.Tensor) -> torch.Tensor:
    """Return the log-sum-exp of every block, in float32. blocks: [num_rows, num_blocks, width], float32 on a CPU."""
    if blocks.device.type == "cpu":
        return blocks.logsumexp(-1)
    # the largest and its log-probability: two passes of fused kernels instead of six
    of_largest = torch.log_softmax(blocks, dim=-1, dtype=torch.float32).amax(-1)
    return (blocks.amax(-1).float() - of_largest).nan_to_num_(nan=-math.inf)  # a block without any mass


def sample(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    *,
    mode: Mode | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row.

    logits: [num_rows, vocab], any float dtype. seeds, positions: int64 [num_rows]. temperature: float32 [num_rows];
    a row with 0 takes its largest logit, with its log-probability at temperature 1. top_k, top_p: [num_rows], or
    None where every row has them off. mode: of these settings; None reads them, which on a GPU waits for it.
    returns: tokens int64 [num_rows], and their float32 log-probabilities under the distribution that was
    sampled from.
    """
    tokens, logprobs, _ = draw(logits, seeds, positions, temperature, top_k, top_p, mode=mode, with_margins=False)
    return tokens, logprobs


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    *,
    mode: Mode | None = None,
    vocabulary: torch.Tensor | None = None,
    vocab_size: int = 0,
    with_margins: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one token a row, as `sample` does, and say how close it was.

    vocabulary: int64 [num_logits], in order, what the logits are of, where it is not all `vocab_size` tokens: no other
    token is drawn, and the noise is that of all of them. with_margins: without it they mean nothing.
    returns: tokens and log-probabilities as `sample` does, and float32 [num_rows] by how much the noisy scores of each
    were better than any other: a distribution that differs by less draws the same.
    """
    if mode is None:
        settings = (None if each is None else each.cpu().numpy() for each in (temperature, top_k, top_p))
        mode = Mode.of(*settings)  # type: ignore[arg-type]
    library = kernels() if logits.device.type == "cpu" else None
    if vocabulary is not None and (library is None or mode.truncated):
        whole = logits.new_full((len(logits), vocab_size), -math.inf)
        logits, vocabulary = whole.index_copy_(1, vocabulary, logits), None
    if library is not None:
        logits = logits.float()
        if mode.truncated and top_k is not None and top_p is not None:
            logits = _keep_top(logits / temperature.masked_fill(temperature == 0, 1.0)[:, None], top_k, top_p)
            temperature = (temperature != 0).float()
        vocab = logits.shape[1] if vocabulary is None else vocab_size
        return library.draw(
            logits, seeds, positions, temperature, vocab_size=vocab, width=block_size(vocab), tokens=vocabulary
        )
    return _by_operations(logits, seeds, positions, temperature, top_k, top_p, mode, with_margins)


def sample_by_operations(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    mode: Mode,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `sample`, without the compiled kernels. Nothing in it waits for the device, so that it can be recorded."""
    tokens, logprobs, _ = _by_operations(logits, seeds, positions, temperature, top_k, top_p, mode, False)
    return tokens, logprobs


def _by_operations(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    mode: Mode,
    with_margins: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See draw. Without margins, what stands in their place means nothing."""
    num_rows, vocab = logits.shape
    scaled = logits.float() if logits.device.type == "cpu" or mode.scaled or mode.truncated else logits
    if mode.scaled:
        scaled = scaled / temperature.masked_fill(temperature == 0, 1.0)[:, None]
    if mode.truncated and top_k is not None and top_p is not None:
        scaled = _keep_top(scaled, top_k, top_p)
    width = block_size(vocab)
    if vocab % width:
        scaled = torch.nn.functional.pad(scaled, (0, width - vocab % width), value=-math.inf)
    blocks = scaled.view(num_rows, -1, width)  # [num_rows, num_blocks, width]
    num_blocks = blocks.shape[1]
    block_mass = _block_mass(blocks)  # [num_rows, num_blocks]
    total = block_mass.logsumexp(-1, keepdim=True)  # [num_rows, 1]
    if mode.greedy == "all":
        tokens = scaled.argmax(-1)
    else:
        noise = gumbel(seeds, positions, num_blocks + width)
        scores = block_mass + noise[:, :num_blocks]
        block = scores.argmax(-1, keepdim=True)  # [num_rows, 1]
        inside = blocks.gather(1, block[:, :, None].expand(-1, -1, width)).squeeze(1)  # [num_rows, width]
        inside = inside.float() + noise[:, num_blocks:]
        tokens = (block * width).squeeze(1) + inside.argmax(-1)
        if mode.greedy == "some":
            tokens = torch.where(temperature == 0, scaled.argmax(-1), tokens)
    logprobs = (scaled.gather(1, tokens[:, None]).float() - total).squeeze(1)
    if not with_margins:
        return tokens, logprobs, logprobs
    margins = _lead(scaled) if mode.greedy == "all" else torch.minimum(_lead(scores), _lead(inside))
    if mode.greedy == "some":
        margins = torch.where(temperature == 0, _lead(scaled), margins)
    return tokens, logprobs, margins


def _lead(scores: torch.Tensor) -> torch.Tensor:
    """Return by how much the best score of each row is the best. scores: [num_rows, num_scores]."""
    if scores.shape[-1] == 1:
        return torch.full((len(scores),), math.inf, device=scores.device)
    best, second = scores.float().topk(2, dim=-1).values.unbind(-1)
    return best - second
