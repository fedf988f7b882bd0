import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from protocol.messages import TaskRef
from swarm.engine.base import Engine, EngineStats, Request
from swarm.evaluation import Evaluation, evaluate
from swarm.types import Completion, Segment, Task


class EchoEngine(Engine):
    """Answers a prompt with its own first token, one request per step, the last submitted first."""

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.seen: list[Request] = []
        self._waiting: list[Request] = []

    policy_version = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self.seen.extend(requests)
        self._waiting.extend(requests)

    def step(self) -> list[Completion]:
        request = self._waiting.pop()
        return [Completion(request.request_id, request.prompt_ids[:1], (0.0,), (Segment(0, 0, 1),), "stop")]

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        return []

    def load_policy(self, state, version) -> None: ...

    def close(self) -> None: ...


class LetterPolicy:
    def encode_prompt(self, question: str) -> tuple[int, ...]:
        return tuple(question.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode()


@dataclass
class Score:
    reward: float


class Scorer:
    """Right if the text is `a`, half right if it is `b`."""

    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> list[Score]:
        return [Score({"a": 1.0, "b": 0.5}.get(text, 0.0)) for _, text in jobs]


def tasks(questions: Sequence[str], sources: Sequence[str] = ("letters",)) -> list[Task]:
    """Questions of the sources in turn."""
    return [
        Task(TaskRef(sources[index % len(sources)], "0" * 32, 1, index), question)
        for index, question in enumerate(questions)
    ]


def run(engine: Engine, questions: Sequence[str], seed: int = 3, sources: Sequence[str] = ("letters",)) -> Evaluation:
    asked = tasks(questions, sources)
    return evaluate(engine, LetterPolicy(), Scorer(), asked, temperature=0.7, max_new_tokens=5, seed=seed)


def test_only_full_rewards_pass_and_answers_meet_their_own_questions():
    assert run(EchoEngine(), ["a1", "b2", "a3", "c4"]) == Evaluation(0.5, 4, {"letters": 0.5})


def test_each_source_has_a_share_of_its_own():
    found = run(EchoEngine(), ["a1", "b2", "a3", "c4", "a5"], sources=("first", "second"))
    assert found == Evaluation(0.6, 5, {"first": 1.0, "second": 0.0})


def test_each_question_is_asked_once_with_a_seed_of_its_own_that_never_changes():
    first, second, other = EchoEngine(), EchoEngine(), EchoEngine()
    run(first, ["a1", "b2"])
    run(second, ["a1", "b2"])
    run(other, ["a1", "b2"], seed=4)
    seeds = [request.seed for request in first.seen]
    assert seeds == [request.seed for request in second.seen]
    assert len({*seeds, *(request.seed for request in other.seen)}) == 4
    assert all(request.sampling.temperature == 0.7 and request.sampling.max_new_tokens == 5 for request in first.seen)
    expected = hashlib.blake2b(b"evaluation\x003\x00letters\x00" + b"0" * 32 + b"\x001\x000", digest_size=8).digest()
    assert seeds[0] == int.from_bytes(expected, "little")
