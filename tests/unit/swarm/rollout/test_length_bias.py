"""Over any window, the lengths that enter training have the distribution that a synchronous run gives.

A two-sample Kolmogorov-Smirnov test on ten thousand completions, against completions that a synchronous run wrote for
other prompts. Plain APRIL, which returns what is whole first, fails the same test.
"""

import math
import random
from functools import cache

import pytest

from swarm.engine.base import SamplingParams
from swarm.rollout.scheduler import GroupScheduler
from swarm.seeds import fold_seed

MEDIAN, CAP = 8, 16 * 8
NUM_GROUPS, NUM_MEMBERS, NUM_RUNS, WINDOW = 8, 4, 160, 2
CRITICAL = 1.95  # of a false alarm in a thousand, for two samples of n: CRITICAL * sqrt(2 / n)


@cache
def length_of(seed: int) -> int:
    """Log-normal, with a 99th percentile of eight times the median."""
    return min(CAP, max(1, round(MEDIAN * math.exp(math.log(8) / 2.326 * random.Random(seed).gauss(0, 1)))))


def lengths(simulated, salt, windows, *, order="submission", over=1.0, verifies=True, num_slots=32):
    """What enters training in each window of rounds, over many runs. The policy is new in each round."""
    found = {window: [] for window in windows}
    for run in range(NUM_RUNS):
        engine = simulated(length_of, num_slots)
        engine.submit = lambda requests, engine=engine: engine.waiting.extend(requests)  # unchecked, for speed
        scheduler = GroupScheduler(engine, order=order, max_age=6, verifies=verifies)
        asked = 0
        for index in range(max(last for _, last in windows)):
            while len(scheduler) < over * NUM_GROUPS:
                key = (1 + asked // NUM_GROUPS, asked % NUM_GROUPS)
                seeds = [fold_seed(salt, run, *key, member) for member in range(NUM_MEMBERS)]
                scheduler.submit(key, (1,), seeds, SamplingParams(CAP))
                asked += 1
            groups, _ = scheduler.run(NUM_GROUPS)
            engine.load_policy(None, index + 1)
            new = [len(member.written.token_ids) for group in groups for member in group.members]
            for first, last in windows:
                if first <= index < last:
                    found[first, last] += new
    return found


def distance(one, other):
    """The largest difference of two empirical distribution functions."""
    values = sorted({*one, *other})
    first, second = sorted(one), sorted(other)
    i = j = 0
    most = 0.0
    for value in values:
        while i < len(first) and first[i] <= value:
            i += 1
        while j < len(second) and second[j] <= value:
            j += 1
        most = max(most, abs(i / len(first) - j / len(second)))
    return most


WINDOWS = ((0, WINDOW), (2, 2 + WINDOW))
LIMIT = CRITICAL * math.sqrt(2 / (NUM_RUNS * WINDOW * NUM_GROUPS * NUM_MEMBERS))


@pytest.fixture(scope="module")
def synchronous(simulated):
    found = lengths(simulated, 1, ((0, WINDOW),))[0, WINDOW]
    assert len(found) >= 10_000
    ordered = sorted(found)
    assert ordered[int(0.99 * len(found))] >= 7.5 * ordered[len(found) // 2], "a long tail"
    return found


@pytest.mark.parametrize("verifies", [True, False])
def test_in_order_of_submission_no_window_is_biased(simulated, synchronous, verifies):
    for window, found in lengths(simulated, 2, WINDOWS, over=2.0, verifies=verifies).items():
        assert distance(found, synchronous) < LIMIT, window


def test_control_by_arrival_short_completions_enter_early(simulated, synchronous):
    found = lengths(simulated, 2, WINDOWS, order="arrival", over=2.0, verifies=False)
    first = found[0, WINDOW]
    assert distance(first, synchronous) > LIMIT
    assert sum(first) / len(first) < 0.95 * sum(synchronous) / len(synchronous)


def test_the_order_of_submission_gives_the_very_batches_of_a_synchronous_run(simulated):
    same = lengths(simulated, 5, WINDOWS)
    assert lengths(simulated, 5, WINDOWS, over=2.5) == same
    assert lengths(simulated, 5, WINDOWS, over=1.5, num_slots=9) == same
