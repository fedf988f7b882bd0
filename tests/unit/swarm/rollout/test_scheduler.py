import math
import random
from collections import Counter
from dataclasses import replace

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.engine.base import SamplingParams
from swarm.rollout.groups import Group, Member
from swarm.rollout.scheduler import GroupScheduler
from swarm.seeds import fold_seed
from swarm.types import Completion, Segment

BUDGET = 24
SAMPLING = SamplingParams(BUDGET)
MAX_AGE = 3
PLAN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def seed_of(key, index):
    return fold_seed(7, *key, index)


def drive(scheduler, engine, *, num_rounds, num_groups, num_members, in_flight, updates, reload=lambda one: one):
    """Ask `num_groups` groups a round, keep `in_flight(round)` in flight, and ask no more in the end."""
    returned, at, ahead = [], {}, 0
    for index in range(1, num_rounds + 1):
        asked = list(at)
        want = min(max(num_groups, in_flight(index)), num_rounds * num_groups - len(returned))
        while len(asked) - len(returned) < want:
            key = (1 + ahead // num_groups, ahead % num_groups)
            scheduler.submit(key, (1, 2), [seed_of(key, member) for member in range(num_members)], SAMPLING)
            at[key] = index
            asked, ahead = list(at), ahead + 1
        groups, counts = scheduler.run(num_groups)
        assert engine.num_unfinished == 0
        assert len(groups) == num_groups
        assert counts.num_groups_in_flight == len(scheduler) + num_groups
        returned += [(group, index, at[group.key]) for group in groups]
        if updates(index):
            engine.load_policy(None, engine.policy_version + 1)
        scheduler = reload(scheduler)
    assert len(scheduler) == 0
    return returned


@pytest.mark.parametrize("order", ["submission", "arrival"])
@pytest.mark.parametrize("verifies", [True, False])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=3, max_size=12),
    num_slots=st.integers(1, 12), num_groups=st.integers(1, 4), num_members=st.integers(2, 4),
    factors=st.lists(st.floats(1, 4), min_size=1, max_size=5), change=st.sampled_from([0.0, 0.02, 0.3]),
    saved=st.booleans(), learning=st.booleans(),
)  # fmt: skip
@PLAN
def test_every_group_is_returned_once_whole_and_nothing_is_written_twice(
    simulated, order, verifies, lengths, num_slots, num_groups, num_members, factors, change, saved, learning
):
    engine = simulated(lambda seed: lengths[seed % len(lengths)], num_slots, change)
    scheduler = GroupScheduler(engine, order=order, max_age=MAX_AGE, verifies=verifies)

    def reload(old):
        """What a killed node finds on its disk."""
        if not saved:
            return old
        new = GroupScheduler(engine, order=order, max_age=MAX_AGE, verifies=verifies)
        new.load_state(msgpack.unpackb(msgpack.packb(old.state())), SAMPLING)
        return new

    num_rounds = 8
    returned = drive(
        scheduler, engine, num_rounds=num_rounds, num_groups=num_groups, num_members=num_members,
        in_flight=lambda index: math.ceil(factors[index % len(factors)] * num_groups),
        updates=lambda index: learning and index % 3 != 0, reload=reload,
    )  # fmt: skip
    assert len({group.key for group, _, _ in returned}) == len(returned) == num_rounds * num_groups
    most = math.ceil(max(factors)) + 1
    for group, index, submitted in returned:
        assert len(group.members) == num_members
        for place, member in enumerate(group.members):
            seed, done = member.seed, member.written
            assert seed == seed_of(group.key, place)
            assert len(done.token_ids) == min(lengths[seed % len(lengths)], BUDGET) == len(done.logprobs)
            assert done.finish_reason == ("stop" if lengths[seed % len(lengths)] <= BUDGET else "length")
            versions = [
                version for part in done.segments for version in [part.policy_version] * (part.end - part.start)
            ]
            assert len(versions) == len(done.token_ids)
            assert all(token == engine.token(seed, at, versions[at]) for at, token in enumerate(done.token_ids))
            if verifies:
                assert len(set(versions)) == 1, "what is returned has one author: the newest policy"
            elif not change or not learning:
                assert engine.generated[seed] == len(done.token_ids), "a token was written twice"
            if not verifies:
                assert engine.generated[seed] == len(done.token_ids)
        limit = most if order == "submission" else MAX_AGE + most
        assert index - submitted <= limit, "starved"
    if order == "submission":
        assert [group.key for group, _, _ in returned] == sorted(group.key for group, _, _ in returned)
    total = sum(len(m.written.token_ids) for group, _, _ in returned for m in group.members)
    cut = engine.stats.num_draft_tokens - engine.stats.num_draft_tokens_kept
    assert engine.stats.num_tokens_generated == sum(engine.generated.values())
    assert total <= engine.stats.num_tokens_generated <= total + cut


