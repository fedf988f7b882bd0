"""What the contract is tested on: engines by name, over tiny random models of several families."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from swarm.config import EngineConfig
from swarm.engine.base import Engine
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native.runner import NativeRunner
from swarm.engine.torch.runner import ModelRunner

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(vocab_size=203, **_SIZES),
    "qwen2": lambda: Qwen2Config(vocab_size=208, tie_word_embeddings=True, **_SIZES),
    "qwen3": lambda: Qwen3Config(vocab_size=250, head_dim=32, **_SIZES),
}
RUNNERS: dict[str, tuple[type[ModelRunner], torch.dtype]] = {
    "native-fp32": (NativeRunner, torch.float32),
    "native-bf16": (NativeRunner, torch.bfloat16),
    "llama-fp32": (LlamaRunner, torch.float32),
    "generic-fp32": (GenericRunner, torch.float32),
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
    return model.to(dtype).requires_grad_(False)


@dataclass(frozen=True)
class Kind:
    """One engine over one model."""

    name: str
    family: str

    @property
    def dtype(self) -> torch.dtype:
        return RUNNERS[self.name][1]

    @property
    def batch_invariant(self) -> bool:
        """Whether it promises the same bits whatever shares the batch."""
        return self.name.startswith("native")

    @property
    def model(self) -> Any:
        return self.other_model(0)

    def other_model(self, seed: int) -> Any:
        return tiny_model(self.family, self.dtype, seed)

    def engine(self, *, max_slots: int = 4, max_seq_len: int = 96, eos: Sequence[int] = (), seed: int = 0) -> Engine:
        return TorchEngine(
            self.other_model(seed), eos_token_ids=eos, config=EngineConfig(max_slots=max_slots),
            max_seq_len=max_seq_len, runner=RUNNERS[self.name][0],
        )  # fmt: skip


def _kinds(names: Sequence[str], families: Sequence[str]) -> list[Any]:
    return [pytest.param(Kind(name, family), id=f"{name}-{family}") for name in names for family in families]


@pytest.fixture(scope="session", params=_kinds(list(RUNNERS), ["llama"]))
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine."""
    return request.param


@pytest.fixture(scope="session", params=_kinds([name for name in RUNNERS if "fp32" in name], list(FAMILIES)))
def exact_kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine in float32, over every family."""
    return request.param


@pytest.fixture(scope="session", params=_kinds(["native-bf16"], list(FAMILIES)))
def bf16_kind(request: pytest.FixtureRequest) -> Kind:
    """Every engine in bf16, over every family."""
    return request.param
