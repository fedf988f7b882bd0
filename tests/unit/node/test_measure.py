from node.measure import describe_groups
from protocol.messages import TaskRef
from swarm.config import SapoConfig
from swarm.types import Completion, RolloutGroup, Task


def group(index, *rewards):
    completions = tuple(Completion(number, (1, 2), (), (), "stop") for number in range(len(rewards)))
    return RolloutGroup(Task(TaskRef("t", "0" * 32, 1, index), "?"), (1,), completions, ("",) * len(rewards), rewards)


GROUPS = [group(1, 1.0, 0.0), group(2, 0.0, 0.0, 1.0, 1.0), group(3, 1.0, 1.0)]


def test_reward_is_of_questions_of_the_nodes_own_alone():
    row = describe_groups(GROUPS, SapoConfig(), {GROUPS[2].task.ref})
    assert row["reward_mean"] == 3 / 6
    assert (row["num_groups"], row["num_broad"], row["num_completions"]) == (3, 1, 8)
    row = describe_groups(GROUPS, SapoConfig())
    assert (row["reward_mean"], row["num_broad"]) == (5 / 8, 0)


def test_reward_is_of_the_first_completions_where_the_others_go_to_hard_questions():
    row = describe_groups(GROUPS, SapoConfig(first_completions=2))
    assert row["reward_mean"] == 3 / 6
    assert row["num_completions"] == 8
