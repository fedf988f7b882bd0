"""What the vLLM engine tells its process on a device whose memory it shares with the trainer: no GPU, and no vLLM."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from swarm.config import EngineConfig
from swarm.engine.base import Request, SamplingParams
from swarm.engine.vllm import VllmEngine


class Recorder:
    """Takes an engine's commands down; every request that it holds gets the token 7 whenever it may."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self.held: list[int] = []

    def admit(self, requests, wants_states=False):
        numbers = [request[0] for request in requests]
        self.commands.append(f"admit {numbers}")
        self.held += numbers
        return [[number, [7], [-1.0], None, 3] for number in numbers], []

    def decode(self, drafts=(), wants_states=False):
        self.commands.append("decode")
        return [[number, [7], [-1.0], None, 0] for number in self.held], []

    def load(self, state) -> None:
        self.commands.append("load")
        self.held = []

    def sleep(self) -> None:
        self.commands.append("sleep")
        self.held = []


@pytest.fixture
def model():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return AutoModelForCausalLM.from_config(config)


def on(device: str, model, host: Recorder) -> VllmEngine:
    """An engine over a model that says it is on a device."""
    facts = SimpleNamespace(
        device=torch.device(device), dtype=model.dtype, config=model.config, state_dict=model.state_dict
    )
    return VllmEngine(facts, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=32, host=host)


def test_a_gpu_is_left_to_the_trainer_between_rollouts_and_the_next_policy(model):
    host = Recorder()
    engine = on("cuda:0", model, host)
    engine.submit([Request(number, (1, 2, 3), number, SamplingParams(9)) for number in (5, 6)])
    engine.step()
    engine.release_memory()
    engine.release_memory()
    assert engine.num_unfinished == 2, "requests in flight are kept"
    with pytest.raises(RuntimeError, match="before the policy was loaded"):
        engine.step()
    engine.load_policy(model.state_dict(), 1)
    engine.step()
    assert host.commands == ["admit [5, 6]", "decode", "sleep", "load", "admit [5, 6]", "decode"]


def test_a_cpu_keeps_its_cache(model):
    host = Recorder()
    engine = on("cpu", model, host)
    engine.submit([Request(5, (1, 2, 3), 5, SamplingParams(9))])
    engine.step()
    engine.release_memory()
    engine.step()
    assert host.commands == ["admit [5]", "decode", "decode"]
