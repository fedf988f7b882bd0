"""A policy that vLLM spreads over two of its processes: the same tokens, and new weights in both.

On GPUs each has one; here both run on the CPU, which a node does not offer. It takes minutes of CPU: `make soak`.
"""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from swarm.config import EngineConfig
from swarm.devices import look_at
from swarm.engine.base import Request, SamplingParams
from swarm.engine.vllm import VllmEngine, VllmHost
from swarm.engine.vllm.installed import find_vllm, why_not

NO_VLLM = why_not(find_vllm(), look_at(torch.device("cpu")))
pytestmark = [pytest.mark.soak, pytest.mark.skipif(NO_VLLM is not None, reason=f"{NO_VLLM}")]
MIB = 2**20


def make_model(seed, tie):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tie, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def completions(engine):
    engine.submit([Request(number, (1, 2, 3, 4 + number), number, SamplingParams(8)) for number in range(3)])
    done = []
    while engine.num_unfinished:
        done += engine.step()
    return sorted(done, key=lambda one: one.request_id)


@pytest.mark.parametrize("tie", [True, False])
def test_two_processes_write_what_one_writes_before_and_after_a_load(tie, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # this machine's cores are no two nodes of memory
    model, later = make_model(0, tie), make_model(1, tie)
    written = []
    for num_gpus in (1, 2):
        host = VllmHost(model, max_slots=4, max_seq_len=128, kv_cache_bytes=64 * MIB, num_gpus=num_gpus)
        engine = VllmEngine(model, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=128, host=host)
        try:
            first = completions(engine)
            engine.load_policy(later.state_dict(), 1)
            written.append([*first, *completions(engine)])
        finally:
            engine.close()
    assert [one.token_ids for one in written[0]] == [one.token_ids for one in written[1]]
    assert [one.token_ids for one in written[0][:3]] != [one.token_ids for one in written[0][3:]]
    for one, two in zip(*written, strict=True):
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-3)
