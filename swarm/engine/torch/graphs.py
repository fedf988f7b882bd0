"""Recorded graphs: one launch for what is hundreds of small operations.

What is recorded has fixed shapes, reads and writes tensors that stay where they are, and never waits for the device.
So sizes are rounded up to buckets (`bucket`), and a graph is kept for each shape that comes twice: the first time it
runs as it is, which also loads its kernels; the second time it is recorded. All graphs share one pool of memory, which
is safe in any order, since none leaves a result there: what they give lies in tensors made outside.

They are bounded in number, and go all at once, when there are too many or one cannot be recorded: torch lets go of the
matmuls' workspaces of a stream as soon as one of the graphs that were recorded on it goes (pytorch issue 193402), and
another one that is launched afterwards would write into memory that is no longer its own.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

__all__ = ["CudaRecorder", "Graph", "GraphPool", "Recorder", "bucket"]

_MAX_GRAPHS = 256


def bucket(number: int, limit: int, least: int = 1, *, halves: bool = True) -> int:
    """Round up to `least` times a power of two, or from there on to one and a half times, but not beyond `limit`.

    halves: whether there are the sizes of one and a half times.
    """
    size = least
    while size < number:
        half = size + size // 2
        size = half if halves and size > least and half >= number else 2 * size
    return min(size, limit)


class Graph(Protocol):
    """Work that was recorded."""

    def replay(self) -> None:
        """Do it once more, on what its tensors hold now."""


class Recorder(Protocol):
    """Records work on a device. Work is a function that always does the same to the same tensors."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do work as it is, so that it can be recorded afterwards."""

    def record(self, work: Callable[[], None]) -> Graph:
        """Record work without doing it. Raises RuntimeError where that is impossible."""

    def renew(self) -> None:
        """All graphs have gone: what they shared is not used for the next ones."""


class CudaRecorder:
    """Records on CUDA, and on ROCm, whose graphs torch offers under the same names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """See Recorder. On the stream that records: handles that libraries make once a stream cannot be made later."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        random = torch.cuda.default_generators[self._device.index]
        state = random.clone_state()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), recording:
                work()
        except RuntimeError:
            random.graphsafe_set_state(state)  # the one it had goes on waiting for the recording to end
            raise
        return graph

    def renew(self) -> None:
        """See Recorder."""
        self._pool = torch.cuda.graph_pool_handle()


class GraphPool:
    """Does work by graphs where there is a recorder, and as it is where there is none."""

    def __init__(self, recorder: Recorder | None, max_graphs: int = _MAX_GRAPHS) -> None:
        self._recorder, self._max_graphs = recorder, max_graphs
        self._graphs: dict[Hashable, Graph] = {}
        self._warm: set[Hashable] = set()  # what has run once

    @property
    def num_graphs(self) -> int:
        """Graphs that are held."""
        return len(self._graphs)

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do work. Work of one key is the same operations on the same tensors."""
        graph = self._graphs.get(key)
        if graph is None and key in self._warm:
            graph = self._record(key, work)
        if graph is not None:
            graph.replay()
        elif self._recorder is not None:
            self._recorder.warm_up(work)
            self._warm.add(key)
        else:
            work()

    def _record(self, key: Hashable, work: Callable[[], None]) -> Graph | None:
        """Return the graph of work that has run once; None where it cannot be had now."""
        assert self._recorder is not None
        if len(self._graphs) >= self._max_graphs:
            self._drop()
            self._recorder.renew()
            return None
        try:
            graph = self._graphs[key] = self._recorder.record(work)
        except RuntimeError as error:
            self._drop()
            self._recorder = None
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"decoding without graphs, which is slower: this model records none ({reason})", stacklevel=2)
            return None
        return graph

    def _drop(self) -> None:
        self._graphs.clear()
        self._warm.clear()
