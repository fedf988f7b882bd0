"""Work beside the engine: it stays away where it slows the engine, and only there."""

import random

import pytest

from swarm.drafting.beside import Beside


def play(slower: float, *, num_spans: int = 2000, spread: float = 0.0, seed: int = 0) -> tuple[float, float]:
    """Run spans that take so much longer with other work; return the share that had it, and the time lost."""
    beside, rng, num_beside, lost_s, total_s = Beside(), random.Random(seed), 0, 0.0, 0.0
    for _ in range(num_spans):
        has_work = beside.begin()
        plain_s = 100 * 0.001 * rng.lognormvariate(0.0, spread)
        span_s = plain_s * (slower if has_work else 1.0)
        beside.end(has_work, 100, span_s)
        num_beside += has_work
        lost_s += span_s - plain_s
        total_s += plain_s
    return num_beside / num_spans, lost_s / total_s


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3])
def test_work_that_costs_nothing_goes_on(spread):
    share, lost = play(1.0, spread=spread)
    assert share > 0.4
    assert lost == 0.0


@pytest.mark.parametrize("slower", [1.2, 2.0, 10.0])
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_work_that_slows_the_engine_stays_away(slower, spread):
    share, lost = play(slower, spread=spread)
    assert share < 0.05
    assert lost < 0.02 * slower


def test_work_that_comes_to_cost_something_is_sent_away():
    beside, num_beside = Beside(), [0, 0]
    for span in range(400):
        has_work = beside.begin()
        late = span >= 200
        beside.end(has_work, 50, 0.05 * (1.5 if has_work and late else 1.0))
        num_beside[late] += has_work
    assert num_beside[0] > 150
    assert num_beside[1] < 40


def test_it_is_never_the_first_and_a_span_without_tokens_says_nothing():
    beside = Beside()
    for _ in range(20):
        assert not beside.begin()
        beside.end(False, 0, 1.0)
    for _ in range(4):
        assert not beside.begin()
        beside.end(False, 10, 1.0)
    assert beside.begin()
