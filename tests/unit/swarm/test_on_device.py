"""What the trainer and the sampler compute on another device is what they compute on the CPU.

SWARM_TEST_DEVICE=cuda python -m pytest tests/unit/swarm/test_on_device.py tests/contract
"""

import copy
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from swarm.config import EngineConfig, LoraConfig, TrainerConfig
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.noise import gumbel
from swarm.engine.torch.sampling import sample
from swarm.fused import fuse, gated_silu, rms_norm
from swarm.logprobs import LogitsHead, target_logprobs
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("SWARM_TEST_DEVICE", "cpu"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu", reason="SWARM_TEST_DEVICE names no device beside the CPU")

VOCAB = 97
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "initializer_range": 0.15,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "biases and a tied head": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "padded": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),  # packing cannot serve it
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def make_batch(seed: int, completions: int = 3) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(VOCAB, (length,), generator=generator).tolist())

    groups = []
    for _ in range(4):
        written = tuple(ids(1, 40) for _ in range(completions))
        advantages = tuple((-1.0) ** i * (1 + 0.1 * i) for i in range(completions))
        groups.append(TrainingGroup(ids(2, 30), written, advantages, tuple((-4.0,) * len(one) for one in written)))
    return TrainingBatch(tuple(groups))


def test_noise_is_that_of_the_cpu():
    seeds, positions = torch.arange(3000) * 0x1234567, torch.arange(3000) % 17
    here, there = gumbel(seeds, positions, 200), gumbel(seeds.to(DEVICE), positions.to(DEVICE), 200).cpu()
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-6)
    assert (here == there).double().mean() > 0.999  # logarithms differ by a digit here and there


