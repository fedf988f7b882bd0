"""The strategy tuner in simulated time, against rewards that are steady, noisy, drifting and hostile."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm.drafting.tuner import OFF, Strategy, StrategyTuner, bucket_of

ARMS = [Strategy(name, depth, 4 * depth) for name in ("suffix", "ngram") for depth in (4, 8, 12)]
STEPS = st.integers(1, 6)


def simulate(tuner, num_steps, step_of, num_running=1):
    """Run steps; returns tokens and seconds by whether they were speculated, and the strategies in order."""
    tokens, seconds, chosen = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}, []
    for number in range(num_steps):
        strategy = tuner.choose(num_running)
        num_tokens, elapsed_s = step_of(number, strategy)
        tuner.observe(num_running, num_tokens, elapsed_s)
        tokens[strategy != OFF] += num_tokens
        seconds[strategy != OFF] += elapsed_s
        chosen.append(strategy)
    return tokens, seconds, chosen


def steady(speeds, seed=None, spread=0.2):
    """Steps whose mean rate is that of the strategy; OFF is 1 token a second."""
    rng = np.random.default_rng(seed)

    def step_of(_, strategy):
        if strategy == OFF:
            return 1, 1.0 if seed is None else float(rng.gamma(1 / spread**2, spread**2))
        num_tokens = 2 if seed is None else 1 + int(rng.binomial(4, 0.25))
        mean_s = 2.0 / speeds[strategy.key]
        return num_tokens, mean_s if seed is None else mean_s * float(rng.gamma(1 / spread**2, spread**2))

    return step_of


def speeds(*values):
    return {arm.key: value for arm, value in zip(ARMS, values, strict=True)}


def test_buckets():
    sizes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 49, 64, 65]
    assert [bucket_of(n) for n in sizes] == [1, 2, 3, 4, 5, 5, 7, 7, 9, 9, 13, 13, 17, 17, 25, 25, 33, 33, 49, 49, 65]


def test_it_begins_without_speculation_and_measures_that_first():
    _, _, chosen = simulate(StrategyTuner(ARMS), 4, steady(speeds(2, 2, 2, 2, 2, 2)))
    assert chosen == [OFF] * 4


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_what_pays(seed):
    tuner = StrategyTuner(ARMS)
    tokens, seconds, chosen = simulate(tuner, 4000, steady(speeds(1.2, 0.8, 1.1, 0.7, 2.0, 0.6), seed))
    assert tuner.incumbents() == {1: ARMS[4]}
    assert sum(tokens.values()) / sum(seconds.values()) > 1.7
    assert sum(one == ARMS[4] for one in chosen[-2000:]) > 1700


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", [0.97, 0.9, 0.5, 0.1])
def test_where_everything_loses_it_stays_above_its_bound(seed, loss):
    tuner = StrategyTuner(ARMS)
    tokens, seconds, _ = simulate(tuner, 4000, steady(speeds(*[loss] * 6), seed))
    assert sum(tokens.values()) / sum(seconds.values()) > 0.97
    assert tuner.incumbents() == {1: OFF}


@given(costs=st.lists(st.floats(0.1, 30), min_size=20, max_size=200), gains=st.lists(STEPS, min_size=5, max_size=50))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_no_sequence_of_rewards_makes_it_lose_more_than_its_bound(costs, gains):
    """Any rewards whatever of speculation: the time lost, at every moment, is within a share and a few steps."""
    tuner, lost_s, total_s = StrategyTuner(ARMS), 0.0, 0.0
    for number in range(3000):
        strategy = tuner.choose(1)
        if strategy == OFF:
            num_tokens, elapsed_s = 1, 1.0
        else:
            num_tokens, elapsed_s = gains[number % len(gains)], costs[number * 7 % len(costs)]
        tuner.observe(1, num_tokens, elapsed_s)
        total_s += elapsed_s
        lost_s += elapsed_s - num_tokens if strategy != OFF else 0.0
        assert lost_s <= 0.01 * total_s + 4.0 + max(costs)


def test_an_adversary_that_pays_until_it_is_trusted_gains_little():
    """Speculation is fast while it is tried and slow once it is the incumbent."""
    tuner = StrategyTuner(ARMS)

    def step_of(_, strategy):
        if strategy == OFF:
            return 1, 1.0
        return (2, 1.0) if tuner.incumbents()[1] == OFF else (2, 4.0)

    tokens, seconds, chosen = simulate(tuner, 20_000, step_of)
    assert sum(tokens.values()) / sum(seconds.values()) > 0.97
    switches = sum(one != other for one, other in pairwise(chosen[10_000:]))
    assert switches < 400


def test_speculation_that_comes_to_lose_is_left_at_once():
    tuner, before = StrategyTuner(ARMS), steady(speeds(2, 2, 2, 2, 2, 2))
    simulate(tuner, 1500, before)
    assert tuner.incumbents()[1] != OFF
    _, _, chosen = simulate(tuner, 400, steady(speeds(*[0.5] * 6)))
    assert sum(one != OFF for one in chosen) < 60
    assert tuner.incumbents()[1] == OFF


def test_speculation_is_left_where_plain_decoding_becomes_faster():
    """Which shows only because plain decoding is measured again and again."""
    tuner = StrategyTuner(ARMS)
    simulate(tuner, 1500, steady(speeds(2, 2, 2, 2, 2, 2)))

    def step_of(_, strategy):
        return (1, 0.2) if strategy == OFF else (2, 1.0)

    _, _, chosen = simulate(tuner, 2000, step_of)
    assert sum(one == OFF for one in chosen[400:]) > 1500


def test_equal_arms_do_not_flap():
    tuner = StrategyTuner(ARMS)
    _, _, chosen = simulate(tuner, 6000, steady(speeds(*[1.5] * 6), 0, spread=0.1))
    held = [one for one in chosen[3000:] if one != OFF]
    most = max(held.count(arm) for arm in ARMS)
    assert most > 0.6 * len(held) > 1500


def test_a_new_policy_ends_long_waits():
    tuner = StrategyTuner(ARMS)
    simulate(tuner, 4000, steady(speeds(*[0.5] * 6)))
    _, _, still = simulate(tuner, 200, steady(speeds(*[2.0] * 6)))
    for version in range(4):
        tuner.policy_changed(version)
    _, _, chosen = simulate(tuner, 600, steady(speeds(*[2.0] * 6)))
    assert sum(one != OFF for one in still) < 100 < sum(one != OFF for one in chosen)
    assert tuner.incumbents()[1] != OFF


def test_batch_sizes_are_told_apart():
    tuner = StrategyTuner(ARMS)

    def step_of(num_running):
        return lambda _, strategy: (
            num_running * (1 if strategy == OFF else 2),
            1.0 + (strategy != OFF) * num_running / 8,
        )

    for _ in range(1000):
        for num_running in (1, 6, 32):
            simulate(tuner, 1, step_of(num_running), num_running)
    found = tuner.incumbents()
    assert found[1] != OFF
    assert found[25] == OFF


def test_its_state_is_plain_and_goes_on_as_it_was():
    one = StrategyTuner(ARMS)
    simulate(one, 777, steady(speeds(1.2, 0.8, 1.1, 0.7, 2.0, 0.6)))
    other = StrategyTuner(ARMS)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    later = StrategyTuner(ARMS[:2])
    later.load_state(one.state())
    assert later.incumbents() == {1: OFF} or later.incumbents()[1] in ARMS[:2]
    _, _, chosen = simulate(other, 300, steady(speeds(1.2, 0.8, 1.1, 0.7, 2.0, 0.6)))
    assert chosen.count(ARMS[4]) > 150


def test_strategies_are_told_apart_by_their_names():
    with pytest.raises(ValueError, match="named twice"):
        StrategyTuner([ARMS[0], ARMS[0]])
    with pytest.raises(ValueError, match="named twice"):
        StrategyTuner([OFF])
