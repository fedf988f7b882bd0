"""The learned drafter: what it computes in use is what was trained, and it learns from what the trainer gives away."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from swarm.config import EngineConfig, TrainerConfig
from swarm.drafting import head as head_module
from swarm.drafting.base import Drawing, Seen, SequenceState
from swarm.drafting.head import HeadDrafter
from swarm.drafting.head_export import export_head, load_head
from swarm.drafting.head_model import HeadModel, head_config, supports_head
from swarm.drafting.learner import HeadLearner
from swarm.drafting.pairs import CONTEXT_TOKENS, PairBuffer, StatedSequence, sequences_of
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.errors import ModelError
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

VOCABULARY = 160


def make_policy(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        model.lm_head.weight.mul_(6)  # so that it is sure of some tokens
    return model.to(dtype)


def groups_of(num=3, members=2, prompt=5, length=12, seed=1):
    rng = random.Random(seed)
    draw = lambda n: tuple(rng.randrange(VOCABULARY) for _ in range(n))  # noqa: E731
    return tuple(
        TrainingGroup(
            draw(prompt + i), tuple(draw(length + j) for j in range(members)), (1.0,) * members, (None,) * members
        )
        for i in range(num)
    )


def states_of(model, tokens):
    with torch.no_grad():
        return model.model(torch.tensor([tokens])).last_hidden_state[0]


def shown(policy, groups, **settings):
    """What an observer is shown by a real update of a copy of the policy."""
    seen = []
    trainer = Trainer(policy, TrainerConfig(learning_rate=1e-12, **settings))
    trainer.observer = lambda groups, row, states: seen.extend(sequences_of(groups, row, states))
    trainer.update(TrainingBatch(groups))
    return seen


@pytest.fixture(params=["native", "torch"])
def layer(request, monkeypatch):
    """The drafter's layer by the compiled kernels, and by torch."""
    if request.param == "torch":
        monkeypatch.setattr(head_module._NativeLayer, "supports", staticmethod(lambda model: False))
    return request.param


@pytest.mark.parametrize("members", [1, 3])
def test_the_trainers_forward_pass_gives_every_completion_its_states(members):
    policy, groups = make_policy(), groups_of(members=members)
    seen = shown(policy, groups, num_epochs=2)
    assert len(seen) == 3 * members  # of the first epoch alone
    wanted = {group.prompt_ids + ids: states_of(policy, group.prompt_ids + ids) for group in groups
              for ids in group.completion_ids}  # fmt: skip
    for one in seen:
        tokens = tuple(one.tokens.tolist())
        torch.testing.assert_close(one.states, wanted[tokens][:-1], rtol=1e-4, atol=1e-4)
        assert 5 <= one.num_context <= 7


def test_a_long_prompt_is_cut():
    [one, _] = shown(make_policy(), groups_of(num=1, prompt=CONTEXT_TOKENS + 9))
    assert one.num_context == CONTEXT_TOKENS
    assert len(one.states) == len(one.tokens) - 1


def trained(policy, groups, num_steps=60):
    learner = HeadLearner(policy)
    trainer = Trainer(policy, TrainerConfig(learning_rate=1e-12))
    trainer.observer = learner.observe
    trainer.update(TrainingBatch(groups))
    losses = []
    for _ in range(num_steps):
        assert learner.step()
        losses.append(learner.loss)
    return learner, losses


def drafter_of(learner, policy, num_slots=4):
    return HeadDrafter(learner.model, policy, lambda: learner.vocabulary, num_slots=num_slots, capacity=128)


