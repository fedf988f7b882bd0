"""What vLLM is given of this project: the noise that draws tokens, and where weights come from.

Three of vLLM's own extension points are used. A *logits processor* is told which request stands in which row, with
the parameters and the tokens that it has; `CounterNoise` keeps from that what `swarm.engine.torch.sampling` wants to
know. A *worker extension* runs methods inside each worker: it puts a sampler in place that draws by that noise, so
that a completion is the same tokens as from the torch engine, whatever shares the batch. A *weight transfer engine*
receives new weights: here from memory that this process shares with the node, on the host or on a GPU.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.interface import LogitsProcessor, MoveDirectionality
from vllm.v1.sample.sampler import Sampler

from swarm.engine.torch.sampling import Mode, sample
from swarm.engine.vllm.adapters import unpacked
from swarm.engine.vllm.handles import opened
from swarm.engine.vllm.shared import SharedWeights, WeightPlace
from swarm.lora import Adapter

__all__ = ["TRANSFER_BACKEND", "CounterNoise", "CounterSampler", "SharedWeightTransfer", "WorkerExtension"]

TRANSFER_BACKEND = "swarm-shared"


@dataclass(slots=True)
class _Row:
    """What draws the tokens of one row of the batch."""

    seed: int  # by its bits, as int64
    start: int  # tokens of the completion that were given as prompt
    written: list[int]  # vLLM's own list of what it has written since
    temperature: float
    top_k: int
    top_p: float


class CounterNoise(LogitsProcessor):
    """Knows which request each row of the batch belongs to. Leaves the logits as they are."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, _Row] = {}

    def is_argmax_invariant(self) -> bool:
        """It changes nothing."""
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Change nothing."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Follow what came, went and moved, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, written in batch_update.added:
            self._rows[index] = _Row(written=written, **params.extra_args["swarm"])
        for first, second, direction in batch_update.moved:
            moved, other = self._rows.pop(first, None), self._rows.pop(second, None)
            if moved is not None:
                self._rows[second] = moved
            if other is not None and direction == MoveDirectionality.SWAP:
                self._rows[first] = other

    def draw(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next token of every row and its log-probability. logits: [num_rows, vocab]."""
        rows = [self._rows[index] for index in range(len(logits))]
        seeds = np.array([row.seed for row in rows], dtype=np.int64)
        positions = np.array([row.start + len(row.written) for row in rows], dtype=np.int64)
        temperature = np.array([row.temperature for row in rows], dtype=np.float32)
        top_k = np.array([row.top_k for row in rows], dtype=np.int64)
        top_p = np.array([row.top_p for row in rows], dtype=np.float32)
        columns = (torch.from_numpy(each).to(self._device) for each in (seeds, positions, temperature, top_k, top_p))
        return sample(logits, *columns, mode=Mode.of(temperature, top_k, top_p))


class CounterSampler(Sampler):
    """Draws by the noise of (seed, position) alone, in place of vLLM's own generators."""

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *unused: Any, **unused_too: Any) -> SamplerOutput:
        """Draw one token a row. logits: [num_rows, vocab]."""
        noise = next(each for each in sampling_metadata.logitsprocs.all if isinstance(each, CounterNoise))
        tokens, logprobs = noise.draw(logits)
        column = tokens.to(torch.int32)[:, None]
        ranks = torch.zeros_like(tokens)  # asked for by the record, read by nobody here
        return SamplerOutput(column, LogprobsTensors(column, logprobs[:, None], ranks))


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

    def draw_by_counter(self) -> None:
        """Draw tokens by their request's noise from now on."""
        self.model_runner.sampler = CounterSampler()


WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, SharedWeightTransfer)
