"""AdamW over fp32 master weights that lie in one flat tensor.

Master weights, gradients and both moments are four flat fp32 tensors: a step is one fused kernel call, a
gradient norm one reduction, a checkpoint three tensors. Parameters of the model that are fp32 become views of
the master weights. Parameters of lower precision (bf16) stay where they are as compute weights: after a step
they are rounded from the master weights, so that steps smaller than a bf16 digit add up instead of
vanishing. Their gradients are added to the flat fp32 gradient as soon as the backward pass has one complete,
and freed: microbatches then add up in fp32, and no second set of gradients exists.

`sharding` has the same optimizer over weights that several processes share; both keep their state in one layout.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from swarm.config import TrainerConfig
from swarm.errors import CheckpointError

__all__ = ["NORM_BLOCK", "FlatAdamW", "FlatLayout", "PolicyOptimizer", "step_at"]

_ALIGNMENT = 64  # elements: every parameter starts on a cache line, as kernels like it
NORM_BLOCK = 1 << 16  # elements summed in fp32 before their norms are, for accuracy


class PolicyOptimizer(Protocol):
    """What the trainer asks of whatever applies its steps. `FlatAdamW` has the whole policy in one process."""

    @property
    def layout(self) -> str:
        """Digest of names and shapes, in order."""

    def zero_grad(self) -> None:
        """Forget all gradients."""

    def grad_norm(self) -> Tensor:
        """Return the global 2-norm of the gradient, a scalar."""

    def step(self, learning_rate: float, grad_scale: float) -> None:
        """Scale the gradient and apply one step."""

    def snapshot(self) -> list[Tensor]:
        """Return a copy of the parameters, in compute dtype, for `swapped`."""

    def swapped(self, snapshot: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Let the model run on other weights while the block runs."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return master weights and moments."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned."""


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where parameters lie in a flat tensor: matrices, which are decayed, before vectors (norms, biases)."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    offsets: tuple[int, ...]
    size: int
    num_decayed: int

    @classmethod
    def of(cls, named_parameters: Sequence[tuple[str, nn.Parameter]]) -> tuple["FlatLayout", list[nn.Parameter]]:
        """Return the layout, and the parameters in its order."""
        ordered = sorted(named_parameters, key=lambda item: item[1].ndim < 2)
        offsets, size, num_decayed = [], 0, 0
        for _, parameter in ordered:
            offsets.append(size)
            size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
            num_decayed = size if parameter.ndim >= 2 else num_decayed
        names, shapes = tuple(name for name, _ in ordered), tuple(parameter.shape for _, parameter in ordered)
        return cls(names, shapes, tuple(offsets), size, num_decayed), [parameter for _, parameter in ordered]

    @property
    def digest(self) -> str:
        """Digest of names and shapes, in order."""
        text = repr([(name, tuple(shape)) for name, shape in zip(self.names, self.shapes, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """From where to where what is decayed lies, and what is not, as far as there is any."""
        return [(low, high) for low, high in ((0, self.num_decayed), (self.num_decayed, self.size)) if low < high]

    def numbers_in(self, low: int, high: int) -> list[int]:
        """Return the numbers of the parameters that lie in a part."""
        return [number for number, offset in enumerate(self.offsets) if low <= offset < high]

    def decay(self, low: int, weight_decay: float) -> float:
        """Return the weight decay of the part that begins there."""
        return weight_decay if low < self.num_decayed else 0.0

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's place in a flat tensor."""
        return [
            flat[offset : offset + shape.numel()].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]


class FlatAdamW:
    """AdamW for a list of named parameters."""

    def __init__(self, named_parameters: Sequence[tuple[str, nn.Parameter]], config: TrainerConfig) -> None:
        """Take over the parameters. Matrices are decayed, vectors (norms, biases) are not."""
        self._flat, self._parameters = FlatLayout.of(named_parameters)
        device = self._parameters[0].device
        self._master = torch.zeros(self._flat.size, device=device)
        self._grad = torch.zeros(self._flat.size, device=device)
        self._master_views = self._flat.views(self._master)
        self._adopt_parameters()
        self._shards = [nn.Parameter(self._master[low:high]) for low, high in self._flat.parts]
        for shard, (low, high) in zip(self._shards, self._flat.parts, strict=True):
            shard.grad = self._grad[low:high]
        groups = [
            {"params": [shard], "weight_decay": self._flat.decay(low, config.weight_decay)}
            for shard, (low, _) in zip(self._shards, self._flat.parts, strict=True)
        ]
        self._adamw = torch.optim.AdamW(
            groups,
            lr=torch.tensor(config.learning_rate) if device.type == "cuda" else config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=device.type in {"cpu", "cuda", "mps"},
        )
        for shard in self._shards:
            self._adamw.state[shard] = {
                "step": torch.zeros((), device=device if device.type == "cuda" else "cpu"),
                "exp_avg": torch.zeros_like(shard, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(shard, requires_grad=False),
            }

    def _adopt_parameters(self) -> None:
        """Copy the weights in; make fp32 parameters views, and route the gradients of the others."""
        grad_views = self._flat.views(self._grad)
        self._compute: list[Tensor] = []
        self._compute_masters: list[Tensor] = []
        for parameter, master, grad in zip(self._parameters, self._master_views, grad_views, strict=True):
            master.copy_(parameter.data)
            if parameter.dtype == torch.float32:
                parameter.data = master
                parameter.grad = grad
            else:
                self._compute.append(parameter.data)
                self._compute_masters.append(master)
                parameter.register_post_accumulate_grad_hook(_GradientMover(grad))

    @property
    def layout(self) -> str:
        """Digest of names and shapes, in order."""
        return self._flat.digest

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._grad.zero_()

    def grad_norm(self) -> Tensor:
        """Return the global 2-norm of the gradient, a scalar; the sum of squares is split for accuracy."""
        if self._grad.device.type != "cpu":  # reductions there are split by their nature
            whole: Tensor = torch.linalg.vector_norm(self._grad)
            return whole
        norms = torch._foreach_norm(torch.split(self._grad, NORM_BLOCK))
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def step(self, learning_rate: float, grad_scale: float) -> None:
        """Scale the gradient, apply one step, and round the compute weights from the master weights."""
        if grad_scale != 1.0:
            self._grad.mul_(grad_scale)
        step_at(self._adamw, learning_rate)
        self._round_compute_weights()

    def _round_compute_weights(self) -> None:
        if self._compute:
            with torch.no_grad():
                torch._foreach_copy_(self._compute, self._compute_masters)

    def snapshot(self) -> list[Tensor]:
        """Return a copy of the parameters, in compute dtype, for `swapped`."""
        return [parameter.data.clone() for parameter in self._parameters]

    @contextmanager
    def swapped(self, snapshot: Sequence[Tensor]) -> Iterator[None]:
        """Let the model run on other weights while the block runs."""
        current = [parameter.data for parameter in self._parameters]
        for parameter, other in zip(self._parameters, snapshot, strict=True):
            parameter.data = other
        try:
            yield
        finally:
            for parameter, own in zip(self._parameters, current, strict=True):
                parameter.data = own

    def state_tensors(self) -> dict[str, Tensor]:
        """Return master weights and moments: live tensors, good until the next step."""
        tensors = {"master": self._master}
        for number, shard in enumerate(self._shards):
            for name in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{name}.{number}"] = self._adamw.state[shard][name]
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned, bit for bit."""
        own = self.state_tensors()
        for name, tensor in own.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                raise CheckpointError(f"the checkpoint has no fitting optimizer tensor {name!r}: resume with its model")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self._round_compute_weights()


def step_at(adamw: torch.optim.AdamW, learning_rate: float) -> None:
    """Apply one step at a learning rate, which is a tensor where steps must not wait for the device."""
    for group in adamw.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate
    adamw.step()


class _GradientMover:
    """Adds a finished low-precision gradient to its place in the flat fp32 gradient, and frees it."""

    def __init__(self, destination: Tensor) -> None:
        self._destination = destination

    def __call__(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._destination.add_(parameter.grad)
            parameter.grad = None
