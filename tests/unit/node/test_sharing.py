from node.sharing import shared_group
from protocol.limits import MAX_COMPLETION_BYTES, MAX_COMPLETIONS
from protocol.messages import SharedCompletion, TaskRef
from protocol.wire import encode_frame
from swarm.config import SapoConfig
from swarm.types import Completion, RolloutGroup, Task

REF = TaskRef("reasoning_gym/products", "0" * 32, 1, 2)


def group(*members):
    """Members are (text, reward, finish reason)."""
    completions = tuple(
        Completion(number, (1, 2), (-0.5, -0.5), (), reason) for number, (_, _, reason) in enumerate(members)
    )
    texts, rewards = tuple(text for text, _, _ in members), tuple(reward for _, reward, _ in members)
    return RolloutGroup(Task(REF, "2 times 2?"), (5,), completions, texts, rewards)


def test_a_group_goes_out_as_text_and_whether_it_was_finished():
    shared = shared_group(group(("4", 1.0, "stop"), ("5 or", 0.0, "length")), SapoConfig())
    assert shared.task == REF
    assert shared.completions == (SharedCompletion("4", True), SharedCompletion("5 or", False))


def test_what_teaches_nobody_anything_stays_here_unless_all_is_wanted():
    equal = group(("4", 1.0, "stop"), ("four", 1.0, "stop"))
    assert shared_group(equal, SapoConfig()) is None
    assert len(shared_group(equal, SapoConfig(publish="all")).completions) == 2


def test_completions_that_the_protocol_does_not_carry_are_left_out():
    long = "x" * (MAX_COMPLETION_BYTES + 1)
    members = [("4", 1.0, "stop"), (long, 0.0, "length"), ("\ud83d", 0.0, "stop"), ("", 0.0, "aborted")]
    assert shared_group(group(*members), SapoConfig()) is None, "what is left has one reward"
    shared = shared_group(group(*members, ("é" * (MAX_COMPLETION_BYTES // 2), 0.0, "length")), SapoConfig())
    assert [len(completion.text.encode()) for completion in shared.completions] == [1, MAX_COMPLETION_BYTES]


def test_every_group_that_goes_out_can_be_sent():
    largest = [("y" * MAX_COMPLETION_BYTES, float(number % 2), "stop") for number in range(70)]
    for members in (largest, [(str(number), float(number % 2), "stop") for number in range(70)]):
        shared = shared_group(group(*members), SapoConfig())
        assert 30 < len(shared.completions) <= MAX_COMPLETIONS
        encode_frame(shared)