def test_what_is_drafted_is_what_the_network_says(layer):
    """Step by step with a cache, over two verifications and a decoded step between, as in one pass over it all."""
    policy = make_policy()
    learner = HeadLearner(policy)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    drafter = drafter_of(learner, policy)
    tokens = [3, 17, 99, 5, 41, 77, 120, 8, 64, 31, 2, 90]
    states = states_of(policy, tokens)

    def expected(tokens, states, num):
        """Greedy drafts by whole passes."""
        tokens, states, drafted = list(tokens), states, []
        for _ in range(num):
            embedded = policy.get_input_embeddings()(torch.tensor([tokens[1:]]))
            with torch.no_grad():
                said = learner.model(embedded, states[None], torch.arange(len(tokens) - 1)[None])[0]
                drafted.append(int(policy.lm_head(said[-1]).argmax()))
            tokens, states = [*tokens, drafted[-1]], torch.cat([states, said[-1:]])
        return drafted

    state = SequenceState(7, tokens[:4], Drawing(5, 0.0, 0, 1.0))
    state.room = 50
    drafter._kept[:] = drafter._tried[:]  # sure of everything: no draft ends early
    drafter.saw(lambda: [Seen(7, 0, 0, 4)], states[:4])
    state.append(tokens[4:5])
    first = drafter.propose([state], 4, 16)
    assert first == [expected(tokens[:5], states[:4], 4)]
    drafter.saw(lambda: [Seen(7, 4, 1, 3)], torch.cat([states[:1], states[4:7], states[:2]]))  # two were kept
    state.append(tokens[5:8])
    assert drafter.propose([state], 3, 16) == [expected(tokens[:8], states[:7], 3)]
    drafter.saw(lambda: [Seen(7, 7, 0, 1)], states[7:8])
    drafter.saw(lambda: [Seen(7, 8, 0, 1)], states[8:9])
    state.append(tokens[8:10])
    assert drafter.propose([state], 3, 16) == [expected(tokens[:10], states[:9], 3)]
    state.append(tokens[10:11])  # decoded, and nobody has seen its state
    assert drafter.propose([state], 3, 16) == [[]]


