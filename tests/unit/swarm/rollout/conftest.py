"""An engine without a model: it writes the tokens that a table of lengths and a rate of change name."""

from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest

from swarm.engine.base import Engine, EngineStats, Request
from swarm.seeds import fold_seed
from swarm.types import Completion, Segment


class SimulatedEngine(Engine):
    """Writes `length(seed)` tokens for a request, one a step. New weights change a share of all tokens.

    It holds callers to the contract: a request that is given twice, or resumed with what it has not written, fails.
    """

    verifies_drafts = True  # type: ignore[misc]
    policy_version = 0

    def __init__(self, length: Callable[[int], int], num_slots: int, change: float = 0.0) -> None:
        self.stats = EngineStats()
        self.length, self.num_slots, self.change = length, num_slots, change
        self.waiting: deque[Request] = deque()
        self.running: dict[int, tuple[Request, int, int]] = {}  # id -> request, tokens, tokens that were resumed
        self.changed: dict[tuple[int, int], tuple[int, int]] = {}  # seed, position -> versions looked at, last change
        self.generated: Counter[int] = Counter()  # by seed: tokens that were decoded, not kept from a draft

    def token(self, seed: int, position: int, version: int) -> int:
        """What a version writes: the token of the newest version that changed this position."""
        if not self.change:
            return (seed + position) % 1000
        looked, last = self.changed.get((seed, position), (0, 0))
        if version < last:
            looked = last = 0
        for newer in range(looked + 1, version + 1):
            last = newer if fold_seed(seed, position, newer) < self.change * 2.0**64 else last
        self.changed[seed, position] = version, last
        return fold_seed(seed, position, last, 1) % 1000

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            held = {one.request_id for one in self.waiting} | self.running.keys()
            assert request.request_id not in held
            partial = request.partial
            total = len(request.draft) + (len(partial.token_ids) if partial else 0)
            assert total <= request.sampling.max_new_tokens
            assert partial is None or (partial.finish_reason == "aborted" and self.verified(request))
            self.waiting.append(request)

    def verified(self, request: Request) -> bool:
        """Whether the tokens of a partial completion are those of the versions that are named."""
        assert request.partial is not None
        ids, parts = request.partial.token_ids, request.partial.segments
        assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == len(ids) == len(request.partial.logprobs)
        looked_at = [(part.policy_version, at) for part in parts for at in (part.start, part.end - 1)]
        return all(ids[at] == self.token(request.seed, at, version) for version, at in looked_at)

    def end(self, request: Request) -> int:
        return min(self.length(request.seed), request.sampling.max_new_tokens)

    def step(self) -> list[Completion]:
        while self.waiting and len(self.running) < self.num_slots:
            request = self.waiting.popleft()
            kept = 0
            for at, token in enumerate(request.draft):
                if token != self.token(request.seed, at, self.policy_version):
                    break
                kept = at + 1
            self.stats.num_draft_tokens += len(request.draft)
            self.stats.num_draft_tokens_kept += kept
            start = len(request.partial.token_ids) if request.partial else 0
            self.running[request.request_id] = request, start + kept, start
        done = []
        self.stats.num_steps += 1
        for number, (request, num, start) in list(self.running.items()):
            if num < self.end(request):
                num += 1
                self.stats.num_slot_steps += 1
                self.stats.num_tokens_generated += 1
                self.generated[request.seed] += 1
            self.running[number] = request, num, start
            if num >= self.end(request):
                done.append(self.take(number, "stop" if num == self.length(request.seed) else "length"))
        return done

    def take(self, number: int, reason: Any) -> Completion:
        request, num, start = self.running.pop(number)
        parts = request.partial.segments if request.partial else ()
        ids = request.partial.token_ids if request.partial else ()
        ids += tuple(self.token(request.seed, at, self.policy_version) for at in range(start, num))
        if num > start:
            if parts and parts[-1].policy_version == self.policy_version:
                *before, last = parts
                parts = (*before, Segment(self.policy_version, last.start, num))
            else:
                parts = (*parts, Segment(self.policy_version, start, num))
        return Completion(number, ids, (-0.5,) * num, parts, reason)

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        assert request_ids is None
        stopped = [one.partial or Completion(one.request_id, (), (), (), "aborted") for one in self.waiting]
        stopped = [
            Completion(one.request_id, got.token_ids, got.logprobs, got.segments, "aborted")
            for one, got in zip(self.waiting, stopped, strict=True)
        ]
        self.waiting.clear()
        return stopped + [self.take(number, "aborted") for number in list(self.running)]

    def load_policy(self, state: Any, version: int) -> None:
        assert not self.num_unfinished
        self.policy_version = version

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def simulated() -> type[SimulatedEngine]:
    return SimulatedEngine
