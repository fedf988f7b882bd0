"""Advantages against arithmetic done by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.advantage import group_advantages
from swarm.config import SapoConfig


def test_group_std_by_hand():
    # mean 1/4; squared deviations 9/16 + 3 * 1/16 = 12/16, variance 3/16, deviation sqrt(3)/4
    expected = (math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3))
    assert group_advantages([1.0, 0.0, 0.0, 0.0], SapoConfig()) == pytest.approx(expected)


def test_group_mean_by_hand():
    config = SapoConfig(advantage="group_mean")
    assert group_advantages([1.0, 0.0, 0.0, 0.0], config) == pytest.approx((0.75, -0.25, -0.25, -0.25))


@pytest.mark.parametrize("reward", [0.0, 0.01, 0.1, 1 / 3, 1.0])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_equal_rewards_give_exactly_zero(reward, floor):
    # The mean of eight 0.01 or 0.1 is not always the number itself: rounding must not become a signal.
    config = SapoConfig(min_reward_spread=floor)
    assert group_advantages([reward] * 8, config) == (0.0,) * 8


def test_rounding_noise_between_rewards_gives_exactly_zero():
    assert group_advantages([0.1 + 0.2, 0.3] * 4, SapoConfig()) == (0.0,) * 8


def test_spread_at_the_floor_counts():
    config = SapoConfig(min_reward_spread=0.25)
    assert group_advantages([0.0, 0.5], config) == (-1.0, 1.0)
    assert group_advantages([0.0, 0.4999], config) == (0.0, 0.0)


def test_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        group_advantages([0.0, math.nan], SapoConfig())


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=16))
def test_advantages_are_standardised(rewards):
    advantages = group_advantages(rewards, SapoConfig())
    assert sum(advantages) == pytest.approx(0.0, abs=1e-9)
    expected = 0.0 if len(set(rewards)) == 1 else 1.0
    assert sum(a * a for a in advantages) / len(advantages) == pytest.approx(expected)
