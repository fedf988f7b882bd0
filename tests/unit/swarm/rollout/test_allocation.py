import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import TaskRef
from swarm.rollout.allocation import allocate, later_spans
from swarm.types import Completion, RolloutGroup, Task


def group(*right):
    completions = tuple(Completion(index, (index,), (-0.5,), (), "stop") for index in range(len(right)))
    return RolloutGroup(Task(TaskRef("t", "0" * 32, 1, 2), "?"), (1,), completions, ("",) * len(right), right)


def test_hard_questions_with_some_success_get_most_and_those_without_any_and_the_solved_nothing():
    rewards = [(1, 1, 1, 1), (1, 0, 0, 0), (1, 1, 1, 0), (0, 0, 0, 0)]
    assert allocate(rewards, 16, 32) == [0, 12, 4, 0]


def test_questions_without_success_are_next_evenly_and_the_solved_last():
    rewards = [(1, 1), (0, 1), (0, 0), (0, 0)]
    assert allocate(rewards, 9, 8) == [0, 6, 2, 1]
    assert allocate(rewards, 18, 8) == [0, 6, 6, 6]
    assert allocate(rewards, 20, 8) == [2, 6, 6, 6]
    assert allocate([(1, 1), (1, 1)], 5, 8) == [3, 2]


def test_rewards_that_are_the_same_and_not_full_are_no_success_to_learn_from():
    assert allocate([(0.5, 0.5), (0.5, 1.0)], 4, 8) == [0, 4]


def test_more_than_fits_is_refused():
    with pytest.raises(ValueError, match="9 more completions for 2 questions are over 6"):
        allocate([(1, 0), (0, 0)], 9, 6)


@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=2, max_size=2), min_size=1, max_size=10),
    size=st.integers(3, 9),
)
def test_the_round_has_as_many_completions_as_without(rewards, size):
    first = [group(*one) for one in rewards]
    spans = later_spans(first, size)
    assert sum(map(len, spans)) == (size - 2) * len(first)
    assert all(span.start == 2 and 2 + len(span) <= 4 * size for span in spans)
    mixed = [len(span) for span, one in zip(spans, rewards, strict=True) if min(one) < max(one)]
    solved = [len(span) for span, one in zip(spans, rewards, strict=True) if min(one) == 1]
    if any(solved):
        assert all(2 + num == 4 * size for num in mixed)


def test_groups_are_joined_only_where_they_answer_one_question():
    joined = group(1.0, 0.0).with_more(group(0.0))
    assert (len(joined.completions), len(joined.texts), joined.rewards) == (3, 3, (1.0, 0.0, 0.0))
    other = RolloutGroup(Task(TaskRef("t", "0" * 32, 1, 3), "?"), (1,), (), ())
    with pytest.raises(ValueError, match="of one task"):
        group(1.0).with_more(other)
