"""Which groups become a batch, how they are counted, and that the choice is uniform."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from protocol.messages import TaskRef
from swarm.config import SapoConfig
from swarm.sapo import build_batch, damped, num_own_groups, num_to_fill, share_of
from swarm.types import Completion, RolloutGroup, Segment, Task


def make_group(number, rewards, lengths=None):
    lengths = lengths or [2] * len(rewards)
    completions = tuple(
        Completion(i, tuple(range(n)), (-0.5,) * n, (Segment(0, 0, n),), "stop") for i, n in enumerate(lengths)
    )
    task = Task(TaskRef("test", "0" * 32, 1, number), f"question {number}")
    return RolloutGroup(task, (number,), completions, ("x",) * len(rewards), tuple(rewards))


MIXED, EQUAL = (1.0, 0.0), (1.0, 1.0)


def prompts(batch):
    return [group.prompt_ids[0] for group in batch.groups]


def test_own_groups_keep_behavior_logprobs_and_external_ones_have_none():
    config = SapoConfig(num_local=1, num_external=1, external_negative_weight=1)
    batch = build_batch([make_group(1, MIXED)], [make_group(2, MIXED)], config, random.Random(0))
    own, external = batch.groups
    assert own.behavior_logprobs == ((-0.5, -0.5), (-0.5, -0.5))
    assert external.behavior_logprobs == (None, None)
    assert own.advantages == external.advantages == (1.0, -1.0)


def test_own_zero_advantage_groups_are_chosen_then_left_out_and_counted():
    config = SapoConfig(num_local=2, num_external=0)
    batch = build_batch([make_group(1, EQUAL), make_group(2, MIXED)], [], config, random.Random(0))
    assert prompts(batch) == [2]
    assert batch.num_own_zero_advantage == 1


def test_external_zero_advantage_groups_are_discarded_before_the_choice():
    external = [make_group(number, EQUAL) for number in range(50)] + [make_group(99, MIXED)]
    batch = build_batch([], external, SapoConfig(num_external=1), random.Random(0))
    assert prompts(batch) == [99]
    assert batch.num_external_zero_advantage == 50
    assert batch.num_external_missing == 0


def test_missing_external_groups_are_counted_and_replaced_by_own_ones():
    own = [make_group(number, MIXED) for number in range(8)]
    config = SapoConfig(num_local=4, num_external=4)
    external = [make_group(number, MIXED) for number in (20, 21, 22, 23)]
    for num_external, missing in ((0, 4), (1, 3), (4, 0)):
        batch = build_batch(own, external[:num_external], config, random.Random(0))
        assert len(batch.groups) == 8
        assert sum(number < 20 for number in prompts(batch)) == num_own_groups(config, num_external) == 4 + missing
        assert batch.num_external_missing == missing
    assert len(build_batch(own[:5], [], config, random.Random(0)).groups) == 5, "there may be fewer"


def test_missing_external_groups_may_leave_the_batch_smaller():
    own = [make_group(number, MIXED) for number in range(8)]
    config = SapoConfig(num_local=4, num_external=4, replace_missing=False)
    external = [make_group(number, MIXED) for number in (20, 21, 22, 23, 24, 25)]
    assert [num_own_groups(config, num_external) for num_external in (0, 1, 4, 6)] == [4, 4, 4, 2]
    batch = build_batch(own, external[:1], config, random.Random(0))
    assert (len(batch.groups), batch.num_external_missing) == (5, 3)
    filled = build_batch(own[:2], external, config, random.Random(0))
    assert (len(filled.groups), filled.num_external_missing) == (8, 0)


def test_an_external_group_that_turns_out_useless_is_missing():
    own = [make_group(number, MIXED) for number in range(8)]
    config = SapoConfig(num_local=1, num_external=1)
    batch = build_batch(own, [make_group(20, EQUAL)], config, random.Random(0))
    assert (len(batch.groups), batch.num_external_missing, batch.num_external_zero_advantage) == (2, 1, 1)


def test_choice_of_external_groups_is_uniform():
    external = [make_group(number, MIXED) for number in range(6)]
    rng = random.Random(3)
    config = SapoConfig(num_external=2, fill=False)
    counts = Counter(number for _ in range(3000) for number in prompts(build_batch([], external, config, rng)))
    # Each is drawn with probability 1/3: mean 1000, standard deviation 26; five of them is 130.
    assert set(counts) == set(range(6))
    assert all(abs(count - 1000) < 130 for count in counts.values())


def test_same_rng_same_batch():
    external = [make_group(number, MIXED) for number in range(20)]
    config = SapoConfig(num_external=5)
    first, second = (build_batch([], external, config, random.Random(7)) for _ in range(2))
    assert first == second


def test_empty_completion_counts_for_the_advantage_only():
    batch = build_batch([make_group(1, (1.0, 0.0, 0.0), lengths=[3, 0, 2])], [], SapoConfig(), random.Random(0))
    assert [len(ids) for ids in batch.groups[0].completion_ids] == [3, 2]
    assert batch.groups[0].advantages == pytest.approx((2**0.5, -(2**-0.5)))


def test_unscored_group_is_refused():
    group = make_group(1, ())
    unscored = RolloutGroup(group.task, (1,), make_group(1, MIXED).completions, ("a", "b"))
    with pytest.raises(ValueError, match="0 rewards"):
        build_batch([unscored], [], SapoConfig(), random.Random(0))


def test_groups_of_others_take_the_places_of_own_ones_without_an_advantage():
    config = SapoConfig(num_local=4, num_external=2, fill=True)
    own = [make_group(number, MIXED if number == 2 else EQUAL) for number in range(4)]
    external = [make_group(number, MIXED) for number in range(20, 27)]
    assert num_to_fill(own, external[:2], config) == 3
    batch = build_batch(own, external, config, random.Random(0))
    assert prompts(batch)[0] == 2
    assert len(batch.groups) == 6
    assert batch.num_own_zero_advantage == 3
    assert batch.num_external_missing == 0
    few = build_batch(own, external[:1], config, random.Random(0))
    assert (len(few.groups), few.num_external_missing) == (2, 1)


def test_useful_own_groups_stay_when_there_are_enough_of_them():
    config = SapoConfig(num_local=2, num_external=2, fill=True)
    own = [make_group(number, MIXED) for number in range(2)]
    assert num_to_fill(own, [make_group(20, MIXED)] * 2, config) == 0
    batch = build_batch(own, [make_group(number, MIXED) for number in (20, 21, 22)], config, random.Random(0))
    assert prompts(batch)[:2] == [0, 1]
    assert len(batch.groups) == 4


@pytest.mark.parametrize("changed", [{"fill": False}, {"num_external": 0}])
def test_nothing_is_filled_where_it_is_off_or_nobody_is_asked(changed):
    config = SapoConfig(num_local=2, num_external=2).model_copy(update=changed)
    assert num_to_fill([make_group(1, EQUAL)], [], config) == 0


@pytest.mark.parametrize(("own", "external"), [(1.0, 0.25), (0.5, 1.0)])
def test_only_completions_that_are_worse_than_their_siblings_weigh_less(own, external):
    weights = {"own_negative_weight": own, "external_negative_weight": external}
    config = SapoConfig(num_local=1, num_external=1, **weights)
    batch = build_batch([make_group(1, MIXED)], [make_group(2, MIXED)], config, random.Random(0))
    assert [group.advantages for group in batch.groups] == [(1.0, -own), (1.0, -external)]


def test_without_the_filter_own_groups_without_an_advantage_weigh_in_the_mean():
    config = SapoConfig(num_local=2, own_filter=False)
    batch = build_batch([make_group(1, EQUAL), make_group(2, MIXED)], [], config, random.Random(0))
    assert [group.advantages for group in batch.groups] == [(0.0, 0.0), (1.0, -1.0)]


WRONG, RIGHT = (0.0, 0.0), (1.0, 1.0)


def test_answers_to_a_question_that_was_asked_again_are_one_group_with_joint_advantages():
    config = SapoConfig(num_local=2, num_external=2, fill=False, external_negative_weight=0.5)
    own = [make_group(1, MIXED), make_group(20, WRONG)]
    external = [make_group(20, RIGHT), make_group(21, MIXED)]
    batch = build_batch(own, external, config, random.Random(0), again={own[1].task.ref})
    assert prompts(batch) == [1, 20, 21]
    broad = batch.groups[1]
    assert broad.advantages == (-1.0, -1.0, 1.0, 1.0), "alone, neither of the two would have had any"
    assert broad.behavior_logprobs == ((-0.5, -0.5), (-0.5, -0.5), None, None)
    assert (batch.num_own_zero_advantage, batch.num_external_missing) == (0, 0)
    assert batch.num_completions == 8
    again = {own[1].task.ref}
    tapered = build_batch([make_group(20, RIGHT)], [make_group(20, WRONG)], config, random.Random(0), again=again)
    assert tapered.groups[0].advantages == (1.0, 1.0, -0.5, -0.5)


def test_equal_questions_that_nobody_asked_again_stay_apart():
    config = SapoConfig(num_local=1, num_external=1, fill=False)
    batch = build_batch([make_group(1, MIXED)], [make_group(1, MIXED)], config, random.Random(0))
    assert prompts(batch) == [1, 1]


def test_a_broad_group_takes_the_places_of_an_own_and_of_each_external_one():
    config = SapoConfig(num_local=2, num_external=2, fill=True)
    own = [make_group(1, WRONG), make_group(20, WRONG)]
    external = [make_group(20, MIXED), make_group(21, MIXED)]
    again = {own[1].task.ref}
    assert num_to_fill(own, external, config, again) == 1, "in the place of question 1"
    external += [make_group(number, MIXED) for number in (22, 23)]
    batch = build_batch(own, external, config, random.Random(0), again=again)
    assert (len(batch.groups), prompts(batch)[0], batch.num_external_missing) == (3, 20, 0)
    assert batch.num_completions == 8


def test_masked_tokens_of_a_broad_group_are_those_of_the_own_completions():
    config = SapoConfig(num_local=1, num_external=1)
    own = replace(make_group(20, MIXED), num_masked=(1, 0))
    batch = build_batch([own], [make_group(20, MIXED)], config, random.Random(0), again={own.task.ref})
    assert batch.groups[0].num_masked == (1, 0, 0, 0)


def test_a_share_of_a_count_is_right_on_average_and_whole_numbers_are_exact():
    rng = random.Random(0)
    assert [share_of(4, share, rng) for share in (0.0, 0.5, 1.0)] == [0, 2, 4]
    drawn = Counter(share_of(4, 0.9, rng) for _ in range(4000))
    assert set(drawn) == {3, 4}
    assert drawn[4] / 4000 == pytest.approx(0.6, abs=0.03)


def test_own_groups_take_the_places_of_those_of_others_that_a_damped_round_does_without():
    config = SapoConfig(num_local=3, num_external=5, replace_missing=False)
    rng = random.Random(0)
    assert damped(config, 1.0, rng) == config
    for share, shape in ((0.4, (6, 2)), (0.0, (8, 0))):
        found = damped(config, share, rng)
        assert (found.num_local, found.num_external) == shape
        assert num_own_groups(found, num_external=0) == found.num_local
