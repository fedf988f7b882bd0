"""What passes between a node and its vLLM process, without a vLLM."""

import os
import threading

import pytest
import torch

from swarm.config import EngineConfig, ModelConfig
from swarm.engine.vllm.memory import bytes_per_token, kv_cache_bytes
from swarm.engine.vllm.pipe import Pipe
from swarm.engine.vllm.shared import SharedWeights
from swarm.errors import EngineError
from swarm.policy import Policy, load_policy


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return load_policy(ModelConfig())


def state() -> dict[str, torch.Tensor]:
    embedding = torch.randn(7, 3, dtype=torch.bfloat16)
    return {"embedding": embedding, "scale": torch.randn(5), "empty": torch.zeros(0), "head": embedding}


def test_another_mapping_sees_what_is_written_and_nothing_is_held_twice():
    given = state()
    ours = SharedWeights.allocate(given)
    theirs = SharedWeights(os.dup(ours.fd), ours.places)
    assert list(theirs.views()) == ["embedding", "scale", "empty"]
    ours.write(given)
    for name, view in theirs.views().items():
        torch.testing.assert_close(view, given[name], rtol=0, atol=0)
    given["scale"].fill_(3)
    assert not bool((theirs.views()["scale"] == 3).any()), "what the trainer changes is not seen before it is written"
    ours.write(given)
    assert bool((theirs.views()["scale"] == 3).all())
    ours.close()
    theirs.close()


def test_messages_of_any_size_and_the_end():
    first, second = os.pipe(), os.pipe()
    here, there = Pipe(first[0], second[1]), Pipe(second[0], first[1])
    message = ["step", [[1, list(range(70_000)), -0.5, None, {"seed": -(1 << 63)}]], "x" * 3_000_000]
    sender = threading.Thread(target=there.send, args=(message,))
    sender.start()
    assert here.receive() == message
    sender.join()
    there.close()
    with pytest.raises(EOFError):
        here.receive()
    with pytest.raises(BrokenPipeError):
        here.send(["step", []])
    here.close()


def test_the_kv_cache_is_what_the_slots_need(tiny):
    per_token = bytes_per_token(tiny.model)
    config = tiny.model.config
    assert per_token == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    few, many = (kv_cache_bytes(tiny.model, EngineConfig(max_slots=slots), 100) for slots in (1, 9))
    assert few >= 2 * 100 * per_token
    assert many == 5 * few


def test_a_kv_cache_that_does_not_fit_names_the_setting(tiny):
    assert kv_cache_bytes(tiny.model, EngineConfig(max_slots=4096, kv_cache_mb=64), 256) == 64 * 2**20
    with pytest.raises(EngineError, match=r"engine\.kv_cache_mb is 1: lower engine\.max_seq_len"):
        kv_cache_bytes(tiny.model, EngineConfig(kv_cache_mb=1), 4096)
