"""Which models the torch engine runs, and that it runs them as transformers does."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from swarm.config import EngineConfig
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeRunner
from swarm.errors import ModelError

SIZES: dict[str, Any] = {
    "vocab_size": 203, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def gpt2(**changes: Any) -> Any:
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    sizes = {names.get(name, name): value for name, value in SIZES.items() if not name.startswith(("num_key", "inter"))}
    return transformers.GPT2Config(**sizes, **changes)


CONFIGS = {
    "window": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "alternating windows": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8),
    "scaled logits": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0, attention_multiplier=0.3),
    "parallel block, scaled logits": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "partial rotary, another base model": lambda: transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25),
    "learned positions": gpt2,
    "experts": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "clipped projections": lambda: transformers.OlmoConfig(**SIZES, clip_qkv=1.0),
    "yarn": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=YARN),
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "all biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral without a window": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
}
FUSED = {"yarn", "llama3", "all biases", "mistral without a window"}
REFUSED = {
    "no exchangeable attention": (
        lambda: transformers.BloomConfig(vocab_size=203, hidden_size=64, n_layer=2, n_head=4),
        "BloomForCausalLM does not let its attention be exchanged",
    ),
    "soft caps": (lambda: transformers.Gemma2Config(**SIZES, head_dim=16), "soft caps or sinks"),
    "sinks": (lambda: transformers.GptOssConfig(**SIZES, head_dim=16, num_local_experts=4), "soft caps or sinks"),
    "chunked attention": (
        lambda: transformers.Llama4TextConfig(**SIZES, head_dim=16, num_local_experts=2, intermediate_size_mlp=96),
        "no chunked_attention, which Llama4ForCausalLM needs",
    ),
}


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def engine_for(model: Any, runner: Any = None, speculator: Speculator | None = None) -> TorchEngine:
    return TorchEngine(
        model, eos_token_ids=(), config=EngineConfig(max_slots=3), max_seq_len=64, runner=runner, speculator=speculator
    )  # fmt: skip


class Ragged(NgramDrafter):
    """Drafts of all lengths, which are right now and then."""

    def propose(self, states: Any, depth: int, budget: int, worth: Any = None) -> list[list[int]]:
        return [[(7 * i + len(state.tokens)) % 203 for i in range(min(len(state.tokens) % 5, state.room))]
                for state in states]  # fmt: skip


def check(model: Any, engine: TorchEngine) -> None:
    """Sampled log-probabilities at mixed lengths against a full forward pass."""
    prompts = [tuple((17 * salt + 29 * index) % 203 for index in range(n)) for salt, n in enumerate((1, 20, 9, 31, 5))]
    asked = [Request(index, prompt, index, SamplingParams(20)) for index, prompt in enumerate(prompts)]
    seen = set()
    for request, one in zip(asked, engine.generate(asked), strict=True):
        tokens = torch.tensor([request.prompt_ids + one.token_ids])
        rows = model(tokens).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0].tolist()
        assert one.logprobs == pytest.approx(expected, abs=2e-4)
        seen.update(one.token_ids)
    assert len(seen) > 15


@pytest.mark.parametrize("name", CONFIGS)
def test_the_generic_runner_computes_what_the_model_computes(name):
    check(model_of(name), engine_for(model_of(name), GenericRunner))


@pytest.mark.parametrize("name", CONFIGS)
def test_so_it_does_where_it_verifies_drafts(name):
    engine = engine_for(model_of(name), GenericRunner, Speculator([Ragged()], Strategy("ngram", 4, 12)))
    check(model_of(name), engine)
    assert engine.stats.num_speculated_tokens > 30


@pytest.mark.parametrize("name", sorted(FUSED))
def test_so_does_the_fused_runner(name):
    assert LlamaRunner.supports(model_of(name))
    check(model_of(name), engine_for(model_of(name), LlamaRunner))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_engine_chooses_a_runner_that_computes_the_model(name):
    engine = engine_for(model_of(name))
    assert isinstance(engine._runner, NativeRunner | LlamaRunner) == (name in FUSED)
    check(model_of(name), engine)


def test_a_rotation_that_depends_on_the_length_is_not_fused():
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES, rope_parameters=DYNAMIC))
    assert not LlamaRunner.supports(model)


@pytest.mark.parametrize("name", ["scaled logits", "experts", "learned positions"])
def test_the_generic_runner_takes_new_weights(name):
    model = copy.deepcopy(model_of(name))
    engine = engine_for(model_of(name), GenericRunner)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    engine.load_policy(model.state_dict(), 1)
    check(model, engine)


@pytest.mark.parametrize("name", ["window", "learned positions"])
def test_bf16_through_packed_layers(name):
    """The errors of bf16 arithmetic, in which packed layers may round elsewhere, are no larger than transformers'."""
    exact = model_of(name)
    model, exact = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16().float()
    engine = engine_for(model, GenericRunner)
    engine.load_policy({key: tensor.clone() for key, tensor in model.state_dict().items()}, 1)
    (one,) = engine.generate([Request(0, (5, 9, 14), 3, SamplingParams(40))])
    tokens = torch.tensor([(5, 9, 14, *one.token_ids)])
    plain, truth = (
        each(tokens).logits[0, 2:-1].double().log_softmax(-1).gather(1, tokens[0, 3:, None])[:, 0]
        for each in (model, exact)
    )
    ours = torch.tensor(one.logprobs).double()
    assert (ours - truth).square().mean() <= 2 * (plain - truth).square().mean() + 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_run_are_refused_in_one_line(name):
    config, message = REFUSED[name]
    model = AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(ModelError, match=message) as caught:
        engine_for(model)
    assert "\n" not in str(caught.value)
    assert "choose another --model" in str(caught.value)


def test_a_model_with_state_of_its_own_is_refused(monkeypatch):
    """Whatever the runner does not know of shows as another result, and is refused when the runner is made."""
    model = copy.deepcopy(model_of("window"))
    plain = type(model.model.layers[0].mlp).forward

    def looks_at_the_whole_sequence(self, hidden):
        return plain(self, hidden) + hidden.mean(1, keepdim=True)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", looks_at_the_whole_sequence)
    with pytest.raises(ModelError, match="does not compute what MistralForCausalLM computes"):
        engine_for(model)


def test_a_runner_that_does_not_support_the_model_is_refused():
    with pytest.raises(ValueError, match="cannot run MistralForCausalLM"):
        engine_for(model_of("window"), LlamaRunner)


def test_the_limit_of_the_model_bounds_the_sequence():
    assert TorchEngine(model_of("yarn"), eos_token_ids=(), config=EngineConfig(max_slots=1)).max_seq_len == 96
    longer = EngineConfig(max_slots=1, max_seq_len=200)
    assert TorchEngine(model_of("yarn"), eos_token_ids=(), config=longer).max_seq_len == 96
    shorter = EngineConfig(max_slots=1, max_seq_len=50)
    assert TorchEngine(model_of("yarn"), eos_token_ids=(), config=shorter).max_seq_len == 50
