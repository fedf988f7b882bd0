"""What vLLM is given of this project: what draws tokens, and where weights come from.

Two of vLLM's own extension points are used. A *worker extension* runs methods inside each worker: it puts in place
what draws tokens and verifies drafts (`counter`). A *weight transfer engine* receives new weights: here from memory
that this process shares with the node, on the host or on a GPU.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from swarm.engine.vllm.adapters import unpacked
from swarm.engine.vllm.counter import CounterNoise, CounterSampler, CounterVerifier
from swarm.engine.vllm.handles import opened
from swarm.engine.vllm.shared import SharedWeights, WeightPlace
from swarm.lora import Adapter

__all__ = ["TRANSFER_BACKEND", "SharedWeightTransfer", "WorkerExtension"]

TRANSFER_BACKEND = "swarm-shared"


@dataclass
class SharedInitInfo(WeightTransferInitInfo):
    """Where the shared memory is."""

    pid: int  # the engine process, whose child this is where several share the policy
    fd: int | None  # it has it open; None: weights lie on a GPU, and each update says where
    places: list[list[Any]]  # fields of WeightPlace


@dataclass
class SharedUpdateInfo(WeightTransferUpdateInfo):
    """What an update brings beside the weights that lie in the shared memory of the host."""

    handles: list[list[Any]] = field(default_factory=list)  # see `handles`
    adapters: list[list[Any]] = field(default_factory=list)  # see `adapters`


class SharedWeightTransfer(WeightTransferEngine[SharedInitInfo, SharedUpdateInfo]):
    """Loads what lies in shared memory, with adapters merged, and insists on every weight that the model has."""

    init_info_cls = SharedInitInfo
    update_info_cls = SharedUpdateInfo

    def init_transfer_engine(self, init_info: SharedInitInfo) -> None:
        """Map the memory."""
        places = (WeightPlace(name, dtype, tuple(shape), at) for name, dtype, shape, at in init_info.places)
        fd = init_info.fd
        if fd is not None and os.getpid() != init_info.pid:
            fd = os.open(f"/proc/{init_info.pid}/fd/{fd}", os.O_RDWR)
        self._weights = None if fd is None else SharedWeights(fd, tuple(places))

    def start_weight_update(self) -> None:
        """Bring the model's layers back to the shapes of a checkpoint."""
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        self._tied = names - {name for name, _ in self.model.named_parameters()}  # they are what another name loads
        initialize_layerwise_reload(self.model)
        self._wanted = {name for name, _ in self.model.named_parameters()} - self._tied

    def receive_weights(self, update_info: SharedUpdateInfo) -> None:
        """Load every weight. Raises RuntimeError where the model has one that was not among them."""
        if self._weights is None:
            # The policy's GPU is the first that is seen here, whichever of several is this process's own.
            weights: Mapping[str, torch.Tensor] = opened(update_info.handles, 0)
        else:
            weights = self._weights.views()
        loaded = self.model.load_weights(_merged(weights, unpacked(update_info.adapters, self.device)))
        missing = self._wanted - set(loaded)
        if missing:
            raise RuntimeError(f"weights that no tensor of the policy was loaded into: {sorted(missing)}")

    def finish_weight_update(self) -> None:
        """Let the layers pack what they were given.

        On CPUs a layer with a tied weight packs a copy of it, and vLLM packs only layers that were loaded themselves:
        a tied LM head would go on with the old policy's.
        """
        finalize_layerwise_reload(self.model, self.model_config)
        for name in self._tied:
            layer = self.model.get_submodule(name.rpartition(".")[0])
            vars(layer).pop("_already_called_process_weights_after_loading", None)
            layer.quant_method.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Let go of the memory."""
        if self._weights is not None:
            self._weights.close()


def _merged(weights: Mapping[str, torch.Tensor], adapters: Mapping[str, Adapter]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight, one merged at a time."""
    for name, weight in weights.items():
        adapter = adapters.get(name)
        yield name, weight if adapter is None else adapter.merged(weight.to(adapter.a.device))


class WorkerExtension:
    """Methods that run inside each of vLLM's workers."""

    model_runner: Any

    def draw_by_counter(self, num_draft_tokens: int) -> None:
        """Draw tokens by their request's noise from now on. num_draft_tokens: of one draft, at most; 0: no drafts.

        The noise is put among vLLM's logits processors here: named in its settings, vLLM refuses it beside drafts,
        because it would not apply such a processor to them. This one changes no logits.
        """
        runner = self.model_runner
        runner.input_batch.logitsprocs.argmax_invariant.append(CounterNoise(None, runner.device, False))
        runner.sampler = CounterSampler()
        if num_draft_tokens:
            runner.rejection_sampler = CounterVerifier(runner)
            # Near the longest sequence vLLM would draft nonsense itself; the node's drafts always fit.
            runner.effective_drafter_max_model_len = runner.max_model_len + num_draft_tokens

    def states(self) -> dict[str, Any]:
        """Return what the last tokens were drawn from; see CounterVerifier."""
        states: dict[str, Any] = self.model_runner.rejection_sampler.states()
        return states


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, SharedWeightTransfer)
