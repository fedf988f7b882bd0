"""The trainer of a policy that several processes share: one in each, on a device of its own.

It is `Trainer` with another place for the weights (`sharding`), and with the microbatches of a step dealt out
(`dealing`). Every process is given the same batch and reports the same statistics, and all of them skip the same steps.
What goes out of it is the leader's: `policy_state` and `state_tensors` are whole there, and empty elsewhere.

Every method is collective. Who tells the other processes what is called is `node.ranks`.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from swarm.dealing import Dealt, deal
from swarm.lora import AdaptedState, policy_state
from swarm.optimizer import PolicyOptimizer
from swarm.packing import PackedRow, PaddedRows
from swarm.sharding import ReplicatedAdamW, ShardedAdamW, is_leader, shard, spread, whole
from swarm.trainer import Trainer
from swarm.types import TrainingGroup

__all__ = ["ShardedTrainer"]


class ShardedTrainer(Trainer):
    """A policy's share under training, in one of the processes of torch's default group. See Trainer."""

    def _make_optimizer(self, trainable: Sequence[tuple[str, nn.Parameter]]) -> PolicyOptimizer:
        mesh = init_device_mesh(self._device.type, (dist.get_world_size(),))
        adapters = [parameter for _, parameter in trainable] if self._config.lora.rank else []
        self._compute_dtype = shard(self._row_logprobs, mesh, replicated=adapters)
        if adapters:
            return ReplicatedAdamW(trainable, self._config)
        names = {name for name, _ in trainable}
        sharded = [(name, parameter) for name, parameter in self._model.named_parameters() if name in names]
        return ShardedAdamW(sharded, self._config, self._compute_dtype)

    def _own_microbatches(
        self, groups: Sequence[TrainingGroup], chosen: Sequence[int], *, shares_prompts: bool
    ) -> Dealt:
        max_tokens = self._config.max_tokens_per_microbatch
        dealt = deal(groups, chosen, max_tokens, dist.get_world_size(), shares_prompts=shares_prompts)
        return dealt[dist.get_rank()]

    def _over_ranks(self, sums: Tensor) -> Tensor:
        dist.all_reduce(sums)
        if isinstance(self._optimizer, ReplicatedAdamW):
            self._optimizer.reduce_gradients()
        return sums

    def _logprobs(self, row: PackedRow | PaddedRows, shown: Sequence[TrainingGroup] | None = None) -> Tensor:
        logprobs = super()._logprobs(row, shown)
        if not torch.is_grad_enabled():  # with a gradient the backward pass does it; the root would keep old weights
            assert isinstance(self._row_logprobs, FSDPModule)
            self._row_logprobs.reshard()
        return logprobs

    @torch.no_grad()
    def policy_state(self) -> Mapping[str, Tensor]:
        """Return copies of the policy's weights in compute dtype; nothing where this is not the leader."""
        state = policy_state(self._model)
        base = state.base if isinstance(state, AdaptedState) else state
        weights = {
            name.replace(".base_layer.", "."): id(weight)
            for name, weight in self._model.named_parameters(remove_duplicate=False)
        }
        gathered: dict[str, Tensor] = {}
        names: dict[int, str] = {}  # under which a weight was gathered that has several
        for name, tensor in base.items():
            known = names.setdefault(weights.get(name, id(tensor)), name)
            if known == name:
                full = whole(tensor.to(self._compute_dtype) if isinstance(tensor, DTensor) else tensor)
                gathered[name] = full if is_leader() else full.new_empty(0)
            else:
                gathered[name] = gathered[known]
        if not is_leader():
            return {}
        return AdaptedState(gathered, state.adapters) if isinstance(state, AdaptedState) else gathered

    def num_state_bytes(self) -> int:
        """Return about what `state_tensors` takes."""
        num_trained = sum(parameter.numel() for parameter in self._model.parameters() if parameter.requires_grad)
        return 3 * torch.float32.itemsize * num_trained

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of what a resumed trainer needs, on the host; empty where this is not the leader."""
        tensors = self._optimizer.state_tensors()
        for number, tensor in enumerate(self._reference or ()):
            tensors[f"reference.{number}"] = whole(tensor).cpu()
        return tensors if is_leader() else {}

    def _load_reference(self, tensors: Mapping[str, Tensor]) -> None:
        for number, tensor in enumerate(self._reference or ()):
            spread(self._reference_in(tensors, number) if is_leader() else None, tensor)