def test_completions_are_the_same_and_learning_saves_steps(layer):
    policy = make_policy()
    requests = [
        Request(i, (5, 9, 14 + i // 4), 77 * i, SamplingParams(40, temperature=0.6 if i % 2 else 0.0, ignore_eos=True))
        for i in range(12)
    ]

    def engine(speculator=None):
        return TorchEngine(
            policy, eos_token_ids=(), config=EngineConfig(max_slots=5), max_seq_len=128, speculator=speculator
        )

    truth = engine().generate(requests)
    members = [
        TrainingGroup(one.prompt_ids, (two.token_ids,), (1.0,), (None,))
        for one, two in zip(requests, truth, strict=True)
    ]
    learner, _ = trained(policy, tuple(members), num_steps=0)
    speculating = engine(Speculator([drafter_of(learner, policy, 5)], Strategy("head", 5, 25), clock=lambda: 0.0))

    def num_steps():
        before = speculating.stats.num_steps
        done = speculating.generate(requests)
        assert [one.token_ids for one in done] == [one.token_ids for one in truth]
        assert [one.logprobs for one in done] == [pytest.approx(one.logprobs, abs=1e-4) for one in truth]
        return speculating.stats.num_steps - before

    untaught, losses = num_steps(), []
    for _ in range(60):
        learner.step()
        losses.append(learner.loss)
    speculating.load_policy(policy.state_dict(), 1)
    assert losses[-1] < 0.8 * losses[0]
    assert num_steps() < 0.85 * untaught


def test_sequences_of_one_row_do_not_see_each_other():
    policy = make_policy()
    learner, _ = trained(policy, groups_of(members=1), num_steps=3)
    held = learner._buffer._held
    with torch.no_grad():
        together = learner._loss(held)
        nums = [int((torch.arange(len(one.states) - 1) >= one.num_context - 2).sum()) for one in held]
        alone = [learner._loss([one]) for one in held]
        mean = sum(num * one for num, one in zip(nums, alone, strict=True)) / sum(nums)
    torch.testing.assert_close(together, mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_step_that_is_given_up_leaves_nothing(part):
    policy = make_policy()
    learner, _ = trained(policy, groups_of(), num_steps=1)
    before = {name: one.clone() for name, one in learner.weights().items()}
    asked = iter([False] * (part - 1) + [True] * 9)
    assert not learner.step(lambda: next(asked))
    assert learner.num_steps == 1
    for name, one in learner.weights().items():
        assert torch.equal(one, before[name])
    assert learner.step()


def test_the_policy_is_left_as_it_is():
    policy = make_policy()
    before = {name: one.clone() for name, one in policy.state_dict().items()}
    learner, _ = trained(policy, groups_of(), num_steps=3)
    for name, one in policy.state_dict().items():
        torch.testing.assert_close(one, before[name], rtol=0, atol=1e-9)
    held = sum(one.numel() for one in learner.state_tensors().values())
    own = sum(one.numel() for one in learner.model.parameters())
    assert held < 3 * own + 4096  # master weights, two moments, counts: nothing frozen


def test_it_goes_on_where_it_was():
    policy, groups = make_policy(), groups_of()
    learner, _ = trained(policy, groups, num_steps=5)
    other = HeadLearner(policy, seed=9)
    assert other.load_state(learner.state_tensors(), learner.state_meta())
    for name, one in other.weights().items():
        assert torch.equal(one, learner.weights()[name])
    assert (other.num_steps, other.loss) == (5, learner.loss)
    assert torch.equal(other.vocabulary, learner.vocabulary)
    larger = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    stranger = HeadLearner(AutoModelForCausalLM.from_config(larger))
    assert not stranger.load_state(learner.state_tensors(), learner.state_meta())


def test_drafts_are_made_of_frequent_tokens(monkeypatch):
    monkeypatch.setattr("swarm.drafting.learner._MAX_VOCABULARY", 20)
    policy = make_policy()
    group = TrainingGroup((1, 2), ((150, 151, 152, 150, 151),) * 2, (1.0,) * 2, (None,) * 2)
    learner, _ = trained(policy, (group,), num_steps=1)
    assert learner.vocabulary.tolist() == [*range(17), 150, 151, 152]
    drafter = drafter_of(learner, policy)
    state = SequenceState(1, (1, 2), Drawing(5, 1.0, 0, 1.0))
    state.room = 9
    drafter.saw(lambda: [Seen(1, 0, 0, 2)], states_of(policy, (1, 2)))
    state.append([3])
    [draft] = drafter.propose([state], 6, 6)
    assert draft
    assert set(draft) <= set(learner.vocabulary.tolist())


def test_it_is_exported_under_eagles_names(tmp_path):
    policy = make_policy()
    learner, _ = trained(policy, groups_of(), num_steps=2)
    export_head(learner.model, tmp_path / "eagle")
    config = json.loads((tmp_path / "eagle" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (1, 64, VOCABULARY)
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"}  # fmt: skip
    wanted = {"fc.weight", *(f"layers.0.{name}.weight" for name in layer)}
    assert set(load_file(tmp_path / "eagle" / "model.safetensors")) == wanted
    other = HeadModel(head_config(policy), seed=5)
    load_head(other, tmp_path / "eagle")
    assert torch.equal(other.fc.weight, learner.model.fc.weight)
    with pytest.raises(ModelError, match="not empty"):
        export_head(learner.model, tmp_path / "eagle")


def test_models_without_a_bare_head_are_refused():
    policy = make_policy()
    assert supports_head(policy)
    policy.config.model_type = "gpt2"
    assert not supports_head(policy)


def test_the_buffer_keeps_the_long_and_the_new():
    def sequence(length):
        return StatedSequence(torch.zeros(length, dtype=torch.int64), torch.zeros(length - 1, 1), 2)

    buffer = PairBuffer(100)
    buffer.add([sequence(10), sequence(40), sequence(20)])
    buffer.next_round()
    buffer.add([sequence(45)])
    assert sorted(len(one.tokens) for one in buffer._held) == [40, 45]
    for _ in range(3):
        buffer.next_round()
    buffer.add([sequence(30)])
    assert sorted(len(one.tokens) for one in buffer._held) == [30, 45]
    rng = random.Random(0)
    first = [len(buffer.draw(1, rng)[0].tokens) for _ in range(300)]
    assert 140 < first.count(30) < 210  # newer and shorter: 30 against 45 * 0.9**3
    assert len(buffer.draw(10_000, rng)) == 2


def test_nothing_to_learn_from():
    learner = HeadLearner(make_policy())
    assert not learner.can_learn
    assert not learner.step()
    assert learner.num_steps == 0
