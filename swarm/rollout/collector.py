"""Collects groups, synchronously: one request per completion, submitted to the engine and run to the end.

It turns tasks into prompts and seeds, and completions back into groups. How completions are written is
the engine's; what they are worth is scoring's. `partial` goes on with what a round leaves unfinished.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from swarm.config import RolloutConfig
from swarm.engine.base import Engine, Request, SamplingParams
from swarm.policy import Policy
from swarm.seeds import fold_seed
from swarm.types import Completion, RolloutGroup, Task

__all__ = ["RolloutCollector"]


class RolloutCollector:
    """Writes completions for batches of tasks."""

    def __init__(self, engine: Engine, policy: Policy, config: RolloutConfig, seed: int) -> None:
        self._engine, self._policy, self._config, self._seed = engine, policy, config, seed
        self._sampling = SamplingParams(
            config.max_new_tokens, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k
        )
        self._next_request_id = 0

    def collect(
        self, tasks: Sequence[Task], *, round_index: int, spans: Sequence[range] | None = None
    ) -> list[RolloutGroup]:
        """Return one group per task, in order. The noise depends on seed, round, task and completion alone.

        `spans` says which completions of each task are written, where a round writes them in several calls; None: all.
        """
        if spans is None:
            spans = [range(self._config.num_completions)] * len(tasks)
        prompts = [self._policy.encode_prompt(task.question) for task in tasks]
        requests = [
            [
                Request(self._new_id(), prompt_ids, self._noise(round_index, place, index), self._sampling)
                for index in span
            ]
            for place, (prompt_ids, span) in enumerate(zip(prompts, spans, strict=True))
        ]
        done = self._run([request for members in requests for request in members])
        groups = []
        for task, prompt_ids, members in zip(tasks, prompts, requests, strict=True):
            completions = tuple(done[request.request_id] for request in members)
            texts = tuple(self._policy.decode(completion.token_ids) for completion in completions)
            groups.append(RolloutGroup(task, prompt_ids, completions, texts))
        return groups

    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        """Give the engine new weights."""
        self._engine.load_policy(state, version)

    def describe(self) -> dict[str, Any]:
        """Return what the last round's rollouts were beside their groups, for its row of metrics."""
        return {}

    def state(self) -> dict[str, Any] | None:
        """Return what is left unfinished between two rounds, as plain data; None where nothing can be."""
        return None

    def load_state(self, plain: Mapping[str, Any] | None) -> None:
        """Go on with what `state` returned. Raises ValueError where this collector leaves nothing unfinished."""
        if plain is not None and plain["groups"]:
            raise ValueError("completions that were begun ahead cannot be finished by synchronous rollouts")

    def _noise(self, round_index: int, place: int, index: int) -> int:
        """Return the seed of one completion."""
        return fold_seed(self._seed, round_index, place, index)

    def _new_id(self) -> int:
        self._next_request_id += 1
        return self._next_request_id

    def _run(self, requests: Sequence[Request]) -> dict[int, Completion]:
        """Run requests to the end; return completions by request id."""
        self._engine.submit(requests)
        done: dict[int, Completion] = {}
        while self._engine.num_unfinished:
            done.update((completion.request_id, completion) for completion in self._engine.step())
        return done
