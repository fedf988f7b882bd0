"""What the contract is tested on: engines by name, over tiny random models of several families.

SWARM_TEST_DEVICE names the device, as torch does; without it everything runs on the CPU. There the runners for other
devices run as well: through the pass that is recorded on a GPU, as it is or recorded operation by operation. An engine
is added by naming it in SETUPS and making it in `Kind.engine`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from swarm.config import EngineConfig
from swarm.devices import look_at
from swarm.drafting.speculator import MAX_DEPTH, Speculator
from swarm.engine.base import Engine
from swarm.engine.torch import TorchEngine
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.graphs import GraphPool, Recorder
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeRunner
from swarm.engine.torch.runner import ModelRunner
from swarm.engine.torch.slot_pass import SlotPass
from swarm.engine.vllm import VllmEngine, VllmHost
from swarm.engine.vllm.installed import find_vllm, why_not
from swarm.types import Completion
from tests.unit.swarm.recording import OpsRecorder

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaConfig(vocab_size=203, **_SIZES),
    "qwen2": lambda: Qwen2Config(vocab_size=208, tie_word_embeddings=True, **_SIZES),
    "qwen3": lambda: Qwen3Config(vocab_size=250, head_dim=32, **_SIZES),
    # vLLM's attention on CPUs has no heads of 16 values
    "llama-wide": lambda: LlamaConfig(vocab_size=203, head_dim=32, **_SIZES),
}
SPECULATING_FAMILY = "llama-wide"  # whose vLLM process makes room for drafts; the others run as without speculation
DEVICE = torch.device(os.environ.get("SWARM_TEST_DEVICE", "cpu"))
ON_CPU = DEVICE.type == "cpu"


@dataclass(frozen=True)
class Setup:
    """How an engine runs a model. Without a runner it is vLLM."""

    runner: type[ModelRunner] | None
    dtype: torch.dtype
    batch_invariant: bool = False  # whether it promises the same bits whatever shares the batch
    device_step: bool = False  # on the CPU: decode by the passes for other devices, which `recorder` records
    recorder: Callable[[], Recorder | None] = lambda: None
    record_graphs: bool = True

    @property
    def is_torch(self) -> bool:
        return self.runner is not None

    @property
    def families(self) -> tuple[str, ...]:
        """The first stands for all where one is enough. Of vLLM each is a process, which takes seconds to start."""
        if self.is_torch:
            return ("llama", "qwen2", "qwen3")
        return ("llama-wide", "qwen3") if self.dtype == torch.float32 else ("qwen3",)


VLLM_SETUPS = {"vllm-fp32": Setup(None, torch.float32), "vllm-bf16": Setup(None, torch.bfloat16)}
NO_VLLM = why_not(find_vllm(), look_at(DEVICE))
SETUPS = {
    "native-fp32": Setup(NativeRunner, torch.float32, batch_invariant=True),
    "native-bf16": Setup(NativeRunner, torch.bfloat16, batch_invariant=True),
    "llama-fp32": Setup(LlamaRunner, torch.float32),
    "generic-fp32": Setup(GenericRunner, torch.float32),
    "llama-fp32-device-step": Setup(LlamaRunner, torch.float32, device_step=True, recorder=OpsRecorder),
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


SETUPS |= VLLM_SETUPS


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

    @property
    def speculates(self) -> bool:
        """Whether it was started so that drafters may be given to it."""
        return self.setup.is_torch or self.family == SPECULATING_FAMILY

    @property
    def shares_prefills(self) -> bool:
        """Whether equal prompts that start together are computed once, however short they are."""
        return self.setup.is_torch

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
        if not setup.is_torch:
            return shared_process(self.family, setup.dtype).engine(
                self.other_model(seed), eos, EngineConfig(max_slots=max_slots), max_seq_len, speculator
            )
        engine = TorchEngine(
            self.other_model(seed), eos_token_ids=eos, config=EngineConfig(max_slots=max_slots),
            max_seq_len=max_seq_len, runner=setup.runner, record_graphs=setup.record_graphs,
            speculator=speculator,
        )  # fmt: skip
        if setup.device_step:
            engine._slot_pass = SlotPass(engine._runner, max_slots, max_seq_len, GraphPool(setup.recorder()))
        return engine


class Turn:
    """What an engine sees of a process that several engines of one shape use in turn: a process takes seconds to start.

    An engine whose turn ends has its requests taken back, and its next turn begins with its weights.
    """

    def __init__(self, process: "SharedProcess", state: dict[str, torch.Tensor]) -> None:
        self._process, self._state = process, state
        self.engine: VllmEngine | None = None

    def _begin(self) -> None:
        before = self._process.turn
        if before is not self:
            if before is not None and before.engine is not None:
                before.engine._take_back()
            self._process.host.load(self._state)
            self._process.turn = self

    def admit(self, requests, wants_states=False):
        self._begin()
        return self._process.host.admit(requests, wants_states)

    def decode(self, drafts=(), wants_states=False):
        self._begin()
        return self._process.host.decode(drafts, wants_states)

    def drop(self, numbers) -> None:
        if self._process.turn is self:
            self._process.host.drop(numbers)

    def load(self, state) -> None:
        self._state = {name: tensor.clone() for name, tensor in state.items()}
        self._process.turn = None
        self._begin()

    def close(self) -> None:
        self.engine = None


class SharedProcess:
    """A vLLM process, and whose turn it is."""

    def __init__(self, model: Any, num_draft_tokens: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # it is killed in the end, and so leaves no coverage data: to measure it would only make it slow
            patch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
            self.host = VllmHost(
                model, max_slots=512, max_seq_len=256, kv_cache_bytes=64 * 2**20, num_draft_tokens=num_draft_tokens
            )
        self.turn: Turn | None = None

    def engine(
        self, model: Any, eos: Sequence[int], config: EngineConfig, max_seq_len: int, speculator: Speculator | None
    ) -> VllmEngine:
        turn = Turn(self, model.state_dict())
        turn.engine = VllmEngine(
            model, eos_token_ids=eos, config=config, max_seq_len=max_seq_len, host=turn, speculator=speculator
        )
        return turn.engine


@cache
def shared_process(family: str, dtype: torch.dtype) -> SharedProcess:
    return SharedProcess(tiny_model(family, dtype), MAX_DEPTH if family == SPECULATING_FAMILY else 0)


def _kinds(names: Sequence[str], *, all_families: bool) -> list[Any]:
    kinds = []
    for name in names:
        setup = SETUPS[name]
        marks = [pytest.mark.skip(reason=NO_VLLM)] if NO_VLLM and not setup.is_torch else []
        for family in setup.families if all_families else setup.families[:1]:
            kinds.append(pytest.param(Kind(name, family), id=f"{name}-{family}", marks=marks))
    return kinds


def _names(dtype: torch.dtype | None = None) -> list[str]:
    """Return the setups of a dtype, or all whose completions do not depend on what shares the batch."""
    if dtype is not None:
        return [name for name, setup in SETUPS.items() if setup.dtype == dtype]
    return [name for name, setup in SETUPS.items() if setup.batch_invariant or setup.dtype == torch.float32]


# kind: every engine but those in bf16 whose rounding, and so whose nearest ties, depend on the batch. exact_kind: every
# engine in float32, over every family. bf16_kind: in bf16.
KINDS = {
    "kind": _kinds(_names(), all_families=False),
    "exact_kind": _kinds(_names(torch.float32), all_families=True),
    "bf16_kind": _kinds(_names(torch.bfloat16), all_families=True),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "drafts: asked of engines that verify requests' drafts")
    config.addinivalue_line("markers", "speculation: asked of engines that verify drafters' drafts")
    config.addinivalue_line("markers", "inside_torch: changes what is inside the torch engine")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test of engines each of them in turn; marked `drafts` or `speculation` only such as verify them."""
    if not metafunc.module.__name__.rpartition(".")[2].startswith("test_engine"):
        return
    for name, kinds in KINDS.items():
        if name in metafunc.fixturenames:
            if any(map(metafunc.definition.get_closest_marker, ("drafts", "inside_torch"))):
                kinds = [each for each in kinds if each.values[0].setup.is_torch]
            if metafunc.definition.get_closest_marker("speculation"):
                kinds = [each for each in kinds if each.values[0].speculates]
            metafunc.parametrize(name, kinds, scope="session")