@pytest.fixture
def make(simulated):
    def build(lengths, *, order="arrival", verifies=False, num_slots=64, change=0.0, max_age=9):
        """Groups of one round, one list of lengths each."""
        by_seed = {seed_of((1, place), i): n for place, row in enumerate(lengths) for i, n in enumerate(row)}
        engine = simulated(lambda seed: by_seed[seed], num_slots, change)
        scheduler = GroupScheduler(engine, order=order, max_age=max_age, verifies=verifies)
        for place, row in enumerate(lengths):
            scheduler.submit((1, place), (1,), [seed_of((1, place), i) for i in range(len(row))], SAMPLING)
        return scheduler, engine

    return build


def places(groups):
    return [group.key[1] for group in groups]


def test_by_arrival_the_shortest_come_first_and_what_finished_with_them_comes_next(make):
    scheduler, engine = make([(9, 2), (3, 3), (1, 3), (2, 3), (20, 2)])
    groups, counts = scheduler.run(1)
    assert places(groups) == [1]
    assert (counts.num_steps, len(scheduler)) == (3, 4)
    groups, counts = scheduler.run(2)
    assert places(groups) == [2, 3]
    assert (counts.num_steps, counts.num_groups_recycled, counts.num_tokens_recycled) == (0, 2, 9)
    groups, counts = scheduler.run(1)
    assert (places(groups), counts.num_steps, counts.num_tokens_resumed) == ([0], 6, 6)
    assert engine.stats.num_tokens_generated == 11 + 6 + 9 + (9 + 2)


def test_what_finished_with_the_target_comes_next_also_where_a_new_policy_verifies_it(make):
    scheduler, engine = make([(9, 2), (3, 3), (1, 3), (2, 3), (1, 1)], verifies=True)
    assert places(scheduler.run(2)[0]) == [1, 4]
    assert places(scheduler.run(1)[0]) == [2]
    engine.load_policy(None, 1)
    groups, counts = scheduler.run(1)
    assert (places(groups), counts.num_steps) == ([3], 1)
    assert (counts.num_tokens_resumed, counts.num_tokens_cut) == (2 + 3 + 3, 0)
    assert counts.num_prompt_tokens_resumed == 2, "two groups with a prompt of one token"
    assert engine.stats.num_tokens_generated == (3 + 2) + 6 + 4 + 5 + 2 + 1, "nothing is written again"


def test_in_order_of_submission_the_oldest_are_waited_for_and_later_ones_are_written_ahead(make):
    scheduler, engine = make([(9, 2), (3, 3), (1, 3), (20, 3)], order="submission")
    groups, counts = scheduler.run(2)
    assert (places(groups), counts.num_steps) == ([0, 1], 9)
    groups, counts = scheduler.run(2)
    assert (places(groups), counts.num_steps) == ([2, 3], 11)
    assert engine.stats.num_tokens_generated == 44


def test_a_group_at_the_age_cap_is_waited_for(make):
    scheduler, _ = make([(22, 2), *((2, 2) for _ in range(8))], max_age=3)
    assert [places(scheduler.run(1)[0])[0] for _ in range(3)] == [1, 2, 3]
    groups, counts = scheduler.run(1)
    assert (places(groups), counts.num_steps) == ([0], 20)


def test_a_finished_sibling_waits_unread_until_its_group_is_due(make):
    scheduler, engine = make([(6, 6), (2, 20)], order="submission", verifies=True)
    scheduler.run(1)
    engine.load_policy(None, 1)
    groups, _ = scheduler.run(1)
    assert [part.policy_version for m in groups[0].members for part in m.written.segments] == [1, 1]
    assert engine.stats.num_draft_tokens == engine.stats.num_draft_tokens_kept == 2 + 6
    assert engine.stats.num_tokens_generated == 12 + 22


