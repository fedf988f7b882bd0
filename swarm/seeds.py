"""Seeds: every random choice is a function of the run's seed and of what it is for, never of a generator's state.

That is what lets a run resume bit for bit: nothing random has to be saved.
"""

__all__ = ["fold_seed"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def fold_seed(*parts: int) -> int:
    """Hash integers into one unsigned 64-bit seed."""
    state = 0
    for part in parts:
        state = (state + _GOLDEN + (part & _MASK_64)) & _MASK_64
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK_64
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK_64
        state ^= state >> 31
    return state
