"""What the contract is tested on: engines by name, over tiny random models of several families.

SWARM_TEST_DEVICE names the device, as torch does; without it everything runs on the CPU. There the runners for other
devices run as well: through the step that is recorded on a GPU, as it is.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from swarm.config import EngineConfig
from swarm.drafting.speculator import Speculator
from swarm.engine.base import Engine
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.graphs import DecodeStep
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeRunner
from swarm.engine.torch.runner import ModelRunner
from swarm.types import Completion

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(vocab_size=203, **_SIZES),
    "qwen2": lambda: Qwen2Config(vocab_size=208, tie_word_embeddings=True, **_SIZES),
    "qwen3": lambda: Qwen3Config(vocab_size=250, head_dim=32, **_SIZES),
}
DEVICE = torch.device(os.environ.get("SWARM_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"


@dataclass(frozen=True)
class Setup:
    """How an engine runs a model."""

    runner: type[ModelRunner]
    dtype: torch.dtype
    batch_invariant: bool = False  # whether it promises the same bits whatever shares the batch
    device_step: bool = False  # on the CPU: decode by the step for other devices
    record_graphs: bool = True


SETUPS = {
    "native-fp32": Setup(NativeRunner, torch.float32, batch_invariant=True),
    "native-bf16": Setup(NativeRunner, torch.bfloat16, batch_invariant=True),
    "llama-fp32": Setup(LlamaRunner, torch.float32),
    "generic-fp32": Setup(GenericRunner, torch.float32),
    "llama-fp32-device-step": Setup(LlamaRunner, torch.float32, device_step=True),
    "generic-fp32-device-step": Setup(GenericRunner, torch.float32, device_step=True),
}
if not ON_CPU:
    SETUPS = {
        "llama-fp32": Setup(LlamaRunner, torch.float32),
        "generic-fp32": Setup(GenericRunner, torch.float32),
        "llama-fp32-unrecorded": Setup(LlamaRunner, torch.float32, record_graphs=False),
        "llama-bf16": Setup(LlamaRunner, torch.bfloat16),
        "generic-bf16": Setup(GenericRunner, torch.bfloat16),
    }


@cache
def tiny_model(family: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A random model that says different things after different prefixes: no weight is left at its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(DEVICE, dtype).requires_grad_(False)


@dataclass(frozen=True)
class Kind:
    """One engine over one model."""

    name: str
    family: str

    @property
    def setup(self) -> Setup:
        return SETUPS[self.name]

    @property
    def batch_invariant(self) -> bool:
        return self.setup.batch_invariant

    def check_same(self, got: Completion, expected: Completion) -> None:
        """Token for token; and bit for bit where the engine promises that."""
        assert (got.token_ids, got.segments, got.finish_reason) == (
            expected.token_ids, expected.segments, expected.finish_reason,
        )  # fmt: skip
        if self.batch_invariant:
            assert got.logprobs == expected.logprobs
        else:
            assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)

    @property
    def model(self) -> Any:
        return self.other_model(0)

    def other_model(self, seed: int) -> Any:
        return tiny_model(self.family, self.setup.dtype, seed)

    def engine(
        self, *, max_slots: int = 4, max_seq_len: int = 96, eos: Sequence[int] = (), seed: int = 0,
        speculator: Speculator | None = None,
    ) -> Engine:  # fmt: skip
        setup = self.setup
        engine = TorchEngine(
            self.other_model(seed), eos_token_ids=eos, config=EngineConfig(max_slots=max_slots),
            max_seq_len=max_seq_len, runner=setup.runner, record_graphs=setup.record_graphs,
            speculator=speculator,
        )  # fmt: skip
        if setup.device_step:
            engine._decode_step = DecodeStep(engine._runner, max_slots, max_seq_len)
        return engine


def _kinds(names: Sequence[str], families: Sequence[str]) -> list[Any]:
    return [pytest.param(Kind(name, family), id=f"{name}-{family}") for name in names for family in families]


def _names(dtype: torch.dtype | None = None) -> list[str]:
    """Return the setups of a dtype, or all whose completions do not depend on what shares the batch."""
    if dtype is not None:
        return [name for name, setup in SETUPS.items() if setup.dtype == dtype]
    return [name for name, setup in SETUPS.items() if setup.batch_invariant or setup.dtype == torch.float32]


@pytest.fixture(scope="session", params=_kinds(_names(), ["llama"]))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine but those in bf16 whose rounding, and so whose nearest ties, depend on the batch."""
    return request.param


@pytest.fixture(scope="session", params=_kinds(_names(torch.float32), list(FAMILIES)))
def exact_kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine in float32, over every family."""
    return request.param


@pytest.fixture(scope="session", params=_kinds(_names(torch.bfloat16), list(FAMILIES)))
def bf16_kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine in bf16, over every family."""
    return request.param
