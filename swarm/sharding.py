"""One policy over several processes: its weights under FSDP, and AdamW on what each process has of them.

    shard            puts a policy's modules under `fully_shard`: a group of weights per decoder layer, one for the rest
    ShardedAdamW     all weights are trained: master weights and moments lie where their shard does
    ReplicatedAdamW  adapters are trained: they are small, and every process has all of them

Both optimizers keep and take state in the layout of `FlatAdamW`, so that a checkpoint fits any number of processes.
Master weights are fp32, and what is gathered for a pass is rounded from them: the same weights as in one process.
Gradients are added up over processes in fp32, not averaged: the loss is normalised over the whole optimizer step.

Everything here is collective: every process of the default group calls it at the same time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from swarm.config import TrainerConfig
from swarm.errors import CheckpointError, ModelError
from swarm.optimizer import NORM_BLOCK, FlatAdamW, FlatLayout, step_at
from swarm.row_logprobs import RowLogprobs

__all__ = ["ReplicatedAdamW", "ShardedAdamW", "is_leader", "shard", "spread", "whole"]


def is_leader() -> bool:
    """Whether this is the process that has the node, its files and its engine."""
    return dist.get_rank() == 0


def shard(row_logprobs: RowLogprobs, mesh: DeviceMesh, *, replicated: Sequence[nn.Parameter] = ()) -> torch.dtype:
    """Give each process its part of the weights, the leader's, except of those that are replicated.

    Without replicated ones all weights are trained: they become fp32, and are rounded to what they were for a pass.
    Returns that dtype. Raises ModelError where weights differ in it.
    """
    model: Any = row_logprobs.model
    for tensor in (*model.parameters(), *model.buffers()):
        _broadcast(tensor.data)
    ignored = set(replicated)
    own = [parameter for parameter in model.parameters() if parameter not in ignored]
    if len({parameter.dtype for parameter in own}) != 1:
        raise ModelError("processes cannot share a model with weights of several dtypes: set model.dtype")
    compute_dtype: torch.dtype = own[0].dtype
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = set(getattr(model, "_no_split_modules", None) or ())
    inner = [module for module in model.modules() if type(module).__name__ in layers]
    for module in (*inner, row_logprobs):
        if not ignored:
            for parameter in module.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(torch.float32)
        is_root = module is row_logprobs
        sharded = fully_shard(
            module, mesh=mesh, mp_policy=policy, ignored_params=ignored, reshard_after_forward=not is_root
        )
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return compute_dtype


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that is shared between processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor | None, destination: Tensor) -> None:
    """Give each process its part of a tensor that the leader has. The others give None."""
    if tensor is None:
        tensor = torch.empty(destination.shape, dtype=destination.dtype, device=destination.device)
    tensor = tensor.to(destination.device, destination.dtype).contiguous()
    if isinstance(destination, DTensor):
        destination.copy_(distribute_tensor(tensor, destination.device_mesh, [Shard(0)]))
    else:
        _broadcast(tensor)
        destination.copy_(tensor)


def _broadcast(tensor: Tensor) -> None:
    """Give every process the leader's values, in place."""
    if not tensor.numel():
        return
    packed = tensor.contiguous()
    dist.broadcast(packed.view(-1).view(torch.uint8), src=0)
    if packed is not tensor:
        tensor.copy_(packed)


