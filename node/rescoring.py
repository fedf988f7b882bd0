"""Judges groups that other nodes wrote, as if this node had written them, and never in the way of a round.

What a peer sent is a task reference and texts. The question is made again here, the texts are scored in a sandbox
by this node's own verifier, and encoded by its own tokenizer. One thread and one scoring process do nothing else;
the process has a low priority, and a group waits until the one before is done. What arrives too fast is
`protocol.admission`'s to refuse.
"""

import asyncio
import copy
import dataclasses
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Protocol

from protocol.admission import Rescored, Verdict
from protocol.messages import SharedGroup, TaskRef
from swarm.advantage import group_advantages
from swarm.errors import InvalidTaskRef, PoolClosed, UnknownSource
from swarm.types import Completion, RolloutGroup, Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.config import RunConfig
    from swarm.policy import Policy
    from swarm.scoring import Score

__all__ = ["Rescorer", "build_rescorer"]

_NICENESS: Final = 10
_MAX_COSTLY_ANSWERS: Final = 1  # of a group; an honest policy stumbles over a limit now and then
_COSTLY: Final = frozenset({"cpu_limit", "memory_limit", "wall_limit", "crashed"})
_LENGTH_FACTOR: Final = 2  # of own completions, in number and in tokens, that one of another node may have


class _Policy(Protocol):
    def encode_prompt(self, question: str) -> tuple[int, ...]: ...

    def encode_completion(self, text: str, *, finished: bool) -> tuple[int, ...] | None: ...


class _Tasks(Protocol):
    def resolve(self, ref: TaskRef) -> Task: ...

    def is_heldout(self, question: str) -> bool: ...


class _Scorer(Protocol):
    def start(self, *, wait: bool = True) -> None: ...

    def score(self, jobs: "Sequence[tuple[TaskRef, str]]") -> "Sequence[Score]": ...

    def close(self) -> None: ...


class Rescorer:
    """Turns a shared group into a scored group of this node's own kind, or says why not.

    Tasks, tokenizer and scorer belong to its thread: none of them is shared with the round.
    """

    def __init__(
        self,
        config: "RunConfig",
        *,
        build: "Callable[[], tuple[_Policy, _Tasks, _Scorer]]",
        max_sequence_tokens: int,
        longest_token_chars: int,
        executor: Executor | None = None,
    ) -> None:
        """No prompt with a completion is longer than `max_sequence_tokens`.

        `executor` does the work, one group at a time, and calls `build` first; None: a thread of the rescorer's own.
        """
        self._sapo = config.sapo
        self._max_tokens = config.sapo.max_external_tokens or _LENGTH_FACTOR * config.rollout.max_new_tokens
        self._max_completions = _LENGTH_FACTOR * config.rollout.num_completions
        self._max_sequence_tokens = max_sequence_tokens
        self._max_chars = self._max_tokens * longest_token_chars
        self._build = build
        self._thread = executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="rescoring")
        self._parts: tuple[_Policy, _Tasks, _Scorer] | None = None
        self._is_closing = False

    async def __call__(self, group: SharedGroup) -> Rescored:
        """Judge a group. Cancelling the call does not end what the thread is at."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._rescore, group)

    def prepare(self) -> None:
        """Start the scoring process now, so that it is there when the first group comes."""
        self._thread.submit(self._prepared)

    async def wait_ready(self) -> None:
        """Return when groups can be judged. Raises what the scoring process could not start for."""
        await asyncio.get_running_loop().run_in_executor(self._thread, lambda: self._prepared()[2].start())

    async def close(self) -> None:
        """End the scoring process and the thread; a group that is being scored is dropped."""
        self._is_closing = True
        if self._parts is not None:
            await asyncio.to_thread(self._parts[2].close)
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        if self._parts is not None:
            self._parts[2].close()  # one that the thread was only just starting

    def _prepared(self) -> "tuple[_Policy, _Tasks, _Scorer]":
        """Runs in the thread. What it raises, the first group raises again."""
        if self._parts is None:
            self._parts = self._build()
            self._parts[2].start(wait=False)
        return self._parts

    def _rescore(self, group: SharedGroup) -> Rescored:
        """Runs in the thread. Cheap checks first: nothing is encoded or scored that is not wanted anyway."""
        if self._is_closing:
            return _refused("unknown_task")
        policy, tasks, scorer = self._prepared()
        try:
            task = tasks.resolve(group.task)
        except UnknownSource:
            return _refused("unknown_task")
        except InvalidTaskRef:
            return _refused("invalid")
        if tasks.is_heldout(task.question):
            return _refused("held_out")
        shared = group.completions[: self._max_completions]
        if any(len(completion.text) > self._max_chars for completion in shared):
            return _refused("too_long")
        prompt_ids = policy.encode_prompt(task.question)
        completions = []
        for number, one in enumerate(shared):
            token_ids = policy.encode_completion(one.text, finished=one.finished)
            if token_ids is None:
                return _refused("unencodable")
            length = len(token_ids) - one.finished
            if length > self._max_tokens or len(prompt_ids) + len(token_ids) > self._max_sequence_tokens:
                return _refused("too_long")
            completions.append(Completion(number, token_ids, (), (), "stop" if one.finished else "length"))
        try:
            scores = scorer.score([(task.ref, one.text) for one in shared])
        except PoolClosed:
            return _refused("unknown_task")  # the node is leaving: nobody waits for the answer
        if sum(score.outcome in _COSTLY for score in scores) > _MAX_COSTLY_ANSWERS:
            return _refused("invalid")
        rewards = tuple(score.reward for score in scores)
        texts = tuple(one.text for one in shared)
        return Rescored(
            verdict="scored",
            rewards=rewards,
            informative=any(group_advantages(rewards, self._sapo)),
            payload=RolloutGroup(task, prompt_ids, tuple(completions), texts, rewards),
        )


def _refused(verdict: Verdict) -> Rescored:
    return Rescored(verdict)


def build_rescorer(
    config: "RunConfig",
    policy: "Policy",
    *,
    build: "Callable[[], tuple[_Policy, _Tasks, _Scorer]] | None" = None,
    executor: Executor | None = None,
) -> Rescorer:
    """Make the rescorer of a node, from parts of its own: tasks, a scoring process, a copy of the policy's tokenizer.

    `build` gives other parts, and `executor` works in the place of the rescorer's thread: where nodes share both.
    """
    positions = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    rescorer = Rescorer(
        config,
        build=build or _own_parts(config, policy),
        max_sequence_tokens=positions or 2**31,
        longest_token_chars=max(map(len, policy.tokenizer.get_vocab())),
        executor=executor,
    )
    rescorer.prepare()
    return rescorer


def _own_parts(config: "RunConfig", policy: "Policy") -> "Callable[[], tuple[_Policy, _Tasks, _Scorer]]":
    from swarm.scoring import ScoringPool
    from swarm.tasks import build_task_set

    tokenizer = copy.deepcopy(policy.tokenizer)  # two threads may not use one

    def build() -> "tuple[_Policy, _Tasks, _Scorer]":
        scoring = config.scoring.model_copy(update={"num_workers": 1})
        scorer = ScoringPool(config.tasks, scoring, niceness=_NICENESS)
        return dataclasses.replace(policy, tokenizer=tokenizer), build_task_set(config.tasks, config.seed), scorer

    return build
