import random
from dataclasses import replace

import msgpack
import pytest

from swarm.rollout.over_provision import OverProvision, saved_tokens
from swarm.rollout.scheduler import RunCounts

MOST = 3.0


def run(chooser, num_runs, *, saves, tail=0.8, cut=0, longest=100):
    """Runs in which a factor saves `saves(factor)` of the longest completion's steps; returns the factors."""
    factors = []
    for _ in range(num_runs):
        factor = chooser.factor
        factors.append(factor)
        ahead = int((factor - 1) * 10)
        counts = RunCounts(
            num_steps=round(longest * (1 - saves(factor))), num_tokens_resumed=100 * ahead, num_tokens_cut=cut * ahead
        )
        chooser.observe(counts, 10, round(10 * longest * (1 - tail)), longest)
    return factors


def test_what_a_run_saved_is_steps_less_verification():
    counts = RunCounts(num_steps=60, num_tokens_resumed=100, num_tokens_cut=30)
    assert saved_tokens(counts, longest=100, step_cost_tokens=10.0) == 400 - 30 - 50
    counts = replace(counts, num_prompt_tokens_resumed=40)
    assert saved_tokens(counts, longest=100, step_cost_tokens=10.0) == 400 - 30 - 50 - 20


def test_it_goes_up_while_that_pays_and_stays_at_the_best():
    factors = run(OverProvision(0, MOST, 50.0), 80, saves=lambda f: {1: 0, 1.5: 0.3, 2: 0.5, 2.5: 0.5, 3: 0.5}[f])
    assert factors[0] == 1.0
    assert {1.5, 2.0, 2.5} <= set(factors)
    assert max(factors) <= MOST
    assert factors[-1] == 2.0


def test_without_a_tail_nothing_is_tried():
    assert set(run(OverProvision(0, MOST, 50.0), 200, saves=lambda f: 0.9, tail=0.1)) == {1.0}


def test_where_it_does_not_pay_it_is_tried_ever_more_rarely():
    factors = run(OverProvision(0, MOST, 1.0), 500, saves=lambda f: 0.2 * (f > 1), cut=90)
    assert sum(factor > 1 for factor in factors[:50]) > 5
    assert sum(factor > 1 for factor in factors[-200:]) < 30
    assert max(factors) == 1.5


def test_it_follows_a_change():
    chooser = OverProvision(0, MOST, 50.0)
    assert run(chooser, 60, saves=lambda f: 0.2 * (f - 1))[-1] > 1
    run(chooser, 80, saves=lambda f: 0.0, cut=500)
    assert chooser.factor == 1.0
    assert max(run(chooser, 120, saves=lambda f: 0.2 * (f - 1))) == MOST


def test_a_fixed_factor_stays():
    assert set(run(OverProvision(1.7, MOST, 50.0), 50, saves=lambda f: -1.0)) == {1.7}


@pytest.mark.parametrize("kill_at", [1, 7, 30, 61])
def test_a_saved_state_goes_on_alike(kill_at):
    def saves(factor, rng=None):
        return 0.1 * factor

    whole, first = OverProvision(0, MOST, 30.0), OverProvision(0, MOST, 30.0)
    expected = run(whole, 100, saves=saves)
    before = run(first, kill_at, saves=saves)
    second = OverProvision(0, MOST, 30.0)
    second.load_state(msgpack.unpackb(msgpack.packb(first.state())))
    assert before + run(second, 100 - kill_at, saves=saves) == expected


def test_the_maximum_may_be_lowered_on_resume():
    chooser = OverProvision(0, MOST, 50.0)
    run(chooser, 60, saves=lambda f: 0.2 * (f - 1))
    lower = OverProvision(0, 1.5, 50.0)
    lower.load_state(chooser.state())
    rng = random.Random(0)
    assert max(run(lower, 50, saves=lambda f: rng.random())) <= 1.5