@pytest.mark.parametrize("vocab", [203, 1000, 49152])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 40, 0.9), (0.0, 0, 1.0)]
)
def test_tokens_are_those_of_the_cpu(vocab, temperature, top_k, top_p):
    num = 500
    logits = random(num, vocab, seed=1) * 2
    columns = [
        torch.arange(num) * 977, torch.arange(num) % 5, torch.full((num,), temperature),
        torch.full((num,), top_k), torch.full((num,), top_p),
    ]  # fmt: skip
    here = sample(logits, *columns)
    there = sample(logits.to(DEVICE), *(column.to(DEVICE) for column in columns))
    same = here[0] == there[0].cpu()
    assert same.double().mean() > 0.995  # a near tie may fall the other way
    torch.testing.assert_close(there[1].cpu()[same], here[1][same], rtol=0, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradients(dtype, softcap):
    hidden, weight = random(300, 64, seed=2).to(dtype), (random(5000, 64, seed=3) * 0.3).to(dtype)
    targets = torch.arange(300) * 13 % 5000
    results = []
    for device in (CPU, DEVICE):
        leaves = [x.to(device, copy=True).requires_grad_() for x in (hidden, weight)]
        head = LogitsHead(leaves[1], None, 1.0, softcap)
        values = target_logprobs(leaves[0], head, targets.to(device), temperature=0.8, chunk_tokens=128)
        (values * torch.linspace(-1, 1, 300, device=device)).sum().backward()
        results.append([values.detach().cpu(), *(leaf.grad.float().cpu() for leaf in leaves)])
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    for here, there in zip(*results, strict=True):
        assert float((here - there).norm() / here.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_functions(dtype):
    x, y, weight, upstream = (random(7, 33, 64, seed=seed).to(dtype) for seed in range(4))
    results = []
    for device in (CPU, DEVICE):
        leaves = [each.to(device, copy=True).requires_grad_() for each in (x, y, weight[0, 0])]
        out = gated_silu(rms_norm(leaves[0], leaves[2], 1e-5), leaves[1])
        out.backward(upstream.to(device))
        results.append([out.detach().float().cpu(), *(leaf.grad.float().cpu() for leaf in leaves)])
    for here, there in zip(*results, strict=True):
        assert float((here - there).norm() / here.norm()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_are_fused_on_the_device(dtype):
    model = make_model("llama", dtype).to(DEVICE)
    ids = torch.arange(20, device=DEVICE)[None]
    before = model(ids).logits.float()
    assert fuse(model) == 2 * 2 + 1 + 2
    atol = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(ids).logits.float(), before, rtol=2e-2, atol=atol)


@pytest.mark.parametrize(
    "extra",
    [{}, {"lora": LoraConfig(rank=4)}, {"kl_coef": 0.1, "num_minibatches": 2}, {"max_tokens_per_microbatch": 90}],
    ids=["plain", "lora", "kl", "microbatches"],
)
@pytest.mark.parametrize("name", MODELS)
def test_an_update_in_float32(name, extra):
    config = TrainerConfig(learning_rate=1e-3, logprob_chunk_tokens=32, **extra)
    model, stats, states = make_model(name), [], []
    start: dict[str, torch.Tensor] = {}
    for device in (CPU, DEVICE):
        trainer = Trainer(copy.deepcopy(model).to(device), config)
        start = start or {key: value.clone() for key, value in trainer.state_tensors().items()}
        trainer.load_state(start, trainer.state_meta())  # adapters start at random
        stats.append([trainer.update(make_batch(seed)) for seed in range(2)])
        states.append({key: value.detach().cpu() for key, value in trainer.policy_state().items()})
    for here, there in zip(*stats, strict=True):
        assert there.grad_norm == pytest.approx(here.grad_norm, rel=1e-3)
        assert there.loss == pytest.approx(here.loss, rel=1e-3, abs=1e-5)
        assert there.kl == pytest.approx(here.kl, rel=1e-2, abs=1e-6)
        assert there.num_tokens == here.num_tokens
    for key, here in states[0].items():
        # Adam's first steps are lr * g / |g|: where g is rounding noise around zero its sign is, too
        assert torch.isclose(states[1][key], here, rtol=1e-3, atol=1e-4).float().mean() > 0.99, key


@pytest.mark.parametrize("name", MODELS)
def test_an_update_in_bf16(name):
    norms = []
    for device in (CPU, DEVICE):
        trainer = Trainer(make_model(name, torch.bfloat16).to(device), TrainerConfig(learning_rate=1e-4))
        norms.append([trainer.update(make_batch(seed)).grad_norm for seed in range(2)])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_resumed_state_is_what_was_saved():
    trainers = [Trainer(make_model("llama").to(DEVICE), TrainerConfig(learning_rate=1e-3)) for _ in range(2)]
    trainers[0].update(make_batch(0))
    saved = {key: value.cpu().clone() for key, value in trainers[0].state_tensors().items()}
    trainers[1].load_state(saved, trainers[0].state_meta())
    assert all(torch.equal(value.cpu(), saved[key]) for key, value in trainers[1].state_tensors().items())
    first, second = (trainer.update(make_batch(1)).grad_norm for trainer in trainers)
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="only CUDA and ROCm record graphs")
@pytest.mark.filterwarnings("error")
def test_a_model_that_cannot_be_recorded_is_decoded_all_the_same(monkeypatch):
    """Its code waits for the device within a step. The failure leaves torch's own random numbers usable."""
    model = make_model("llama").to(DEVICE)
    asked = [Request(index, (5, 9, 14 + index), index, SamplingParams(12)) for index in range(3)]

    def write(record_graphs: bool) -> tuple[list[tuple[int, ...]], int]:
        engine = TorchEngine(
            model, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=64, runner=GenericRunner,
            record_graphs=record_graphs,
        )  # fmt: skip
        return [one.token_ids for one in engine.generate(asked)], engine._slot_pass.num_graphs

    expected, num_graphs = write(record_graphs=True)
    assert num_graphs > 0
    plain = type(model.model.layers[0].mlp).forward

    def waits(self, hidden):
        return plain(self, hidden) * (1.0 if hidden.abs().sum().item() >= 0 else 2.0)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", waits)
    torch.manual_seed(3)
    before = torch.randn(4, device=DEVICE)
    with pytest.warns(UserWarning, match="decoding without graphs"):
        assert write(record_graphs=True) == (expected, 0)
    torch.manual_seed(3)
    assert torch.equal(torch.randn(4, device=DEVICE), before)
    monkeypatch.undo()
    assert write(record_graphs=True) == (expected, num_graphs)
    assert write(record_graphs=False) == (expected, 0)


def test_the_engine_takes_the_live_weights_of_a_trainer_on_the_device():
    model = make_model("llama").to(DEVICE)
    trainer = Trainer(copy.deepcopy(model), TrainerConfig(learning_rate=1e-2))
    engine = TorchEngine(model, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=64)
    asked = [Request(index, (5, 9, 14 + index), index, SamplingParams(30)) for index in range(6)]
    before = [one.token_ids for one in engine.generate(asked)]
    for version in range(1, 4):
        trainer.update(make_batch(version))
        engine.load_policy(trainer.policy_state(), version)
        model.load_state_dict(trainer.policy_state())
        fresh = TorchEngine(model, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=64)
        got = [one.token_ids for one in engine.generate(asked)]
        assert got == [one.token_ids for one in fresh.generate(asked)]
        assert got != before
