"""The reserve follows use."""

import pytest

from protocol.demand import HALF_LIFE_S, LEAD_S, MAX_RESERVE_FACTOR, Demand


def used(num_groups, every_s, seconds=60.0, min_reserve=5):
    demand, now_s = Demand(min_reserve), 1000.0
    while now_s < 1000.0 + seconds:
        demand.asked(num_groups, now_s)
        now_s += every_s
    return demand, now_s


@pytest.mark.parametrize(("num_groups", "every_s"), [(4, 15.0), (8, 30.0), (0, 1.0)])
def test_slow_rounds_need_no_more_than_what_is_set(num_groups, every_s):
    demand, now_s = used(num_groups, every_s)
    assert demand.reserve(now_s) == 5


def test_quick_rounds_have_some_seconds_of_use_ready():
    demand, now_s = used(4, 0.25)
    assert demand.reserve(now_s) == pytest.approx(LEAD_S * 16, rel=0.15)


def test_it_falls_again_when_rounds_become_slow():
    demand, now_s = used(4, 0.25)
    assert demand.reserve(now_s + HALF_LIFE_S) == pytest.approx(LEAD_S * 8, rel=0.15)
    assert demand.reserve(now_s + 20 * HALF_LIFE_S) == 5


def test_a_burst_raises_it_only_so_far():
    demand, now_s = used(10_000, 0.01, seconds=5.0)
    assert demand.reserve(now_s) == MAX_RESERVE_FACTOR * 5


def test_a_clock_that_goes_back_changes_nothing():
    demand, now_s = used(4, 0.25)
    before = demand.reserve(now_s)
    demand.asked(0, now_s - 50)
    assert demand.reserve(now_s) == before
