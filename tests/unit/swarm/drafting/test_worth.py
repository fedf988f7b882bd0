"""What a drafted token is worth, learned from steps whose costs are known."""

import random

import pytest

from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.worth import UNKNOWN, PassCosts
from tests.unit.swarm.drafting.test_suffix import state_of


def learned(row_s, base_s, num_running=4, kept=2, steps=200, slow=()):
    costs, rng = PassCosts(), random.Random(1)
    for step in range(steps):
        num_rows = num_running * rng.randint(1, 6)
        pass_s = base_s + row_s * num_rows * rng.uniform(0.9, 1.1)
        pass_s += 3.0 if step in slow else 0.0
        costs.observe(num_running, num_rows, pass_s, pass_s, kept * num_running)
    return costs


def test_a_token_is_verified_where_its_chance_pays_for_its_row():
    worth = learned(row_s=0.001, base_s=0.010).worth(4)
    mean_step_s = 0.010 + 0.001 * 4 * 3.5
    assert worth.token_s == pytest.approx(mean_step_s / 8, rel=0.1)
    assert worth.least_chance == pytest.approx(0.001 / worth.token_s, rel=0.15)
    assert learned(row_s=0.00001, base_s=0.010).worth(4).least_chance == 0.03
    assert learned(row_s=0.01, base_s=0.0001, kept=4).worth(4).least_chance == 0.6


def test_each_batch_size_has_costs_of_its_own_and_a_hiccup_counts_for_nothing():
    costs = learned(row_s=0.001, base_s=0.010, slow={120, 150})
    assert costs.worth(4).least_chance == pytest.approx(
        learned(row_s=0.001, base_s=0.010).worth(4).least_chance, rel=0.1
    )
    assert costs.worth(3) == UNKNOWN


def test_nothing_is_known_of_passes_that_are_all_alike():
    costs = PassCosts()
    for _ in range(50):
        costs.observe(2, 2, 0.01, 0.01, 2)
    assert costs.worth(2) == UNKNOWN


def test_unlikely_tokens_are_drafted_where_a_row_is_cheap_alone():
    drafter = SuffixDrafter()
    text = list(range(10, 60))
    drafter.learn((1, 2), text)
    costs = learned(row_s=0.00001, base_s=0.010), learned(row_s=0.002, base_s=0.002)
    lengths = []
    for cost in costs:
        [draft] = drafter.propose([state_of(text[:4], prompt=(1, 2))], 32, 99, cost.worth(4))
        lengths.append(len(draft))
    assert lengths[0] > 8
    assert 0 < lengths[1] < 4