class ShardedAdamW:
    """AdamW for named parameters that are sharded. See `PolicyOptimizer`."""

    def __init__(
        self, named_parameters: Sequence[tuple[str, nn.Parameter]], config: TrainerConfig, compute_dtype: torch.dtype
    ) -> None:
        """Take over the parameters. Matrices are decayed, vectors (norms, biases) are not."""
        self._flat, self._parameters = FlatLayout.of(named_parameters)
        self._compute_dtype = compute_dtype
        device = self._parameters[0].device
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": [self._parameters[number] for number in self._flat.numbers_in(low, high)],
                    "weight_decay": self._flat.decay(low, config.weight_decay),
                }
                for low, high in self._flat.parts
            ],
            lr=torch.tensor(config.learning_rate) if device.type == "cuda" else config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        for parameter in self._parameters:
            self._adamw.state[parameter] = {
                "step": torch.zeros((), device=device if device.type == "cuda" else "cpu"),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    @property
    def layout(self) -> str:
        """Digest of names and shapes, in order."""
        return self._flat.digest

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def grad_norm(self) -> Tensor:
        """Return the global 2-norm of the gradient, a scalar."""
        grads = self._local_grads()
        if grads[0].device.type == "cpu":  # for accuracy, as `FlatAdamW` does
            grads = [block for grad in grads for block in grad.flatten().split(NORM_BLOCK)]
        squares = torch.stack(torch._foreach_norm(grads)).to(torch.float64).square().sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    @torch.no_grad()
    def step(self, learning_rate: float, grad_scale: float) -> None:
        """Scale the gradient and apply one step."""
        if grad_scale != 1.0:
            torch._foreach_mul_(self._local_grads(), grad_scale)
        step_at(self._adamw, learning_rate)

    def _local_grads(self) -> list[Tensor]:
        """Return this process's part of each gradient; of a weight that no pass has used it is zero."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, requires_grad=False)
        return [parameter.grad.to_local() for parameter in self._parameters if isinstance(parameter.grad, DTensor)]

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Return a copy of this process's part of the parameters, in compute dtype, for `swapped`."""
        return [parameter.detach().clone().to(self._compute_dtype) for parameter in self._parameters]

    @contextmanager
    def swapped(self, snapshot: Sequence[Tensor]) -> Iterator[None]:
        """Let the model run on other weights while the block runs."""
        current = [parameter.detach().clone() for parameter in self._parameters]
        self._put(snapshot)
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of master weights and moments, on the host; only the leader's are filled."""
        tensors = {"master": self._gathered(0, self._flat.size, lambda parameter: parameter)}
        for number, (low, high) in enumerate(self._flat.parts):
            for name in ("exp_avg", "exp_avg_sq"):
                tensors[f"{name}.{number}"] = self._gathered(low, high, self._moment(name))
            tensors[f"step.{number}"] = self._step_of(low, high).cpu()
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned, bit for bit; only the leader has it."""
        if is_leader():
            self._check(tensors)
        self._spread(tensors.get("master"), 0, self._flat.size, lambda parameter: parameter)
        for number, (low, high) in enumerate(self._flat.parts):
            for name in ("exp_avg", "exp_avg_sq"):
                self._spread(tensors.get(f"{name}.{number}"), low, high, self._moment(name))
            step = self._step_of(low, high)
            spread(tensors.get(f"step.{number}"), step)
            for index in self._flat.numbers_in(low, high):
                self._adamw.state[self._parameters[index]]["step"].copy_(step)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        sizes: dict[str, tuple[int, ...]] = {"master": (self._flat.size,)}
        for number, (low, high) in enumerate(self._flat.parts):
            sizes |= {f"exp_avg.{number}": (high - low,), f"exp_avg_sq.{number}": (high - low,), f"step.{number}": ()}
        for name, size in sizes.items():
            if name not in tensors or tensors[name].shape != size:
                raise CheckpointError(f"the checkpoint has no fitting optimizer tensor {name!r}: resume with its model")

    def _moment(self, name: str) -> Callable[[nn.Parameter], Tensor]:
        return lambda parameter: self._adamw.state[parameter][name]

    def _step_of(self, low: int, high: int) -> Tensor:
        step: Tensor = self._adamw.state[self._parameters[self._flat.numbers_in(low, high)[0]]]["step"]
        return step

    def _gathered(self, low: int, high: int, pick: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Gather what `pick` says of each parameter of a part, in the part's flat layout."""
        flat = torch.zeros(high - low if is_leader() else 0)
        for number in self._flat.numbers_in(low, high):
            values = whole(pick(self._parameters[number]))
            if is_leader():
                begin = self._flat.offsets[number] - low
                flat[begin : begin + values.numel()].copy_(values.flatten())
        return flat

    def _spread(self, flat: Tensor | None, low: int, high: int, pick: Callable[[nn.Parameter], Tensor]) -> None:
        for number in self._flat.numbers_in(low, high):
            begin, shape = self._flat.offsets[number] - low, self._flat.shapes[number]
            values = None if flat is None else flat[begin : begin + shape.numel()].view(shape)
            spread(values, pick(self._parameters[number]))


class ReplicatedAdamW(FlatAdamW):
    """AdamW for parameters that every process has whole, as adapters are. They take the same steps."""

    def reduce_gradients(self) -> None:
        """Add up the gradients of all processes."""
        dist.all_reduce(self._grad)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` returned, bit for bit; only the leader has it."""
        if is_leader():
            super().load_state(tensors)
        own = self.state_tensors()
        for tensor in own.values():
            _broadcast(tensor)
        super().load_state(own)
