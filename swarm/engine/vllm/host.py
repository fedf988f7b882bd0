"""The engine process, from outside: starts it, talks to it, and leaves nothing of it behind.

The process leads a group of its own, with whatever vLLM starts beside it. It holds one end of a pipe whose other end
only this process has: when this process is gone, in whatever way, the group removes its temporary files and ends
itself. What vLLM prints goes to a file without a name, of which the end is shown if it fails.
"""

import copy
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from swarm.engine.vllm.adapters import packed
from swarm.engine.vllm.child import ChildConfig
from swarm.engine.vllm.handles import handles_of
from swarm.engine.vllm.memory import memory_share
from swarm.engine.vllm.pipe import Pipe
from swarm.engine.vllm.shared import SharedWeights
from swarm.errors import EngineFailed
from swarm.lora import AdaptedState

__all__ = ["VllmHost"]

_LOG_TAIL_BYTES = 4000
_VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")  # ROCm heeds both
_OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # vLLM's engine core runs in the process that we step
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the one whose sampler takes our noise
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class VllmHost:
    """vLLM in a process of its own, over one model's shape."""

    def __init__(
        self,
        model: Any,
        *,
        max_slots: int,
        max_seq_len: int,
        kv_cache_bytes: int,
        num_draft_tokens: int = 0,
        num_gpus: int = 1,
    ) -> None:
        """Start the process and give it the weights of `model`. Raises EngineFailed where vLLM does not start.

        num_draft_tokens: of one draft, at most; 0: there will be none.
        num_gpus: that share the policy, by tensor parallelism; `kv_cache_bytes` is for each.
        """
        state = model.state_dict()
        self._weights = None if model.device.type == "cuda" else SharedWeights.allocate(state)
        self._base: Mapping[str, torch.Tensor] = {}  # what lies in shared memory and stays as it is, beside adapters
        self._log = tempfile.TemporaryFile()
        self._folder = tempfile.TemporaryDirectory(prefix="swarm-vllm-")
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]  # a model that was made from its config alone names none
        config.save_pretrained(self._folder.name)
        child_read, ours_write = os.pipe()
        ours_read, child_write = os.pipe()
        lifeline, self._lifeline = os.pipe()
        theirs = (child_read, child_write, lifeline)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "swarm.engine.vllm.child", *(str(fd) for fd in theirs), self._folder.name],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=_environment(os.environ, self._folder.name, model.device, num_gpus),
            pass_fds=theirs if self._weights is None else (*theirs, self._weights.fd),
            start_new_session=True,
        )
        for fd in theirs:
            os.close(fd)
        self._pipe = Pipe(ours_read, ours_write)
        self._close = weakref.finalize(
            self, _end, self._process, self._pipe, self._lifeline, self._log, self._folder, self._weights
        )
        settings = ChildConfig(
            architecture=type(model).__name__,
            dtype=str(model.dtype).removeprefix("torch."),
            max_seq_len=max_seq_len,
            max_slots=max_slots,
            kv_cache_bytes=kv_cache_bytes,
            memory_share=memory_share(model, kv_cache_bytes, num_gpus),
            num_draft_tokens=num_draft_tokens,
            num_gpus=num_gpus,
            num_threads=torch.get_num_threads(),
            weights_fd=None if self._weights is None else self._weights.fd,
            places=[] if self._weights is None else self._weights.plain_places(),
        )
        try:
            self._call("start", settings)
            self.load(state)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process, which is also the group of all that vLLM starts."""
        return self._process.pid

    def admit(self, requests: Sequence[Sequence[Any]], wants_states: bool = False) -> list[Any]:
        """Hand over requests and let their first token be drawn; see `child`."""
        told: list[Any] = self._call("admit", requests, wants_states)
        return told

    def decode(self, drafts: Sequence[Sequence[Any]] = (), wants_states: bool = False) -> list[Any]:
        """Decode one step; see `child`."""
        told: list[Any] = self._call("decode", drafts, wants_states)
        return told

    def drop(self, numbers: Sequence[int] | None) -> None:
        """Forget requests, or all of them."""
        self._call("drop", numbers)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace the weights. All requests are forgotten. Of a state with adapters these alone are handed over."""
        adapters = state.adapters if isinstance(state, AdaptedState) else {}
        base = state.base if isinstance(state, AdaptedState) else state
        handles: list[list[Any]] = []
        kept: list[torch.Tensor] = []  # until the answer
        if self._weights is None:
            handles, kept = handles_of(base)
        elif not adapters or not _are_the_same(base, self._base):
            self._weights.write(base)
            self._base = base if adapters else {}
        self._call("load", handles, packed(adapters))
        kept.clear()

    def sleep(self) -> None:
        """Let vLLM give back the memory of its GPU until the next load. All requests are forgotten."""
        self._call("sleep")

    def close(self) -> None:
        """End the process and whatever it started, and free the weights. May be called twice."""
        self._close()

    def _call(self, *message: Any) -> Any:
        """Send one command and wait for its answer. Raises EngineFailed where the process fails or is gone."""
        try:
            self._pipe.send(message)
            kind, value = self._pipe.receive()
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            raise EngineFailed(f"the vLLM process ended with status {status}: {_tail(self._log)}") from error
        if kind == "failed":
            raise EngineFailed(f"vLLM failed: {value}\n{_tail(self._log)}")
        return value


def _environment(ours: Mapping[str, str], folder: str, device: torch.device, num_gpus: int = 1) -> dict[str, str]:
    """The node's environment, with what this use of vLLM needs; a log level that the user chose stays.

    Temporary files go to `folder`. Of several GPUs vLLM takes the first that it sees: it sees the policy's, and after
    it as many others as share the policy. What torchrun says of the node's processes is not said of vLLM's.
    """
    environment = {**ours, **_ENVIRONMENT, "TMPDIR": folder}
    for name in _OF_TORCHRUN:
        environment.pop(name, None)
    environment["VLLM_LOGGING_LEVEL"] = ours.get("VLLM_LOGGING_LEVEL", environment["VLLM_LOGGING_LEVEL"])
    root = str(Path(__file__).resolve().parents[3])  # for a checkout that is not installed
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, ours.get("PYTHONPATH")]))
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        chosen = [name for name in _VISIBLE_DEVICES if ours.get(name)] or _VISIBLE_DEVICES[:1]
        count = max(torch.cuda.device_count(), index + 1)
        for name in chosen:
            seen = ours[name].split(",") if ours.get(name) else [str(number) for number in range(count)]
            others = [each for number, each in enumerate(seen) if number != index]
            environment[name] = ",".join(each.strip() for each in (seen[index], *others)[:num_gpus])
    return environment


def _are_the_same(state: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether two states, both alive, are the same tensors."""
    return state.keys() == other.keys() and all(
        tensor.data_ptr() == other[name].data_ptr() for name, tensor in state.items()
    )


def _tail(log: IO[bytes]) -> str:
    """Return the end of what the process printed."""
    size = os.fstat(log.fileno()).st_size
    return os.pread(log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES)).decode(errors="replace").strip()


def _end(
    process: "subprocess.Popen[bytes]",
    pipe: Pipe,
    lifeline: int,
    log: IO[bytes],
    folder: "tempfile.TemporaryDirectory[str]",
    weights: SharedWeights | None,
) -> None:
    """End the group, then free what it used. It holds nothing that would have to be saved."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(lifeline)
    pipe.close()
    log.close()
    folder.cleanup()
    if weights is not None:
        weights.close()
