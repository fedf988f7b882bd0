"""Inside an engine process: vLLM, stepped from outside, until the pipe ends.

Receives lists over a pipe and answers each with ["ok", value], or with ["failed", message] and the end:

    ["start", ChildConfig]          once
    ["admit", [[…], …], bool]       take these requests, see `_add`, and draw the first token of those there is room for
    ["decode", [[id, draft], …], bool]  decode one token of all, or more where they have drafts and some are kept
    ["drop", [id, …] or None]       forget requests, or all of them
    ["load", handles, adapters]     forget all requests and all attention state, and take the weights in shared
                                    memory, on the host or where `handles` says, with `adapters` merged
    ["sleep"]                       forget all requests, and give back the memory of a GPU until the next load

The value of "admit" and "decode" is in `_Driven._told`. The flag says whether it has states as well.

It ends when the other end of the pipe is gone, whatever it is doing then: a thread of its own watches for that, and
leaves no file of it behind.
"""

import os
import select
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, TypedDict

from swarm.engine.vllm.pipe import Pipe

__all__ = ["ChildConfig", "main"]

_LOOK_S: Final = 1.0  # how often the parent is looked for, beside the pipe
_PREFILL_TOKENS: Final = 8192  # tokens of one step; bounds its memory


class ChildConfig(TypedDict):
    """What the parent sends first."""

    architecture: str  # the model's class
    dtype: str
    max_seq_len: int
    max_slots: int
    kv_cache_bytes: int
    num_draft_tokens: int  # of one draft, at most; 0: there are none
    num_gpus: int  # that share the policy
    memory_share: float  # of a GPU: weights and KV cache; vLLM refuses to start where less is free
    num_threads: int
    weights_fd: int | None  # inherited, see `SharedWeights`; None where the weights are on a GPU
    places: list[list[Any]]  # fields of WeightPlace


def main() -> None:
    """Serve the parent until it is gone.

    The arguments: three descriptors, and a folder with the model's config.json, which also takes all temporary files.
    """
    read_fd, write_fd, lifeline_fd = (int(each) for each in sys.argv[1:4])
    folder = sys.argv[4]
    threading.Thread(target=_end_with_parent, args=(lifeline_fd, os.getppid(), folder), daemon=True).start()
    pipe = Pipe(read_fd, write_fd)
    try:
        _serve(pipe, folder)
    except EOFError:
        return
    except Exception as error:  # the boundary: whatever vLLM raises ends this process, and its parent says why
        traceback.print_exc()
        pipe.send(["failed", f"{type(error).__name__}: {error}"])


def _end_with_parent(lifeline_fd: int, parent: int, folder: str) -> None:
    """Wait until the parent is gone, then remove the folder and end this process and those that vLLM started."""
    while not select.select([lifeline_fd], [], [], _LOOK_S)[0] and os.getppid() == parent:
        pass
    shutil.rmtree(folder, ignore_errors=True)  # the group ends, whatever of it can be removed
    os.killpg(0, signal.SIGKILL)


def _serve(pipe: Pipe, folder: str) -> None:
    _, config = pipe.receive()
    driven = _Driven(config, folder)
    commands: dict[str, Callable[..., Any]] = {
        "admit": driven.admit, "decode": driven.decode, "drop": driven.drop, "load": driven.load,
        "sleep": driven.sleep,
    }  # fmt: skip
    pipe.send(["ok", None])
    while True:
        kind, *arguments = pipe.receive()
        pipe.send(["ok", commands[kind](*arguments)])


