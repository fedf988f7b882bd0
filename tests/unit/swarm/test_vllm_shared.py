"""What passes between a node and its vLLM process, without a vLLM."""

import os
import threading
from types import SimpleNamespace

import msgpack
import pytest
import torch
from torch.storage import TypedStorage

from swarm.config import EngineConfig, ModelConfig
from swarm.devices import DeviceFacts
from swarm.engine.vllm import adapters, memory
from swarm.engine.vllm.handles import from_plain, plain
from swarm.engine.vllm.host import _environment
from swarm.engine.vllm.memory import bytes_per_token, kv_cache_bytes, memory_share
from swarm.engine.vllm.pipe import Pipe
from swarm.engine.vllm.shared import SharedWeights
from swarm.errors import EngineError
from swarm.lora import Adapter
from swarm.policy import Policy, load_policy

MIB = 2**20
# what torch hands out for a weight on the GPU that it calls 3: [2, 3] from the 7th value of its memory on
RECORDED = (
    torch.Tensor, torch.Size([2, 3]), (3, 1), 7, TypedStorage, torch.bfloat16, 3,
    b"\x00memory\xff", 2048, 512, False, b"counter", 4, b"event", True,
)  # fmt: skip


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


def test_gpus_that_share_the_heads_share_cache_and_weights(tiny, monkeypatch):
    heads = tiny.model.config.num_key_value_heads
    assert bytes_per_token(tiny.model, heads) == bytes_per_token(tiny.model) / heads
    assert bytes_per_token(tiny.model, 2 * heads) == bytes_per_token(tiny.model) / heads, "a head is not cut"
    facts = DeviceFacts("cuda", "GPU", 4000 * MIB, 400 * MIB, True, True, num_gpus=2)
    monkeypatch.setattr(memory, "look_at", lambda _: facts)
    gpu = SimpleNamespace(
        device=torch.device("cuda"), config=tiny.model.config, dtype=tiny.model.dtype, parameters=tiny.model.parameters
    )
    num_bytes = sum(parameter.nbytes for parameter in tiny.model.parameters())
    config = EngineConfig(max_slots=1 << 20, tensor_parallel_size=2)
    assert kv_cache_bytes(gpu, config, 256) == (400 * MIB - num_bytes // 2) // 2
    assert memory_share(gpu, 100 * MIB, 2) == pytest.approx((100 * MIB + num_bytes // 2) / (4000 * MIB))


def test_a_kv_cache_that_does_not_fit_names_the_setting(tiny):
    assert kv_cache_bytes(tiny.model, EngineConfig(max_slots=4096, kv_cache_mb=64), 256) == 64 * 2**20
    with pytest.raises(EngineError, match=r"engine\.kv_cache_mb is 1: lower engine\.max_seq_len"):
        kv_cache_bytes(tiny.model, EngineConfig(kv_cache_mb=1), 4096)


def test_a_kv_cache_leaves_the_trainer_half_of_what_is_free_beside_the_weights(tiny, monkeypatch):
    facts = DeviceFacts("cpu", "CPU", 4000 * MIB, 400 * MIB, True, False)
    monkeypatch.setattr(memory, "look_at", lambda _: facts)
    num_bytes = sum(parameter.nbytes for parameter in tiny.model.parameters())
    assert kv_cache_bytes(tiny.model, EngineConfig(max_slots=4096), 256) == (400 * MIB - 2 * num_bytes) // 2
    assert memory_share(tiny.model, 100 * MIB) == pytest.approx((100 * MIB + 2 * num_bytes) / (4000 * MIB))
    with pytest.raises(EngineError, match=r"500 MiB does not fit: .* lower engine\.kv_cache_mb"):
        kv_cache_bytes(tiny.model, EngineConfig(max_slots=4096, kv_cache_mb=500), 256)


def test_a_handle_is_plain_values_and_comes_out_on_the_other_process_device():
    sent = msgpack.unpackb(msgpack.packb(plain(RECORDED)))
    assert from_plain(sent, 0) == (*RECORDED[:6], 0, *RECORDED[7:])


def test_adapters_cross_bit_for_bit():
    a, b = torch.randn(2, 5), torch.randn(3, 2).to(torch.bfloat16).T.contiguous().T
    given = {"layer.weight": Adapter(a, b, 0.5, is_transposed=True)}
    (name, got), *others = adapters.unpacked(
        msgpack.unpackb(msgpack.packb(adapters.packed(given))), torch.device("cpu")
    ).items()
    assert (name, got.scaling, got.is_transposed, others) == ("layer.weight", 0.5, True, [])
    assert torch.equal(got.a, a)
    assert torch.equal(got.b, b)
    assert got.b.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ours", "device", "theirs"),
    [
        ({}, "cpu", {}),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, "cpu", {"CUDA_VISIBLE_DEVICES": "4,5"}),
        ({}, "cuda:1", {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "4, 5"}, "cuda:1", {"CUDA_VISIBLE_DEVICES": "5"}),
        ({"HIP_VISIBLE_DEVICES": "2,0"}, "cuda:0", {"HIP_VISIBLE_DEVICES": "2"}),
        ({"CUDA_VISIBLE_DEVICES": "6,7", "HIP_VISIBLE_DEVICES": "6,7"}, "cuda:1",
         {"CUDA_VISIBLE_DEVICES": "7", "HIP_VISIBLE_DEVICES": "7"}),
    ],
)  # fmt: skip
def test_vllm_sees_the_gpu_of_the_policy_alone(ours, device, theirs):
    environment = _environment(ours, "/folder", torch.device(device))
    assert {name: value for name, value in environment.items() if "VISIBLE" in name} == theirs
    assert environment["TMPDIR"] == "/folder"


@pytest.mark.parametrize(
    ("ours", "theirs"), [({}, "1,0,2"), ({"CUDA_VISIBLE_DEVICES": "4, 5,6,7"}, "5,4,6"), ({"RANK": "0"}, "1,0,2")]
)
def test_of_several_gpus_that_share_the_policy_its_own_is_the_first(ours, theirs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment = _environment(ours, "/folder", torch.device("cuda:1"), 3)
    assert environment["CUDA_VISIBLE_DEVICES"] == theirs
    assert "RANK" not in environment
