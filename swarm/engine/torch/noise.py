"""Counter-based noise: a uniform number for every (seed, position, lane), with no state.

The noise of a token depends on its request's seed and its position in the completion and on nothing else,
so a completion is the same tokens whatever shares its batch, however often it is interrupted, and on
whatever device it runs. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood,
OOPSLA 2014), applied twice: once to the key of a position, once to each lane.
"""

import torch

__all__ = ["gumbel"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit value."""
    return value - (1 << 64) if value >> 63 else value


def _mix(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, in place. Arithmetic shifts are masked into logical ones."""
    state.bitwise_xor_((state >> 30).bitwise_and_((1 << 34) - 1)).mul_(_signed(_MIX_1))
    state.bitwise_xor_((state >> 27).bitwise_and_((1 << 37) - 1)).mul_(_signed(_MIX_2))
    return state.bitwise_xor_((state >> 31).bitwise_and_((1 << 33) - 1))


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """Return standard Gumbel noise, float32.

    seeds: int64 [num_rows], the request's 64-bit seed by its bits.
    positions: int64 [num_rows], index of the token in its completion.
    returns: [num_rows, num_lanes].
    """
    keys = _mix(seeds + positions.add(1).mul_(_signed(_GOLDEN)))  # [num_rows]
    lanes = torch.arange(1, num_lanes + 1, device=keys.device).mul_(_signed(_GOLDEN))  # [num_lanes]
    bits = _mix(keys[:, None] + lanes)  # [num_rows, num_lanes]
    # uniform in (0, 1): 40 bits in float64, or 23 where there is only float32, so that no value rounds to 0 or 1
    num_bits, dtype = (23, torch.float32) if keys.device.type == "mps" else (40, torch.float64)
    uniform = (bits >> (64 - num_bits)).bitwise_and_((1 << num_bits) - 1).to(dtype)
    uniform.add_(0.5).mul_(2.0**-num_bits)
    return uniform.log_().neg_().log_().neg_().float()