def test_kept_tokens_say_which_policy_wrote_them(make):
    scheduler, engine = make([(6, 6), (2, 20)], order="submission")
    scheduler.run(1)
    engine.load_policy(None, 4)
    groups, _ = scheduler.run(1)
    assert [m.written.segments for m in groups[0].members] == [
        (Segment(0, 0, 2),), (Segment(0, 0, 6), Segment(4, 6, 20)),
    ]  # fmt: skip


def group_with(*nums, sampling=SAMPLING):
    """A group of members that have so many tokens; negative: they are not finished."""
    members = [
        Member(0, Completion(0, (1,) * abs(n), (0.0,) * abs(n), (), "stop" if n > 0 else "aborted")) for n in nums
    ]
    return Group((1, 0), (1,), sampling, members, 0)


@pytest.mark.parametrize(
    ("nums", "expected"),
    [((8, 10, -3), 6), ((8, 2, -3), 5), ((2, -3), 3), ((-20,), 4), ((5, 6), 0), ((10, -1, -9), 9)],
)
def test_what_is_left_is_estimated_from_finished_siblings(nums, expected):
    assert group_with(*nums).expected_remaining() == expected


def test_the_longest_of_one_age_go_first(make):
    scheduler, engine = make([(2, 4, 24), (2, 20, 24), (1, 1, 1)], order="arrival", num_slots=9)
    scheduler.run(1)
    submitted = []
    engine.submit = lambda requests, submit=engine.submit: (submitted.extend(requests), submit(requests))
    for group in scheduler.groups:
        group.members[1].written = replace(group.members[1].written, finish_reason="stop")
    scheduler.groups[1].members[0].written = Completion(0, (5,) * 23, (0.0,) * 23, (Segment(0, 0, 23),), "stop")
    engine.verified = lambda request: True
    scheduler.run(1)
    assert [request.seed for request in submitted][:1] == [seed_of((1, 1), 2)]


def test_more_groups_than_there_are_cannot_be_returned(make):
    scheduler, _ = make([(1, 1)])
    with pytest.raises(ValueError, match="2 groups are to be returned"):
        scheduler.run(2)
    with pytest.raises(ValueError, match="submitted already"):
        scheduler.submit((1, 0), (1,), [1], SAMPLING)


def test_an_engine_that_verifies_nothing_is_not_asked_to(simulated):
    class Plain(simulated):
        verifies_drafts = False

    with pytest.raises(ValueError, match="cannot verify"):
        GroupScheduler(Plain(lambda seed: 1, 1), order="arrival", max_age=1, verifies=True)


def test_random_lengths_use_the_slots_that_a_tail_leaves(simulated):
    rng = random.Random(3)
    lengths = [min(BUDGET, 1 + int(rng.lognormvariate(1.2, 0.9))) for _ in range(97)]
    steps = Counter()
    for factor in (1, 3):
        engine = simulated(lambda seed: lengths[seed % 97], 32)
        scheduler = GroupScheduler(engine, order="submission", max_age=9, verifies=True)
        drive(
            scheduler, engine, num_rounds=30, num_groups=4, num_members=4,
            in_flight=lambda index, factor=factor: 4 * factor, updates=lambda index: True,
        )  # fmt: skip
        steps[factor] = engine.stats.num_steps
    assert steps[3] < 0.6 * steps[1]


def test_the_engine_gets_what_it_has_slots_for(make):
    """What waits behind the slots is neither given nor counted as resumed; a round that is whole gives nothing."""
    scheduler, engine = make([(3, 9), (2, 2), (9, 9), (9, 9)], order="submission", num_slots=3)
    held = []
    engine.submit = lambda requests, submit=engine.submit: (submit(requests), held.append(engine.num_unfinished))
    groups, counts = scheduler.run(1)
    assert (places(groups), max(held)) == ([0], 3)
    assert [group.num_tokens for group in scheduler.groups] == [4, 11, 0], "a slot was left idle"
    held.clear()
    groups, counts = scheduler.run(1)
    assert (places(groups), counts.num_steps, counts.num_tokens_resumed, held) == ([1], 0, 0, [])
    groups, counts = scheduler.run(1)
    assert (places(groups), counts.num_tokens_resumed) == ([2], 11)
