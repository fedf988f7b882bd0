import math
import random
from dataclasses import replace
from itertools import pairwise

import msgpack
import pytest

from swarm.engine.base import SamplingParams
from swarm.rollout.forecast import Costs
from swarm.rollout.over_provision import OverProvision, saved_tokens
from swarm.rollout.scheduler import GroupScheduler, RunCounts
from swarm.seeds import fold_seed

COSTS = Costs(step=20.0, prefill=1.0)
MOST, CAP = 6.0, 224


def chooser(fixed=0.0, most=MOST, costs=COSTS, *, num_slots=64, verifies=True, by_arrival=False):
    return OverProvision(fixed, most, costs, num_slots=num_slots, verifies=verifies, by_arrival=by_arrival)


def tail(seed):
    """Log-normal: the 99th percentile is 8.3 medians."""
    return min(CAP, max(1, round(14 * math.exp(0.91 * random.Random(seed).gauss(0, 1)))))


class Rounds:
    """Rounds of the real scheduler over the simulated engine; `cost` is what they took, by `costs`."""

    def __init__(
        self, simulated, over, shape=(4, 4), *, length=tail, num_slots=64, change=0.0, verifies=True, costs=COSTS
    ):
        (self.num_groups, self.num_members), self.over, self.costs = shape, over, costs
        self.engine = simulated(length, num_slots, change)
        self.engine.submit = self.engine.waiting.extend  # unchecked, for speed
        self.scheduler = GroupScheduler(self.engine, order="submission", max_age=4, verifies=verifies)
        self.asked = self.num_rounds = 0
        self.cost = 0.0
        self.factors = []

    def play(self, num_rounds):
        for _ in range(num_rounds):
            self.factors.append(self.over.factor)
            while len(self.scheduler) < self.over.factor * self.num_groups:
                seeds = [fold_seed(1, self.asked, member) for member in range(self.num_members)]
                self.scheduler.submit((self.asked, 0), (1,) * 8, seeds, SamplingParams(CAP))
                self.asked += 1
            groups, counts = self.scheduler.run(self.num_groups)
            lengths = [[member.num_tokens for member in group.members] for group in groups]
            self.over.observe(counts, lengths, 8 * len(groups))
            given_back = counts.num_tokens_resumed + counts.num_prompt_tokens_resumed
            self.cost += self.costs.step * counts.num_steps + counts.num_tokens_generated
            self.cost += self.costs.prefill * given_back
            self.num_rounds += 1
            self.engine.load_policy(None, self.num_rounds)
        return self


def times_as_fast(simulated, num_rounds, over=None, **settings):
    """Synchronous cost over the cost with what `over` chooses."""
    plain = Rounds(simulated, chooser(1.0), **settings).play(num_rounds)
    return plain.cost / Rounds(simulated, over or chooser(), **settings).play(num_rounds).cost


def test_what_a_run_saved_is_steps_less_verification():
    costs = Costs(step=10.0, prefill=0.5)
    counts = RunCounts(num_steps=60, num_tokens_resumed=100, num_tokens_cut=30)
    assert saved_tokens(counts, 100, costs) == 400 - 30 - 50
    counts = replace(counts, num_prompt_tokens_resumed=40)
    assert saved_tokens(counts, 100, costs) == 400 - 30 - 50 - 20


def test_it_goes_to_what_pays_and_gains_nearly_what_the_best_factor_gains(simulated):
    for shape, num_rounds in (((2, 4), 60), ((4, 4), 30)):
        rounds = Rounds(simulated, chooser(), shape).play(num_rounds)
        assert rounds.factors[0] == 1.0
        assert all(after <= 1.5 * before for before, after in pairwise(rounds.factors)), "a rung at a time"
        assert rounds.factors[-1] >= 3
        plain = Rounds(simulated, chooser(1.0), shape).play(num_rounds).cost
        best = min(Rounds(simulated, chooser(factor), shape).play(num_rounds).cost for factor in (3.0, 4.0))
        assert plain / best > 1.3
        assert plain / rounds.cost > 1.25


def constant(seed):
    return 60


def test_without_a_tail_nothing_is_tried(simulated):
    assert set(Rounds(simulated, chooser(), length=constant).play(60).factors) == {1.0}


@pytest.mark.parametrize("num_rounds", [12, 30])
@pytest.mark.parametrize(
    "settings",
    [
        {"shape": (8, 8)},
        {"shape": (8, 8), "costs": Costs(20.0, 1.4)},
        {"shape": (4, 4), "change": 0.02},
        {"shape": (4, 4), "change": 0.1},
        {"shape": (2, 8), "num_slots": 12},
        {"length": constant},
        {"costs": Costs(2.0, 1.2)},
    ],
)
def test_it_never_loses_more_than_a_little(simulated, settings, num_rounds):
    over = chooser(costs=settings.get("costs", COSTS), num_slots=settings.get("num_slots", 64))
    assert times_as_fast(simulated, num_rounds, over, **settings) > 0.97


def test_a_policy_that_jumps_ends_it(simulated):
    over = chooser()
    rounds = Rounds(simulated, over).play(20)
    assert over.factor > 1
    rounds.engine.change = 0.5
    before = rounds.cost
    rounds.play(40)
    assert sum(factor > 1 for factor in rounds.factors[30:]) < 10
    plain = Rounds(simulated, chooser(1.0)).play(20)
    begin = plain.cost
    assert (plain.play(40).cost - begin) / (rounds.cost - before) > 0.92, "what was written ahead is lost, once"


def test_what_the_forecast_gets_wrong_is_tried_rarely():
    """It says that steps are saved, and none are: the ledger ends it."""
    over = chooser()
    factors = []
    for index in range(400):
        factors.append(over.factor)
        lengths = [[tail(16 * index + 4 * at + one) for one in range(4)] for at in range(4)]
        longest = max(map(max, lengths))
        ahead = over.factor > 1
        counts = RunCounts(num_steps=longest, num_tokens_resumed=300 if ahead else 0)
        over.observe(counts, lengths, 32)
    assert max(factors) > 1
    assert sum(factor > 1 for factor in factors) < 30


def test_a_fixed_factor_stays(simulated):
    assert set(Rounds(simulated, chooser(1.7), change=0.5).play(20).factors) == {1.7}


@pytest.mark.parametrize("kill_at", [1, 3, 20, 37])
def test_a_saved_state_goes_on_alike(kill_at):
    def observe(over, begin, end):
        factors = []
        for index in range(begin, end):
            factors.append(over.factor)
            lengths = [[tail(16 * index + 4 * at + one) for one in range(4)] for at in range(4)]
            longest = max(map(max, lengths))
            steps = round(longest / (1 + 0.7 * (over.factor - 1))) if index < 25 else longest
            counts = RunCounts(num_steps=steps, num_tokens_resumed=100, num_tokens_cut=3, num_drafts_cut=1)
            over.observe(counts, lengths, 32)
        return factors

    expected = observe(chooser(), 0, 50)
    assert len(set(expected)) > 3
    first, second = chooser(), chooser()
    before = observe(first, 0, kill_at)
    second.load_state(msgpack.unpackb(msgpack.packb(first.state())))
    assert before + observe(second, kill_at, 50) == expected


def test_the_maximum_may_be_lowered_on_resume(simulated):
    over = chooser()
    Rounds(simulated, over).play(20)
    assert over.factor > 2
    lower = chooser(most=1.5)
    lower.load_state(over.state())
    assert max(Rounds(simulated, lower).play(20).factors) <= 1.5