class _Driven:
    """vLLM's engine, in this process, with the requests that it holds."""

    def __init__(self, config: ChildConfig, folder: str) -> None:
        import torch

        torch.set_num_threads(config["num_threads"])
        from vllm import EngineArgs, LLMEngine
        from vllm.config import WeightTransferConfig

        from swarm.engine.vllm.counter import NodeDrafts
        from swarm.engine.vllm.worker import TRANSFER_BACKEND, WorkerExtension

        _register(config["architecture"])
        self._num_draft_tokens = config["num_draft_tokens"]
        drafts = {
            "method": "custom_class",
            "model": _path(NodeDrafts),
            "num_speculative_tokens": self._num_draft_tokens,
        }
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=folder,
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=config["dtype"],
                max_model_len=config["max_seq_len"],
                max_num_seqs=config["max_slots"],
                max_num_batched_tokens=max(_PREFILL_TOKENS, config["max_seq_len"]),
                kv_cache_memory_bytes=config["kv_cache_bytes"],
                gpu_memory_utilization=config["memory_share"],
                tensor_parallel_size=config["num_gpus"],
                enable_sleep_mode=torch.cuda.is_available(),
                enable_prefix_caching=True,
                async_scheduling=False,
                # compiling costs minutes on a CPU; on a GPU vLLM records its steps as graphs
                enforce_eager=not torch.cuda.is_available(),
                speculative_config=drafts if self._num_draft_tokens else None,
                worker_extension_cls=_path(WorkerExtension),
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER_BACKEND),
                disable_log_stats=True,
                generation_config="vllm",
            )
        )
        self._engine.collective_rpc("draw_by_counter", args=(self._num_draft_tokens,))
        info = {"pid": os.getpid(), "fd": config["weights_fd"], "places": config["places"]}
        self._engine.collective_rpc("init_weight_transfer_engine", args=(info,))
        self._held: dict[str, str] = {}  # requests, by the names that they were given, and what vLLM calls them inside
        self._is_asleep = False

    def admit(self, requests: Sequence[Sequence[Any]], wants_states: bool) -> list[Any]:
        """Take requests, prefill them and draw their first token. What is running already is decoded meanwhile."""
        written: dict[str, list[Any]] = {}
        states: list[dict[str, Any]] = []
        waiting = {self._add(*request) for request in requests}
        while waiting and self._held:
            before = len(written)
            self._advance(written)
            if wants_states:
                states.append(self._states())
            waiting -= written.keys()
            if len(written) == before and not waiting.isdisjoint(self._held) and len(self._held) > len(waiting):
                break  # no room for the rest until something finishes
        return self._told(written, states)

    def decode(self, drafts: Sequence[tuple[int, list[int]]], wants_states: bool) -> list[Any]:
        """Decode one token of all; of those that have drafts, also what is kept of them."""
        written: dict[str, list[Any]] = {}
        if not self._held:
            return self._told(written, [])
        self._advance(written, {str(number): draft for number, draft in drafts})
        return self._told(written, [self._states()] if wants_states else [])

    def _told(self, written: dict[str, list[Any]], states: list[dict[str, Any]]) -> list[Any]:
        """Return the value of an answer.

        [id, tokens, log-probabilities, "stop", "length" or None, prompt tokens computed] for each request that got on,
        and the states that each pass drew from (`CounterVerifier.states`).
        """
        return [[[int(name), *rest] for name, rest in written.items()], states]

    def _states(self) -> dict[str, Any]:
        states: dict[str, Any] = self._engine.collective_rpc("states")[0]  # every worker has the same
        numbers = {inside: int(name) for name, inside in self._held.items()}
        states["seen"] = [[numbers[name], *rest] for name, *rest in states["seen"] if name in numbers]
        return states

    def _add(
        self, number: int, prompt_ids: list[int], max_new_tokens: int, stop_ids: list[int], noise: dict[str, Any]
    ) -> str:
        """Hand one request to vLLM. noise: see `worker.CounterNoise`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_new_tokens,
            ignore_eos=True,
            stop_token_ids=stop_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"swarm": noise},
        )
        name = str(number)
        self._held[name] = self._engine.add_request(name, {"prompt_token_ids": prompt_ids}, params)
        return name

    def _advance(self, written: dict[str, list[Any]], drafts: Mapping[str, list[int]] = MappingProxyType({})) -> None:
        """Let vLLM do one step, and put what it wrote with what was written before.

        drafts: to be verified in it. vLLM leaves out what it has no room for, or of requests that it has set aside.
        """
        if drafts:
            from vllm.v1.outputs import DraftTokenIds

            core = self._engine.engine_core.engine_core  # in this process
            names = [self._held[name] for name in drafts]
            core.scheduler.update_draft_token_ids(DraftTokenIds(names, list(drafts.values())))
        for output in self._engine.step():
            (delta,) = output.outputs
            num_prefilled = len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            entry = written.setdefault(output.request_id, [[], [], None, num_prefilled])
            entry[0] += delta.token_ids
            entry[1] += delta.logprobs.logprobs
            if output.finished:
                entry[2] = delta.finish_reason
                self._held.pop(output.request_id)

    def drop(self, numbers: Sequence[int] | None) -> None:
        """Forget requests."""
        names = list(self._held) if numbers is None else [str(number) for number in numbers]
        self._engine.abort_request(names)
        for name in names:
            self._held.pop(name, None)

    def load(self, handles: list[list[Any]], adapters: list[list[Any]]) -> None:
        """Take the weights in shared memory; nothing that was computed with the old ones is used again."""
        self.drop(None)
        if self._is_asleep:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("start_weight_update")
        self._engine.collective_rpc("update_weights", args=({"handles": handles, "adapters": adapters},))
        self._engine.collective_rpc("finish_weight_update")
        if self._is_asleep:
            self._engine.wake_up(tags=["kv_cache"])
            self._is_asleep = False
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def sleep(self) -> None:
        """Give back the memory of weights and KV cache. The next command must be a load."""
        self.drop(None)
        self._engine.sleep(level=2)
        self._is_asleep = True


def _path(cls: type) -> str:
    """Return where vLLM finds a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _register(architecture: str) -> None:
    """Import the model's class here: vLLM would look at it in a further process, which takes seconds to start."""
    from vllm import ModelRegistry

    if architecture in ModelRegistry.models:
        ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


if __name__ == "__main__":
    main()
