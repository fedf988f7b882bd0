"""What a group of others is worth, by hand."""

import pytest

from protocol.messages import TaskRef
from swarm.learning_value import LearningValue
from swarm.types import RolloutGroup, Task


def ref(index, source="numbers"):
    return TaskRef(source, "0" * 32, 1, index)


def own(index, rewards, source="numbers"):
    return RolloutGroup(Task(ref(index, source), "?"), (1,), (), (), tuple(rewards))


HALF, NONE, ALL = (1.0, 0.0) * 4, (0.0,) * 8, (1.0,) * 8


def test_a_group_of_which_half_is_right_is_worth_most():
    value = LearningValue(0.0)
    assert value.weight("a", ref(1), HALF) == 1
    # Nothing of its own is known yet: four completions of half reward stand beside the eight of the group.
    assert value.weight("a", ref(1), NONE) == pytest.approx(4 * (1 / 6) * (5 / 6))
    assert value.weight("a", ref(1), ALL) == pytest.approx(value.weight("a", ref(1), NONE))


def test_what_this_node_gets_itself_moves_what_is_hard_for_it_and_only_in_that_source():
    value = LearningValue(0.0)
    value.observe_own([own(index, NONE) for index in range(3)])
    assert value.weight("a", ref(9), HALF) == pytest.approx(4 * (4 / 12) * (8 / 12))
    assert value.weight("a", ref(9, "words"), HALF) == 1
    for _ in range(400):
        value.observe_own([own(0, ALL)])
    assert value.weight("a", ref(9), HALF) == pytest.approx(4 * (8 / 12) * (4 / 12), rel=1e-3), "what it gets lately"


def test_a_question_is_worth_less_each_time_it_is_trained_on_until_that_is_long_ago():
    value = LearningValue(0.0, max_questions=3)
    value.observe_own([own(7, HALF)])
    assert value.weight("a", ref(7), HALF) == 1 / 2
    value.observe_drawn("a", ref(7), HALF)
    assert value.weight("a", ref(7), HALF) == 1 / 3
    value.observe_own([own(8, HALF), own(9, HALF)])
    assert value.weight("a", ref(7), HALF) == 1 / 2
    value.observe_own([own(10, HALF)])
    assert value.weight("a", ref(7), HALF) == 1


def test_an_author_counts_by_what_it_gave_against_the_best_and_a_new_one_is_average():
    value = LearningValue(0.0)
    value.observe_drawn("good", ref(1), HALF)
    value.observe_drawn("poor", ref(2), NONE)
    poor = 4 * (1 / 6) * (5 / 6)
    assert value.weight("good", ref(3), HALF) == 1
    assert value.weight("poor", ref(3), HALF) == pytest.approx(poor)
    assert value.weight("new", ref(3), HALF) == pytest.approx((1 + poor) / 2)
    for number in range(200):
        value.observe_drawn("poor", ref(100 + number), HALF)
    assert value.weight("poor", ref(3), HALF) == pytest.approx(1, rel=1e-3), "it can mend its ways"


def test_the_authors_that_are_remembered_are_bounded():
    value = LearningValue(0.0, max_authors=2)
    for author in ("gone", "good", "poor"):
        value.observe_drawn(author, ref(ord(author[0])), NONE if author != "good" else HALF)
    value.observe_drawn("good", ref(1000), HALF)
    assert value.weight("gone", ref(3), HALF) == value.weight("new", ref(3), HALF)


def test_the_uniform_share_is_what_the_worthless_weigh():
    value = LearningValue(0.25)
    value.observe_own([own(1, NONE)])
    assert value.weight("a", ref(2), NONE) == 0.25
    assert value.weight("a", ref(2, "words"), HALF) == 1
    assert LearningValue(1.0).weight("a", ref(2), NONE) == 1
