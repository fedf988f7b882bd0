from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
import torch

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig
from swarm.engine.base import Engine, EngineStats, Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.policy import load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.seeds import fold_seed
from swarm.types import Completion, Segment, Task

CONFIG = RolloutConfig(num_completions=3, max_new_tokens=5, temperature=0.8, top_p=0.9, top_k=20)


class ReverseEngine(Engine):
    """Finishes one request a step, the last submitted first; it writes the low digits of the seed."""

    policy_version = 0

    def __init__(self) -> None:
        self.stats = EngineStats()
        self.waiting: list[Request] = []
        self.seen: list[Request] = []
        self.loaded: list[tuple[object, int]] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        self.waiting.extend(requests)
        self.seen.extend(requests)

    def step(self) -> list[Completion]:
        request = self.waiting.pop()
        return [Completion(request.request_id, (request.seed % 97,), (-1.0,), (Segment(0, 0, 1),), "stop")]

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        assert request_ids is None
        self.waiting.clear()
        return []

    def load_policy(self, state, version: int) -> None:
        self.loaded.append((state, version))

    def close(self) -> None: ...


class BytePolicy:
    def encode_prompt(self, question: str) -> tuple[int, ...]:
        return tuple(question.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return f"text of {token_ids[0]}"


def tasks(*questions: str) -> list[Task]:
    return [Task(TaskRef("letters", "0" * 32, 1, index), question) for index, question in enumerate(questions)]


def test_one_group_a_task_in_order():
    engine = ReverseEngine()
    asked = tasks("a", "bb", "a")
    groups = RolloutCollector(engine, BytePolicy(), CONFIG, seed=5).collect(asked, round_index=2)
    assert [group.task for group in groups] == asked
    assert [group.prompt_ids for group in groups] == [(97,), (98, 98), (97,)]
    for place, group in enumerate(groups):
        expected = [fold_seed(5, 2, place, index) % 97 for index in range(3)]
        assert [one.token_ids for one in group.completions] == [(token,) for token in expected]
        assert group.texts == tuple(f"text of {token}" for token in expected)
        assert group.rewards == ()
    assert len({one.request_id for group in groups for one in group.completions}) == 9
    for request in engine.seen:
        sampling = request.sampling
        assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (5, 0.8, 0.9, 20)
        assert not sampling.ignore_eos


def test_noise_depends_on_seed_round_place_and_index_alone():
    def seeds(collector: RolloutCollector, engine: ReverseEngine, *questions: str, round_index: int = 0) -> list[int]:
        engine.seen.clear()
        collector.collect(tasks(*questions), round_index=round_index)
        return [request.seed for request in engine.seen]

    engine = ReverseEngine()
    collector = RolloutCollector(engine, BytePolicy(), CONFIG, seed=5)
    first = seeds(collector, engine, "a", "b")
    assert seeds(collector, engine, "a", "b") == first, "a second call of the same round"
    assert seeds(collector, engine, "x", "y", "z")[:6] == first, "other questions, and more of them"
    assert not set(seeds(collector, engine, "a", "b", round_index=1)) & set(first)
    assert not set(seeds(RolloutCollector(engine, BytePolicy(), CONFIG, seed=6), engine, "a", "b")) & set(first)
    more = RolloutCollector(engine, BytePolicy(), CONFIG.model_copy(update={"num_completions": 4}), seed=5)
    assert seeds(more, engine, "a", "b")[:3] == first[:3]
    assert len(set(first)) == 6


def test_a_round_that_is_written_in_several_calls_has_the_noise_of_one():
    engine, asked = ReverseEngine(), tasks("a", "b")
    collector = RolloutCollector(engine, BytePolicy(), CONFIG, seed=5)
    whole = collector.collect(asked, round_index=2)
    first = collector.collect(asked, round_index=2, spans=[range(2)] * 2)
    rest = collector.collect(asked, round_index=2, spans=[range(2, 5), range(2, 2)])
    joined = [one.with_more(more) for one, more in zip(first, rest, strict=True)]
    assert [len(group.completions) for group in joined] == [5, 2]
    assert joined[0].texts[:3] == whole[0].texts
    assert joined[1].texts == whole[1].texts[:2]
    assert [group.prompt_ids for group in joined] == [group.prompt_ids for group in whole]


def test_no_tasks_no_groups():
    assert RolloutCollector(ReverseEngine(), BytePolicy(), CONFIG, seed=5).collect([], round_index=0) == []


def test_new_weights_go_to_the_engine():
    engine = ReverseEngine()
    state = {"w": torch.zeros(1)}
    RolloutCollector(engine, BytePolicy(), CONFIG, seed=5).load_policy(state, 4)
    assert engine.loaded == [(state, 4)]


@pytest.fixture(scope="module")
def tiny():
    return load_policy(ModelConfig(name="tiny"))


def engine_for(tiny, max_slots: int) -> TorchEngine:
    config = EngineConfig(max_slots=max_slots)
    return TorchEngine(tiny.model, eos_token_ids=tiny.eos_token_ids, config=config, max_seq_len=96)


def test_the_built_in_model_writes_the_same_groups_whatever_the_slots(tiny):
    asked = tasks("What is 3 plus 4?", "What is 12 minus 5?", "What is 6 times 7?")
    config = RolloutConfig(num_completions=6, max_new_tokens=24)
    few = RolloutCollector(engine_for(tiny, 2), tiny, config, seed=1).collect(asked, round_index=3)
    many = RolloutCollector(engine_for(tiny, 64), tiny, config, seed=1).collect(asked, round_index=3)
    assert [group.texts for group in few] == [group.texts for group in many]
    for group, same in zip(few, many, strict=True):
        assert [one.token_ids for one in group.completions] == [one.token_ids for one in same.completions]
        assert len({one.token_ids for one in group.completions}) > 3, "the starting policy is diffuse"
        for one in group.completions:
            assert (one.finish_reason == "stop") == (one.token_ids[-1] in tiny.eos_token_ids)
            tokens = torch.tensor([group.prompt_ids + one.token_ids])
            with torch.no_grad():
                rows = tiny.model(tokens).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            expected = rows.gather(1, tokens[0, len(group.prompt_ids) :, None])[:, 0].tolist()
            assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_greedy_evaluation_of_the_built_in_model_is_that_of_transformers(tiny):
    prompt = tiny.encode_prompt("What is 3 plus 4?")
    sampling = SamplingParams(24, temperature=0)
    request = Request(0, prompt, 0, sampling)
    engine = engine_for(tiny, 4)
    one, two = engine.generate([request, replace(request, request_id=1, prompt_ids=prompt + prompt)])
    for ids, completion in ((prompt, one), (prompt + prompt, two)):
        whole = tiny.model.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=24, eos_token_id=sorted(tiny.eos_token_ids)
        )
        assert completion.token_ids == tuple(whole[0, len(ids) :].tolist())
