"""The vLLM engine over a real vLLM: live weights, and what is left of its process. What it writes is the contract's."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from swarm.config import EngineConfig, LoraConfig, ModelConfig
from swarm.devices import look_at
from swarm.engine.base import Request, SamplingParams
from swarm.engine.vllm import VllmEngine, VllmHost, host
from swarm.engine.vllm.installed import find_vllm, why_not
from swarm.engine.vllm.shared import SharedWeights
from swarm.errors import EngineFailed
from swarm.lora import AdaptedState, add_adapters, policy_state
from swarm.policy import load_policy

NO_VLLM = why_not(find_vllm(), look_at(torch.device("cpu")))
pytestmark = pytest.mark.skipif(NO_VLLM is not None, reason=f"{NO_VLLM}")

# bf16 rounds the hidden states of two orders of summation apart; a policy that was not loaded is nats away
TOLERANCE_NATS = 0.05
MIB = 2**20
PROGRAM = str(Path(sys.executable).parent / "swarm-node")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


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


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module", autouse=True)
def processes_are_not_measured():
    """An engine process is always killed, and so leaves no coverage data: to measure it would only make it slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """Where the engine's temporary files are."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def engine(temporary):
    """One for most tests, with whatever policy the last one left: a process takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        engine = VllmEngine(random_model(0), eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=400)
    yield engine
    engine.close()


# longer than a cache block: stale attention state would be found again
REQUESTS = [
    Request(index, tuple((7 * index + 3 * place) % 203 for place in range(300)), index, SamplingParams(24))
    for index in range(6)
]


def test_engine_and_trainer_agree_and_nothing_of_an_old_policy_is_served(engine):
    for version, policy in enumerate((random_model(1), random_model(2)), 1):
        before = engine.stats.num_tokens_prefilled
        engine.load_policy(policy.state_dict(), version)
        completions = engine.generate(REQUESTS)
        assert distance(policy, REQUESTS, completions) < TOLERANCE_NATS
        assert engine.stats.num_tokens_prefilled - before == 6 * 300, "nothing of the old policy's cache was used"
    before = engine.stats.num_tokens_prefilled
    again = engine.generate(REQUESTS)
    assert engine.stats.num_tokens_prefilled - before < 6 * 100, "under one policy the cache is used"
    assert [one.token_ids for one in again] == [one.token_ids for one in completions]


def test_a_load_that_is_missed_or_half_done_is_seen_in_the_log_probs(engine, monkeypatch):
    """By the metric that every round has: far beyond what rounding gives."""
    old, new = random_model(3), random_model(4)
    engine.load_policy(old.state_dict(), 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine._host, "load", lambda state: None)
        engine.load_policy(new.state_dict(), 2)
    assert distance(new, REQUESTS, engine.generate(REQUESTS)) > 20 * TOLERANCE_NATS
    head = dict(new.state_dict(), **{"model.embed_tokens.weight": old.state_dict()["model.embed_tokens.weight"]})
    engine.load_policy(head, 3)
    assert distance(new, REQUESTS, engine.generate(REQUESTS)) > 20 * TOLERANCE_NATS
    engine.load_policy(new.state_dict(), 4)
    assert distance(new, REQUESTS, engine.generate(REQUESTS)) < TOLERANCE_NATS


def test_of_a_policy_with_adapters_these_alone_are_handed_over(engine, monkeypatch):
    model, plain, sent = random_model(5), random_model(0), []
    add_adapters(model, LoraConfig(rank=4))
    engine.load_policy(policy_state(model), 1)

    def call(*message):
        sent.append(message)
        return VllmHost._call(engine._host, *message)

    with monkeypatch.context() as patch:
        patch.setattr(SharedWeights, "write", lambda *_: pytest.fail("the weights were written again"))
        patch.setattr(engine._host, "_call", call)
        written = []
        for version in (2, 3):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.normal_(std=0.04)
            state = policy_state(model)
            assert isinstance(state, AdaptedState)
            engine.load_policy(state, version)
            written.append(engine.generate(REQUESTS))
    for _, handles, adapters in (message for message in sent if message[0] == "load"):
        assert handles == []
        num_bytes = sum(len(matrix[2]) for _, a, b, *_ in adapters for matrix in (a, b))
        assert num_bytes == sum(4 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    plain.load_state_dict(state)
    assert distance(plain, REQUESTS, written[1]) < TOLERANCE_NATS < distance(plain, REQUESTS, written[0])
    engine.load_policy(plain.state_dict(), 4)
    assert [one.logprobs for one in engine.generate(REQUESTS)] == [one.logprobs for one in written[1]]


def test_a_process_that_slept_goes_on_with_the_next_policy(engine):
    """What is done on a GPU; a CPU has nothing to give back, and vLLM says so and goes on."""
    policy = random_model(6)
    engine._take_back()
    engine._host.sleep()
    engine.load_policy(policy.state_dict(), 1)
    assert distance(policy, REQUESTS, engine.generate(REQUESTS)) < TOLERANCE_NATS


def test_a_killed_node_leaves_neither_process_nor_file(tmp_path):
    """And while it lives, its metrics show that engine and trainer agree."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    settings = ("engine.max_slots=8", "evaluation.num_items=0")
    node = subprocess.Popen(
        [PROGRAM, "silo", "--engine", "vllm", "--model", "tiny", "--run-dir", "run", "--rounds", "100000",
         *(text for setting in settings for text in ("--set", setting))],
        cwd=tmp_path, env={**os.environ, **ENVIRONMENT, "TMPDIR": str(temporary)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert node.poll() is None, "the node ended"
        assert time.monotonic() < deadline, "waited too long for three rounds"
        time.sleep(0.05)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[:3]]
    assert all(row["mismatch"] is None or row["mismatch"] < 1e-3 for row in rows)
    assert any(row["mismatch"] is not None for row in rows)
    members = psutil.Process(node.pid).children(recursive=True)
    assert any("swarm.engine.vllm.child" in member.cmdline() for member in members)
    node.kill()
    node.wait()
    _, alive = psutil.wait_procs(members, timeout=10)
    assert not alive
    assert [path for path in temporary.rglob("*") if "vllm" in path.name] == []


def test_the_end_of_an_engine_leaves_nothing(engine, temporary):
    """The last test that uses it."""
    group = engine._host.pid
    assert is_running(group)
    assert list(temporary.rglob("vllm_dist_*")) != [], "vLLM writes no such file any more: nothing is shown here"
    engine.close()
    engine.close()
    assert not is_running(group)
    assert list(temporary.iterdir()) == []


def test_a_vllm_that_does_not_start_is_said_with_its_end_and_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "vllm.py").write_text("raise ImportError('no libtbb.so.12 on this machine')\n")
    monkeypatch.setattr(host, "_environment", lambda *_: {**os.environ, "PYTHONPATH": str(tmp_path)})
    before = children()
    with pytest.raises(EngineFailed, match=r"ImportError: no libtbb\.so\.12"):
        VllmHost(random_model(0), max_slots=1, max_seq_len=64, kv_cache_bytes=16 * MIB)
    assert children() == before


@pytest.mark.soak
def test_a_model_that_vllm_does_not_know_is_named():
    class NoSuchModel(LlamaForCausalLM):
        pass

    model = random_model(0)
    model.__class__ = NoSuchModel
    with pytest.raises(EngineFailed, match="NoSuchModel"):
        VllmHost(model, max_slots=1, max_seq_len=64, kv_cache_bytes=16 * MIB)


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
