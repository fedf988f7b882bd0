"""Updates: the gradient is that of plain transformers, resume is bit for bit, divergence is loud."""

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from swarm.config import LoraConfig, TrainerConfig
from swarm.errors import CheckpointError, TrainingDiverged
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

VOCAB = 40


def make_model(dtype=torch.float32, *, tie=True, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        initializer_range=0.2,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_batch(seed, *, num_groups=3, behavior=True):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def ids(n):
        return tuple(torch.randint(VOCAB, (n,), generator=generator).tolist())

    groups = []
    for _ in range(num_groups):
        completions = tuple(ids(number(1, 7)) for _ in range(3))
        known = tuple(tuple(-3.5 + 0.1 * (t % 4) for t in c) if behavior else None for c in completions)
        groups.append(TrainingGroup(ids(number(2, 9)), completions, (1.4, -0.7, -0.7), known))
    return TrainingBatch(tuple(groups))


def plain_gradient(model, batch, config, temperature):
    """DAPO's loss at ratio 1 with importance weights, by full logits of one completion at a time."""
    num_tokens = sum(len(ids) for group in batch.groups for ids in group.completion_ids)
    loss = torch.zeros(())
    for group in batch.groups:
        for ids, advantage, behavior in zip(
            group.completion_ids, group.advantages, group.behavior_logprobs, strict=True
        ):
            logits = model(input_ids=torch.tensor([group.prompt_ids + ids]), use_cache=False).logits[0]
            logprobs = torch.log_softmax(logits[len(group.prompt_ids) - 1 : -1] / temperature, -1)
            chosen = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0]
            tis = torch.ones(len(ids))
            if behavior is not None:
                tis = (chosen.detach() - torch.tensor(behavior)).exp().clamp(max=config.tis_cap)
            loss = loss - (tis * chosen * advantage).sum() / num_tokens
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("max_tokens", [4096, 24, 16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_one_update_is_the_adamw_step_of_the_plain_gradient(max_tokens, tie, temperature):
    model = make_model(tie=tie)
    batch = make_batch(1)
    config = TrainerConfig(
        learning_rate=1e-3,
        weight_decay=0.1,
        max_tokens_per_microbatch=max_tokens,
        max_grad_norm=0.5,
        logprob_chunk_tokens=5,
    )
    twin = copy.deepcopy(model)
    gradient = plain_gradient(twin, batch, config, temperature)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
    matrices = [p for p in twin.parameters() if p.ndim >= 2]
    vectors = [p for p in twin.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1, foreach=False
    )
    for parameter, grad in zip(twin.parameters(), gradient, strict=True):
        parameter.grad = grad * min(1.0, 0.5 / norm)
    adamw.step()
    stats = Trainer(model, config, temperature=temperature).update(batch)
    assert norm > 0.5
    assert stats.grad_norm == pytest.approx(norm, rel=1e-4)
    assert stats.num_completions == 9
    assert stats.policy_version == 1
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        # Adam's first step is lr * g / (|g| + eps): where g is rounding noise around zero its sign is, too.
        close = torch.isclose(got, expected, rtol=1e-4, atol=2e-5)
        assert close.float().mean() > 0.999


def test_a_model_that_packing_cannot_serve_is_trained_padded():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, vocab_size=VOCAB, sliding_window=3, initializer_range=0.2)
    ).eval()
    config, batch = TrainerConfig(max_tokens_per_microbatch=50), make_batch(6)
    gradient = plain_gradient(model, batch, config, 1.0)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
    assert Trainer(model, config).update(batch).grad_norm == pytest.approx(norm, rel=1e-4)


def test_old_logprobs_are_those_before_the_first_step():
    batch = make_batch(2, behavior=False)
    common = {"learning_rate": 3e-2, "num_epochs": 3, "max_grad_norm": 100.0}
    stats = Trainer(make_model(), TrainerConfig(**common)).update(batch)
    assert stats.num_steps == 3
    assert stats.clip_fraction > 0  # ratios leave 1 after the first step, and are clipped
    one = Trainer(make_model(), TrainerConfig(learning_rate=3e-2, max_grad_norm=100.0)).update(batch)
    assert one.clip_fraction == 0


def test_learning_raises_the_probability_of_what_is_better():
    group = TrainingGroup((1, 2, 3), ((4, 5), (6, 7)), (1.0, -1.0), (None, None))
    model = make_model()
    trainer = Trainer(model, TrainerConfig(learning_rate=1e-3))

    def logprob(ids):
        logits = model(input_ids=torch.tensor([group.prompt_ids + ids])).logits[0, 2:-1].detach()
        return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum())

    before = logprob((4, 5)), logprob((6, 7))
    for _ in range(5):
        trainer.update(TrainingBatch((group,)))
    assert logprob((4, 5)) > before[0] + 0.1
    assert logprob((6, 7)) < before[1] - 0.1
    assert trainer.policy_version == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extra",
    [{}, {"lora": LoraConfig(rank=4)}, {"kl_coef": 0.1, "num_minibatches": 2, "warmup_updates": 4}],
    ids=["plain", "lora", "kl"],
)
def test_resume_is_bit_for_bit(dtype, extra):
    config = TrainerConfig(learning_rate=1e-3, max_tokens_per_microbatch=40, **extra)

    def fresh():
        torch.manual_seed(5)  # peft draws the adapters' start from the global generator
        return Trainer(make_model(dtype), config)

    straight = fresh()
    for number in range(6):
        straight.update(make_batch(number))
    first = fresh()
    for number in range(3):
        first.update(make_batch(number))
    tensors = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    meta = dict(first.state_meta())
    second = fresh()
    second.update(make_batch(77))  # whatever the fresh trainer has done is replaced
    second.load_state(tensors, meta)
    stats = [second.update(make_batch(number)) for number in range(3, 6)]
    assert stats[-1].policy_version == straight.policy_version == 6
    expected, got = straight.state_tensors(), second.state_tensors()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    expected, got = straight.policy_state(), second.policy_state()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_state_of_another_model_is_refused():
    trainer = Trainer(make_model(), TrainerConfig())
    other = Trainer(make_model(), TrainerConfig(lora=LoraConfig(rank=2)))
    with pytest.raises(CheckpointError, match="another model"):
        trainer.load_state(other.state_tensors(), other.state_meta())


