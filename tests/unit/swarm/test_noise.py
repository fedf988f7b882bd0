"""The counter-based noise: its law, the independence of its counters, and the very numbers."""

import math

import pytest
import torch

from swarm.engine.torch.noise import gumbel
from swarm.seeds import fold_seed


def signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed


def uniform(seeds: torch.Tensor, positions: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """Undo the Gumbel quantile function. returns: float64 in (0, 1), [num_rows, num_lanes]."""
    return torch.exp(-torch.exp(-gumbel(seeds, positions, num_lanes).double()))


def chi_square(values: torch.Tensor, num_bins: int) -> float:
    """How many standard deviations the counts of uniform numbers in equal bins are from what they should be."""
    counts = torch.bincount((values.flatten() * num_bins).long().clamp_(max=num_bins - 1), minlength=num_bins).double()
    expected = values.numel() / num_bins
    statistic = float(((counts - expected) ** 2).sum() / expected)
    return (statistic - (num_bins - 1)) / math.sqrt(2 * (num_bins - 1))


COUNTERS = {
    "seeds": (torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)),
    "positions": (torch.full((20_000,), 7), torch.arange(20_000)),
    "both": (torch.arange(20_000) // 100, torch.arange(20_000) % 100),
}


@pytest.mark.parametrize("counter", COUNTERS)
def test_lanes_are_uniform(counter):
    assert abs(chi_square(uniform(*COUNTERS[counter], 16), 256)) < 4


@pytest.mark.parametrize("counter", COUNTERS)
def test_neighbours_are_independent(counter):
    """Pairs along every counter fall evenly into a grid: lanes of a row, and rows of a lane."""
    values = uniform(*COUNTERS[counter], 16)
    for first, second in ((values[:, :-1], values[:, 1:]), (values[:-1], values[1:]), (values[:-100], values[100:])):
        cell = ((first * 16).long() * 16 + (second * 16).long()).double()
        assert abs(chi_square((cell + 0.5) / 256, 256)) < 4


def test_seed_and_position_are_not_interchangeable():
    seeds, positions = torch.arange(1, 2000), torch.zeros(1999, dtype=torch.int64)
    swapped = gumbel(positions, seeds, 4)
    assert len(torch.cat([gumbel(seeds, positions, 4), swapped]).unique()) == 2 * 1999 * 4


def test_far_tails_are_finite():
    values = gumbel(torch.arange(4000), torch.arange(4000), 500)
    assert bool(values.isfinite().all())
    assert float(values.max()) > 12
    assert float(values.min()) < -2.4


def test_a_row_depends_on_its_counters_alone():
    seeds, positions = torch.tensor([5, signed((1 << 64) - 9), 5]), torch.tensor([0, 3, 1])
    whole = gumbel(seeds, positions, 40)
    for row in range(3):
        assert torch.equal(gumbel(seeds[row : row + 1], positions[row : row + 1], 40)[0], whole[row])
    assert torch.equal(gumbel(seeds, positions, 7), whole[:, :7])


def split_mix(state: int) -> int:
    """SplitMix64's finaliser on Python integers, from the paper."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, (1 << 64) - 1, 1 << 63])
@pytest.mark.parametrize("position", [0, 1, 4095])
def test_noise_is_the_hash_that_the_module_names(seed, position):
    golden = 0x9E3779B97F4A7C15
    key = split_mix((seed + (position + 1) * golden) % (1 << 64))
    expected = []
    for lane in range(1, 6):
        unit = ((split_mix((key + lane * golden) % (1 << 64)) >> 24) + 0.5) * 2.0**-40
        expected.append(-math.log(-math.log(unit)))
    got = gumbel(torch.tensor([signed(seed)]), torch.tensor([position]), 5)[0].tolist()
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)


GOLDEN_NOISE = {
    (0, 0): [0.8509172, 1.035793, 0.05233609],
    (7, 0): [1.119596, 0.8410954, 0.512535],
    (7, 1): [0.3929056, 1.251765, 2.279592],
    (18446744073709551615, 511): [0.1318196, -0.8024985, 0.3704297],
}


@pytest.mark.parametrize(("counters", "expected"), GOLDEN_NOISE.items())
def test_noise_never_changes(counters, expected):
    """A recorded run replays only while these numbers stay."""
    seed, position = counters
    got = gumbel(torch.tensor([signed(seed)]), torch.tensor([position]), 3)[0].tolist()
    assert got == pytest.approx(expected, rel=1e-6)


GOLDEN_SEEDS = {
    (): 0x0000000000000000,
    (0,): 0xE220A8397B1DCDAF,
    (0, 0, 0, 0): 0x2130748AAAC80268,
    (1, 2, 3, 4): 0x336C3255CBCC01FE,
    (-1,): 0xE4D971771B652C20,
    (18446744073709551615, 5): 0x3562133A936C2870,
}


@pytest.mark.parametrize(("parts", "expected"), GOLDEN_SEEDS.items())
def test_folded_seeds_never_change(parts, expected):
    assert fold_seed(*parts) == expected


def test_folding_tells_order_and_number_of_parts():
    assert len({fold_seed(), fold_seed(0), fold_seed(0, 0), fold_seed(1, 0), fold_seed(0, 1), fold_seed(-1)}) == 6
    assert fold_seed(-1) == fold_seed((1 << 64) - 1)
    seeds = {
        fold_seed(seed, round_, place, i)
        for seed in range(5)
        for round_ in range(20)
        for place in range(20)
        for i in range(8)
    }
    assert len(seeds) == 5 * 20 * 20 * 8
