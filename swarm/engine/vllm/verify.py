"""Which of the tokens that were drawn along drafts are a completion's: plain arithmetic, without vLLM.

Every token is drawn with the noise of its request and position, whatever was drafted there. A draft's token is kept
where it is the drawn one; the first drawn token that differs is the completion's own, and those after it follow a
prefix that it does not have. So what is kept is what decoding one by one would have drawn.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["NOT_KEPT", "kept_along", "spread"]

NOT_KEPT = -1  # where a row has no token
_NOT_DRAFTED = -2


def spread(values: Tensor, nums: Sequence[int], fill: float) -> Tensor:
    """Lay runs of values out as rows. values: [sum(nums)]. returns: [len(nums), max(nums)], `fill` behind each run."""
    counts = torch.tensor(nums)
    rows = torch.arange(len(nums)).repeat_interleave(counts)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    laid = values.new_full((len(nums), max(nums)), fill)
    laid[rows.to(values.device), places.to(values.device)] = values
    return laid


def kept_along(drawn: Tensor, drafted: Tensor, nums: Sequence[int]) -> Tensor:
    """Return the tokens that each row writes, `NOT_KEPT` behind them.

    drawn: [sum(nums) + len(nums)], the tokens drawn after each row's last one and after each of its draft's.
    drafted: [sum(nums)], the drafts. nums: their lengths. returns: [len(nums), max(nums) + 1].
    """
    tokens = spread(drawn, [num + 1 for num in nums], NOT_KEPT)
    if not max(nums):
        return tokens
    right = tokens[:, :-1] == spread(drafted, nums, _NOT_DRAFTED)
    goes_on = torch.cat([right.new_ones(len(nums), 1), right.cumprod(1).bool()], dim=1)
    return tokens.where(goes_on, NOT_KEPT)
