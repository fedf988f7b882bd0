"""What nodes share gives each of them what it would have had alone."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest

from node.experiment.shared import EngineShare, ScorerShare, SharedEngine, SharedParts
from node.layers import Layer, resolve
from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.policy import load_policy
from swarm.scoring import Score


class Pool:
    """Scores by whether a text is "right", and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def score(self, jobs):
        self.asked += [text for _, text in jobs]
        return [Score(float(text == "right"), "cpu_limit" if text == "slow" else "scored") for _, text in jobs]


def ref(index):
    return TaskRef("sums", "0" * 32, 0, index)


def test_no_answer_is_scored_twice_and_each_node_has_its_own_counts():
    pool, known = Pool(), OrderedDict()
    first, second = ScorerShare(pool, known), ScorerShare(pool, known)
    assert [score.reward for score in first.score([(ref(1), "right"), (ref(1), "wrong"), (ref(1), "right")])] == [
        1,
        0,
        1,
    ]
    assert [score.reward for score in second.score([(ref(1), "right"), (ref(2), "right")])] == [1, 1]
    assert pool.asked == ["right", "wrong", "right"], "the same text to another question is another answer"
    assert first.counts == {"scored": 3}
    assert second.counts == {"scored": 2}


def test_an_answer_that_met_a_limit_is_tried_again():
    pool, known = Pool(), OrderedDict()
    for _ in range(2):
        [score] = ScorerShare(pool, known).score([(ref(1), "slow")])
        assert score.outcome == "cpu_limit"
    assert pool.asked == ["slow", "slow"]


@pytest.fixture(scope="module")
def policy():
    return load_policy(ModelConfig())


def make_engine(policy):
    return TorchEngine(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=8), max_seq_len=48
    )


def ask(policy, engine, first=0):
    requests = [
        Request(first + number, policy.encode_prompt(f"{number} + 2 ="), 7 + number, SamplingParams(6))
        for number in range(6)
    ]
    return [completion.token_ids for completion in engine.generate(requests)]


def test_nodes_that_take_turns_at_an_engine_write_what_each_would_have_written_alone(policy):
    states = [
        {name: tensor.detach() * scale for name, tensor in policy.model.state_dict().items()}
        for scale in (1.0, 0.8, 0.9)
    ]
    alone = []
    for state in states:
        engine = make_engine(policy)
        engine.load_policy(state, 1)
        alone.append(ask(policy, engine))
    assert alone[0] != alone[1] != alone[2]
    shared = SharedEngine(make_engine(policy))
    first, second = (EngineShare(shared, state) for state in states[:2])
    assert [ask(policy, share) for share in (first, second, first, first)] == [alone[0], alone[1], alone[0], alone[0]]
    first.load_policy(states[2], 1)
    assert [ask(policy, share) for share in (first, second)] == [alone[2], alone[1]]
    assert (first.policy_version, second.policy_version) == (1, 0)


def test_nobody_s_requests_are_mixed_with_another_s(policy):
    shared = SharedEngine(make_engine(policy))
    state = policy.model.state_dict()
    first, second = EngineShare(shared, state), EngineShare(shared, state)
    first.submit([Request(1, policy.encode_prompt("1 + 2 ="), 7, SamplingParams(6))])
    assert (first.num_unfinished, second.num_unfinished) == (1, 0)
    with pytest.raises(RuntimeError, match="another node's requests"):
        second.submit([Request(2, policy.encode_prompt("1 + 2 ="), 7, SamplingParams(6))])
    assert second.abort() == []
    assert [completion.request_id for completion in first.abort()] == [1]


def test_each_node_asks_its_own_questions_and_all_hold_out_the_same():
    config = resolve([Layer("test", {"evaluation.num_items": 4})]).config
    with SharedParts() as shared:
        first, second = (shared.tasks(config.model_copy(update={"seed": seed})) for seed in (1, 2))
        assert first.train_batch(1, 4) != second.train_batch(1, 4)
        assert first.heldout(4) == second.heldout(4)
        assert first.train_batch(1, 4) == shared.tasks(config.model_copy(update={"seed": 1})).train_batch(1, 4)


def test_each_node_trains_weights_of_its_own(policy):
    shared = SharedParts()
    shared.scorer = lambda config: SimpleNamespace()  # no process: nothing is scored here
    config = resolve([Layer("test", {})]).config
    first, second = shared.build(config, None), shared.build(config, None)
    weights = [dict(parts.policy.model.named_parameters()) for parts in (first, second)]
    name = next(iter(weights[0]))
    weights[0][name].data.add_(1.0)
    assert not weights[0][name].equal(weights[1][name])
    assert first.policy.tokenizer is second.policy.tokenizer
