"""The vLLM engine over a real vLLM: live weights, and what is left of its process. What it writes is the contract's."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from swarm.config import EngineConfig, ModelConfig
from swarm.devices import look_at
from swarm.engine.base import Request, SamplingParams
from swarm.engine.vllm import VllmEngine, VllmHost
from swarm.engine.vllm.installed import find_vllm, why_not
from swarm.errors import EngineFailed
from swarm.policy import load_policy

NO_VLLM = why_not(find_vllm(), look_at(torch.device("cpu")))
pytestmark = pytest.mark.skipif(NO_VLLM is not None, reason=f"{NO_VLLM}")

# bf16 rounds the hidden states of two orders of summation apart; a policy that was not loaded is nats away
TOLERANCE_NATS = 0.05
MIB = 2**20
NODE = """
import sys, time
from transformers import AutoModelForCausalLM, LlamaConfig
from swarm.engine.vllm import VllmHost
config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(config).eval()
host = VllmHost(model, max_slots=2, max_seq_len=64, kv_cache_bytes=2**24)
print(host.pid, flush=True)
time.sleep(600)
"""


def random_model(seed: int, dtype=torch.bfloat16):
    """A model whose head is its embedding: what vLLM packs of one weight for two layers has to be new in both."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=203, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype).requires_grad_(False)


def trainer_logprobs(model, request, completion) -> torch.Tensor:
    """What the trainer computes for the same tokens, [num_tokens]."""
    tokens = torch.tensor([request.prompt_ids + completion.token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(request.prompt_ids) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, tokens[0, len(request.prompt_ids) :, None])[:, 0]


def distance(model, requests, completions) -> float:
    """The mismatch metric of a round, over these completions."""
    pairs = zip(requests, completions, strict=True)
    parts = [(trainer_logprobs(model, *pair) - torch.tensor(pair[1].logprobs)).abs() for pair in pairs]
    return float(torch.cat(parts).mean())


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_live_weights_and_an_end_that_leaves_nothing():
    """The prompts stay the same and are longer than a cache block: stale attention state would be found again."""
    policies = [random_model(seed) for seed in range(3)]
    requests = [
        Request(index, tuple((7 * index + 3 * place) % 203 for place in range(300)), index, SamplingParams(40))
        for index in range(6)
    ]
    engine = VllmEngine(policies[0], eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=400)
    group = engine._host.pid
    assert distance(policies[0], requests, engine.generate(requests)) < TOLERANCE_NATS
    for version, policy in enumerate(policies[1:], 1):
        before = engine.stats.num_tokens_prefilled
        engine.load_policy(policy.state_dict(), version)
        completions = engine.generate(requests)
        assert distance(policy, requests, completions) < TOLERANCE_NATS
        # what the metric says where the engine went on with the policy before
        assert distance(policies[version - 1], requests, completions) > 20 * TOLERANCE_NATS
        assert engine.stats.num_tokens_prefilled - before == 6 * 300, "nothing of the old policy's cache was used"
    before = engine.stats.num_tokens_prefilled
    again = engine.generate(requests)
    assert engine.stats.num_tokens_prefilled - before < 6 * 100, "under one policy the cache is used"
    assert [one.token_ids for one in again] == [one.token_ids for one in completions]
    assert is_running(group)
    engine.close()
    engine.close()
    assert not is_running(group)


def test_a_killed_node_leaves_no_process():
    node = subprocess.Popen([sys.executable, "-c", NODE], stdout=subprocess.PIPE, text=True)
    assert node.stdout is not None
    group = int(node.stdout.readline())
    members = [process for process in psutil.process_iter() if os.getpgid(process.pid) == group]
    assert members
    node.kill()
    node.wait()
    node.stdout.close()
    _, alive = psutil.wait_procs(members, timeout=10)
    assert not alive


def test_an_engine_process_that_fails_is_said_with_its_end_and_leaves_nothing():
    class NoSuchModel(LlamaForCausalLM):
        pass

    model = random_model(0)
    model.__class__ = NoSuchModel
    with pytest.raises(EngineFailed, match="NoSuchModel"):
        VllmHost(model, max_slots=1, max_seq_len=64, kv_cache_bytes=16 * MIB)
    assert [child for child in psutil.Process().children() if "swarm.engine.vllm.child" in child.cmdline()] == []


@pytest.mark.soak
def test_a_weight_that_is_not_loaded_is_loud():
    model = random_model(0)
    whole = model.state_dict()
    model.state_dict = lambda: {name: tensor for name, tensor in whole.items() if name != "model.norm.weight"}
    with pytest.raises(EngineFailed, match=r"loaded into: \['model.norm.weight'\]"):
        VllmHost(model, max_slots=1, max_seq_len=64, kv_cache_bytes=16 * MIB)


@pytest.mark.soak
def test_a_cache_that_is_too_small_for_all_changes_nothing():
    """vLLM then takes requests out of the batch and computes them anew: their noise goes on where it was."""
    model = random_model(0, torch.float32)
    requests = [
        Request(index, tuple((7 * index + 3 * place) % 203 for place in range(100)), index, SamplingParams(280))
        for index in range(6)
    ]
    written = []
    for kv_cache_mb in (0, 2):
        config = EngineConfig(max_slots=6, kv_cache_mb=kv_cache_mb)
        engine = VllmEngine(model, eos_token_ids=(), config=config, max_seq_len=400)
        written.append([one.token_ids for one in engine.generate(requests)])
        engine.close()
    assert written[0] == written[1]


@pytest.mark.soak
def test_two_hundred_loads_of_a_real_model_do_not_grow_and_take_less_than_a_second():
    policy = load_policy(ModelConfig(name="smollm2-135m"))
    engine = VllmEngine(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=8), max_seq_len=256
    )
    processes = [psutil.Process(), psutil.Process(engine._host.pid)]
    state, seconds, sizes = policy.model.state_dict(), [], []
    for version in range(1, 201):
        begin = time.perf_counter()
        engine.load_policy(state, version)
        seconds.append(time.perf_counter() - begin)
        engine.generate([Request(0, tuple(range(40)), version, SamplingParams(4))])
        sizes.append(sum(process.memory_info().rss for process in processes))
    engine.close()
    seconds.sort()
    print(f"load: median {seconds[100]:.2f} s, longest {seconds[-1]:.2f} s; RSS after 20, 110, 200 loads:",
          [sizes[at] // MIB for at in (19, 109, 199)], "MiB")  # fmt: skip
    assert seconds[100] < 1.0
    assert sizes[199] - sizes[19] < 32 * MIB
