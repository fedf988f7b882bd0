"""The decode step on a GPU, recorded as graphs: one launch for what is hundreds of small operations.

A step decodes one token of every slot, draws the next ones and advances its own state, which mirrors the columns
of `Slots` on the device. The host uploads them when requests come, go or move, and reads the drawn tokens back:
the one time per step that it waits. Which of them finish is its own business.

A graph has fixed shapes, so slots and lengths are rounded up to buckets. Rows beyond the occupied slots decode
whatever lies there, into slots that are filled before they are read; positions beyond a length are masked. The
first step of a shape runs as it is, which also warms up its kernels; the second is recorded. Weights are replaced in
place (`ModelRunner.load`), so graphs outlive them. Devices without graphs run every step as it is.
"""

import warnings
from typing import TypeAlias

import numpy as np
import torch

from swarm.engine.torch.runner import ModelRunner
from swarm.engine.torch.sampling import Mode, sample
from swarm.engine.torch.slots import Slots

__all__ = ["DecodeStep", "bucket"]

_Shape: TypeAlias = tuple[int, int, Mode]  # rows, positions to attend to, what the sampler has to do
_LEAST_POSITIONS = 64
_LEAST_ROWS = 32  # of more than one: fewer cost a GPU as much


def bucket(number: int, limit: int, least: int = 1) -> int:
    """Round up to `least` times a power of two, or from there on to one and a half times, but not beyond `limit`."""
    size = least
    while size < number:
        half = size + size // 2
        size = half if size > least and half >= number else 2 * size
    return min(size, limit)


class DecodeStep:
    """Decodes and draws one token of every occupied slot. All calls happen under `torch.inference_mode`."""

    def __init__(self, runner: ModelRunner, num_slots: int, capacity: int, *, record: bool = True) -> None:
        """record: whether to record graphs where the device has them."""
        self._runner, self._num_slots, self._capacity = runner, num_slots, capacity
        device = runner.device
        self._records = record and device.type == "cuda"
        self._ints = torch.zeros(5, num_slots, dtype=torch.int64, device=device)
        self._floats = torch.ones(2, num_slots, device=device)
        self._drawn = torch.zeros(num_slots, 2, dtype=torch.int32, device=device)  # tokens, bits of log-probabilities
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph | None] = {}  # None: has run once
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        self._stream = torch.cuda.Stream(device) if self._records else None  # to record on

    @property
    def num_graphs(self) -> int:
        """Shapes that have been recorded."""
        return sum(graph is not None for graph in self._graphs.values())

    def __call__(self, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """Return the next token of each occupied slot, and its log-probability. The slots are left to the caller."""
        n = len(slots)
        if slots.changed:
            columns = slots.last_tokens, slots.seeds, slots.generated, slots.cached, slots.top_k
            self._ints.copy_(torch.from_numpy(np.stack(columns)))
            self._floats.copy_(torch.from_numpy(np.stack((slots.temperature, slots.top_p))))
            slots.changed = False
        self._run(
            (
                bucket(n, self._num_slots, _LEAST_ROWS) if n > 1 else 1,
                bucket(int(slots.cached[:n].max()) + 1, self._capacity, _LEAST_POSITIONS),
                Mode.of(slots.temperature[:n], slots.top_k[:n], slots.top_p[:n]),
            )
        )
        drawn = self._drawn[:n].cpu().numpy()
        return drawn[:, 0].astype(np.int64), drawn[:, 1].copy().view(np.float32)

    def _run(self, shape: _Shape) -> None:
        graph = self._graphs.get(shape)
        if graph is None and self._records and shape in self._graphs:
            graph = self._graphs[shape] = self._record(shape)
        if graph is not None:
            graph.replay()
            return
        self._step(*shape)
        self._graphs[shape] = None

    def _record(self, shape: _Shape) -> torch.cuda.CUDAGraph | None:
        """Record a step of this shape, without running it; None where that is impossible, which is said once."""
        graph = torch.cuda.CUDAGraph()
        device = self._ints.device
        random = torch.cuda.default_generators[device.index]
        state = random.clone_state()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(device), recording:
                self._step(*shape)
        except RuntimeError as error:
            random.graphsafe_set_state(state)  # the one it had goes on waiting for the recording to end
            self._records = False
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decoding without graphs, which is slower: this model records none ({reason})", stacklevel=2)
            return None
        return graph

    def _step(self, num_rows: int, longest: int, mode: Mode) -> None:
        """Decode and draw in the first rows. No operation here waits for the device."""
        tokens, seeds, generated, cached, top_k = self._ints[:, :num_rows]
        temperature, top_p = self._floats[:, :num_rows]
        hidden = self._runner.decode_within(tokens, cached.clamp(max=longest - 1), longest)
        logits = self._runner.logits(hidden)
        drawn, logprobs = sample(logits, seeds, generated, temperature, top_k, top_p, mode=mode)
        self._drawn[:num_rows, 0] = drawn
        self._drawn[:num_rows, 1] = logprobs.view(torch.int32)
        tokens.copy_(drawn)
        self._ints[2:4, :num_rows] += 1  # generated, cached