def test_bf16_small_steps_add_up():
    # A step of 1e-5 is below the last bf16 digit of weights near 0.2: without master weights nothing would move.
    model = make_model(torch.bfloat16)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, TrainerConfig(learning_rate=1e-5))
    for _ in range(60):
        trainer.update(make_batch(3))
    moved = [(tensor != start[name]).float().mean().item() for name, tensor in model.state_dict().items()]
    assert sum(moved) / len(moved) > 0.3
    assert all(tensor.dtype == torch.bfloat16 for tensor in trainer.policy_state().values())


def test_bf16_gradients_of_microbatches_add_up():
    norms = [
        Trainer(make_model(torch.bfloat16), TrainerConfig(max_tokens_per_microbatch=tokens))
        .update(make_batch(3))
        .grad_norm
        for tokens in (4096, 16)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.03)


def test_lora_trains_adapters_only_and_merges():
    model = make_model()
    names = set(model.state_dict())
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model, TrainerConfig(learning_rate=1e-2, lora=LoraConfig(rank=4)))
    merged = trainer.policy_state()
    assert set(merged) == names
    assert all(torch.equal(merged[name], start[name]) for name in names)
    for _ in range(3):
        trainer.update(make_batch(4))
    merged = trainer.policy_state()
    assert torch.equal(merged["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    plain = make_model()
    plain.load_state_dict(merged)
    ids = torch.randint(VOCAB, (2, 9))
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_kl_reference_is_the_initial_policy():
    model, batch = make_model(), make_batch(1)
    initial = copy.deepcopy(model)
    trainer = Trainer(model, TrainerConfig(learning_rate=1e-3, kl_coef=0.05))
    assert trainer.update(batch).kl == pytest.approx(0.0, abs=1e-6)
    trainer.update(batch)
    total, count = 0.0, 0
    for group in batch.groups:
        for ids in group.completion_ids:
            both = []
            for policy in (initial, model):
                logits = policy(input_ids=torch.tensor([group.prompt_ids + ids])).logits[0]
                logprobs = torch.log_softmax(logits[len(group.prompt_ids) - 1 : -1], -1).detach()
                both.append(logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0])
            difference = both[0] - both[1]
            total += float((difference.exp() - difference - 1).sum())
            count += len(ids)
    assert total > 0
    assert trainer.update(batch).kl == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_is_skipped_counted_and_stops_after_three(value):
    trainer = Trainer(make_model(), TrainerConfig())
    good, group = make_batch(1), make_batch(1).groups[0]
    bad = TrainingBatch((TrainingGroup(group.prompt_ids, group.completion_ids, (value, 1.0, 1.0), (None,) * 3),))
    trainer.update(good)
    before = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    for _ in range(2):
        stats = trainer.update(bad)
        assert stats.skipped
        assert stats.num_steps == 0
        assert trainer.policy_version == 1
    assert trainer.num_nonfinite == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_tensors().items())
    assert not trainer.update(good).skipped  # in a row: the count begins again
    trainer.update(bad)
    trainer.update(bad)
    with pytest.raises(TrainingDiverged, match="3 updates in a row"):
        trainer.update(bad)


def test_empty_batch_changes_nothing():
    trainer = Trainer(make_model(), TrainerConfig())
    stats = trainer.update(TrainingBatch(()))
    assert (stats.num_steps, stats.num_tokens, stats.policy_version, stats.skipped) == (0, 0, 0, False)


def test_warm_up_rises_linearly():
    trainer = Trainer(make_model(), TrainerConfig(learning_rate=1e-3, warmup_updates=4))
    rates = [trainer.update(make_batch(n)).learning_rate for n in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_dr_grpo_needs_its_constant():
    with pytest.raises(ValueError, match="max_completion_tokens"):
        Trainer(make_model(), TrainerConfig(normalization="dr_grpo"))


def test_frozen_weights_stay():
    model = make_model(tie=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    start = model.model.embed_tokens.weight.clone()
    trainer = Trainer(model, TrainerConfig(learning_rate=1e-2))
    trainer.update(make_batch(1))
    assert torch.equal(model.model.embed_tokens.weight, start)
    assert trainer.state_tensors()["master"].numel() < sum(p.numel() for p in model.parameters()) + 64 * 40
