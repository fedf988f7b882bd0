"""A recorder for the CPU: what a graph is on a GPU, operation by operation.

What it records is run again with the very tensors of the recording, whatever has become of them: a number that was read
on the host, a tensor that was made anew since, or a buffer that moved, is as wrong here as in a graph. To look at a
tensor's value raises, as it does on a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ATEN = torch.ops.aten
_LOOKS = (_ATEN._local_scalar_dense.default, _ATEN.nonzero.default, _ATEN.masked_select.default, _ATEN.item.default)
_INDEX = _ATEN.index.Tensor


class Recording(TorchDispatchMode):
    """Runs operations and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.has_run = True
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_truth = func is _INDEX and any(each.dtype == torch.bool for each in tensors(args[1]))
        if func in _LOOKS or by_truth:
            raise RuntimeError(f"{func} waits for the device while it records")
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        fresh = [each if each.untyped_storage().data_ptr() not in given else None for each in tensors(out)]
        self.calls.append((func, args, kwargs or {}, fresh))
        return out

    def replay(self) -> None:
        """Run it all again. A GPU records without running; here the first run is the recording itself."""
        if self.has_run:
            self.has_run = False
            return
        for func, args, kwargs, fresh in self.calls:
            for old, new in zip(fresh, tensors(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class OpsRecorder:
    """Records on the CPU. Counts what it does."""

    def __init__(self) -> None:
        self.num_warmed = self.num_recorded = self.num_renewed = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.num_warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Recording:
        with Recording() as recording:
            work()
        self.num_recorded += 1
        return recording

    def renew(self) -> None:
        self.num_renewed += 1
