from protocol.messages import TaskRef
from swarm.broad import ask_again, merge
from swarm.config import SapoConfig
from swarm.types import RolloutGroup, Task


def task(index):
    return Task(TaskRef("test", "0" * 32, 1, index), f"question {index}")


def group(index, prompt_ids=(1, 2)):
    return RolloutGroup(task(index), prompt_ids, (), ())


def asked(uniform, external, num_broad=2):
    config = SapoConfig(num_local=4, num_external=4, num_broad=num_broad)
    return ask_again([task(one) for one in uniform], external, config, max_prompt_tokens=2)


def test_so_many_questions_of_others_are_asked_again_each_once():
    assert asked([1, 2, 3, 4], [group(20), group(20), group(21), group(22)]) == [task(20), task(21)]
    assert asked([1, 2, 3, 4], [group(20)]) == [task(20)]
    assert asked([1, 2, 3, 4], []) == []
    assert asked([1, 2, 3, 4], [group(20)], num_broad=0) == []


def test_what_is_asked_anyway_or_does_not_fit_the_engine_is_not_asked_again():
    assert asked([1, 2, 20], [group(20), group(21, (1, 2, 3)), group(22)]) == [task(22)]


def test_only_questions_that_were_asked_again_are_merged():
    own, external = [group(1), group(20)], [group(20), group(21), group(1), group(20)]
    parts, alone = merge(own, external, {task(20).ref})
    assert parts == [(own[0],), (own[1], external[0], external[3])]
    assert alone == [external[1], external[2]]
    assert merge(own, external, set()) == ([(own[0],), (own[1],)], external)


def test_what_was_asked_again_and_not_answered_leaves_the_groups_of_others_alone():
    own, external = [group(1)], [group(20)]
    assert merge(own, external, {task(20).ref}) == ([(own[0],)], external)
