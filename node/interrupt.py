"""Stops an engine in the middle of its work, without the engine or whoever drives it knowing."""

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from swarm.engine.base import Engine, EngineStats, Request
from swarm.errors import UserError
from swarm.types import Completion

if TYPE_CHECKING:
    import torch

__all__ = ["Interrupted", "InterruptibleEngine", "SequenceTooLong"]


class Interrupted(Exception):
    """The node stops: the engine does not go on with the requests it holds."""


class SequenceTooLong(UserError):
    """A question does not fit the engine's cache."""


class InterruptibleEngine(Engine):
    """An engine whose decode steps stop as soon as the node is to stop, whoever drives them."""

    def __init__(self, engine: Engine, stopping: threading.Event, max_seq_len: int) -> None:
        self._engine = engine
        self._stopping = stopping
        self.max_seq_len = max_seq_len

    @property
    def verifies_drafts(self) -> bool:  # type: ignore[override]
        """Whether the engine within does."""
        return self._engine.verifies_drafts

    @property
    def step_cost_tokens(self) -> float:  # type: ignore[override]
        """That of the engine within."""
        return self._engine.step_cost_tokens

    @property
    def prefill_cost_tokens(self) -> float:  # type: ignore[override]
        """That of the engine within."""
        return self._engine.prefill_cost_tokens

    @property
    def num_slots(self) -> int:  # type: ignore[override]
        """That of the engine within."""
        return self._engine.num_slots

    @property
    def stats(self) -> EngineStats:  # type: ignore[override]
        """Counters of the engine within."""
        return self._engine.stats

    @property
    def policy_version(self) -> int:
        """The version of the weights that the next step uses."""
        return self._engine.policy_version

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return self._engine.num_unfinished

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. Raises SequenceTooLong where a question is longer than those that were looked at before."""
        longest = max((len(request.prompt_ids) + request.sampling.max_new_tokens for request in requests), default=0)
        if longest > self.max_seq_len:
            raise SequenceTooLong(
                f"a question and its answer take {longest} tokens, engine.max_seq_len is {self.max_seq_len}: "
                f"go on with --resume --set engine.max_seq_len={longest}, as far as the model allows"
            )
        self._engine.submit(requests)

    def step(self) -> list[Completion]:
        """Decode one step, or raise Interrupted."""
        if self._stopping.is_set():
            raise Interrupted
        return self._engine.step()

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        """Stop requests and return what they have."""
        return self._engine.abort(request_ids)

    def load_policy(self, state: "Mapping[str, torch.Tensor]", version: int) -> None:
        """Take new weights."""
        self._engine.load_policy(state, version)

    def release_memory(self) -> None:
        """Let the engine within give back memory until the next policy."""
        self._engine.release_memory()

    def close(self) -> None:
        """Close the engine within."""
        self._engine.close()
