"""A node whose parts are in memory: the policy is one number, learning adds to it, and nothing takes long."""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from node.config import RunConfig
from node.daemon import Node
from node.display import Display
from node.exchange import Exchange, SiloExchange
from node.recorder import Recorder
from node.run_folder import RunFolder
from protocol.messages import TaskRef
from swarm.drafting.drafting import Drafting
from swarm.types import Completion, RolloutGroup, Segment, Task, TrainingBatch


class QuietDisplay(Display):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rounds: list[int] = []

    def begin(self, info) -> None: ...

    def loaded(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def evaluated_before(self, pass_at_1: float) -> None:
        self.notes.append(f"before {pass_at_1}")

    def resumed(self, rows) -> None:
        self.notes.append(f"resumed after {rows[-1]['round']}")

    def round(self, row) -> None:
        self.rounds.append(row["round"])

    def end(self) -> None: ...


class NumberTrainer:
    """Its weight grows with every advantage that it sees, in an order-dependent way."""

    def __init__(self, fail_at: int | None = None, error: BaseException | None = None) -> None:
        self.weight = torch.zeros(3, dtype=torch.float64)
        self.policy_version = 0
        self._fail_at, self._error = fail_at, error

    def update(self, batch: TrainingBatch) -> Any:
        if self._error is not None and self.policy_version + 1 == self._fail_at:
            raise self._error
        for group in batch.groups:
            self.weight = torch.sin(self.weight * 1.7 + sum(map(float.__mul__, group.advantages, (0.3, 0.7, 1.1, 1.3))))
        self.policy_version += 1
        return SimpleNamespace(
            loss=float(self.weight[0]),
            grad_norm=1.0,
            clip_fraction=0.0,
            tis_mean=1.0,
            mismatch=0.0,
            learning_rate=0.1,
            skipped=False,
        )

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def num_state_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def state_meta(self) -> dict[str, int]:
        return {"policy_version": self.policy_version}

    def load_state(self, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        self.weight, self.policy_version = tensors["weight"].clone(), meta["policy_version"]

    def policy_state(self) -> dict[str, torch.Tensor]:
        return self.state_tensors()


class NumberTasks:
    def train_batch(self, round_index: int, num_tasks: int, *, stride: int | None = None) -> list[Task]:
        return [Task(TaskRef("numbers", "0" * 32, round_index, index), "?") for index in range(num_tasks)]

    def heldout(self, num_tasks: int) -> list[Task]:
        return self.train_batch(0, num_tasks)


class NumberEngine:
    """Completes in one step; the token depends on the request's seed and the weight."""

    max_seq_len = 100

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping
        self.weight = 0.0
        self.num_aborts = 0

    def generate(self, requests: Sequence[Any]) -> list[Completion]:
        return [self.complete(request.request_id, request.seed) for request in requests]

    def complete(self, request_id: int, seed: int) -> Completion:
        token = (seed + int(1e6 * (1 + self.weight))) % 5
        return Completion(request_id, (token,), (-0.5,), (Segment(0, 0, 1),), "stop")

    def abort(self, request_ids: Collection[int] | None = None) -> list[Completion]:
        self.num_aborts += 1
        return []

    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        self.weight = float(state["weight"][0])

    def release_memory(self) -> None: ...

    def close(self) -> None: ...


class NumberRollouts:
    def __init__(self, engine: NumberEngine, on_round: Callable[[int], None]) -> None:
        self.engine = engine
        self.on_round = on_round

    def collect(
        self, tasks: Sequence[Task], *, round_index: int, spans: Sequence[range] | None = None
    ) -> list[RolloutGroup]:
        self.on_round(round_index)
        groups = []
        for task, span in zip(tasks, spans or [range(4)] * len(tasks), strict=True):
            written = tuple(self.engine.complete(i, round_index * 7 + task.ref.index * 3 + i * i) for i in span)
            groups.append(RolloutGroup(task, (1,), written, tuple(str(item.token_ids[0]) for item in written)))
        return groups

    def load_policy(self, state: Mapping[str, torch.Tensor], version: int) -> None:
        self.engine.load_policy(state, version)

    def describe(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any] | None:
        return None

    def load_state(self, plain: Mapping[str, Any] | None) -> None:
        assert plain is None


class NumberScorer:
    """An answer is right if it is 0 or 1."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.closed = False

    def score(self, jobs: Sequence[tuple[TaskRef, str]]) -> list[Any]:
        self.counts["scored"] += len(jobs)
        return [SimpleNamespace(reward=float(text in "01"), outcome="scored") for _, text in jobs]

    def score_groups(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        jobs = [[(group.task.ref, text) for text in group.texts] for group in groups]
        return [
            group.with_rewards(tuple(score.reward for score in self.score(job)))
            for group, job in zip(groups, jobs, strict=True)
        ]

    def prefetch(self, refs: Sequence[TaskRef]) -> None: ...

    def close(self) -> None:
        self.closed = True


SHORT_RUN = RunConfig.model_validate(
    {"rounds": 12, "evaluation": {"num_items": 5, "every_rounds": 4}, "checkpoint": {"interval_s": 1e9}}
)


@dataclass
class Harness:
    """Makes nodes over one run folder, one after another as a resume would."""

    path: Path
    config: RunConfig = SHORT_RUN
    exchange: Exchange = field(default_factory=SiloExchange)
    on_round: Callable[[int], None] = lambda round_index: None
    trainer: NumberTrainer = field(default_factory=NumberTrainer)
    display: QuietDisplay = field(default_factory=QuietDisplay)
    drafting: Drafting = field(default_factory=Drafting)
    parts: Any = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    def settings(self, **sections: Any) -> "Harness":
        self.config = RunConfig.model_validate(self.config.model_dump() | sections)
        return self

    def node(self) -> Node:
        self.path.mkdir(exist_ok=True)
        policy = SimpleNamespace(encode_prompt=lambda text: (1,), decode=lambda ids: str(ids[0]))

        def build(config: RunConfig, stopping: threading.Event) -> Any:
            engine = NumberEngine(stopping)
            self.parts = SimpleNamespace(
                policy=policy,
                tasks=NumberTasks(),
                engine=engine,
                rollouts=NumberRollouts(engine, self.on_round),
                scorer=NumberScorer(),
                trainer=self.trainer,
                drafting=self.drafting,
                ranks=None,
            )
            return self.parts

        recorder = Recorder(self.folder, self.config.checkpoint)
        return Node(self.config, build_parts=build, recorder=recorder, exchange=self.exchange, display=self.display)

    def run(self) -> Node:
        node = self.node()
        asyncio.run(node.run())
        return node


@pytest.fixture
def harness(tmp_path: Path) -> Callable[..., Harness]:
    """Return a function that makes a harness over a named folder."""

    def make(name: str = "run", *, fails: tuple[int, BaseException] | None = None, **changes: Any) -> Harness:
        """`fails`: the update that fails, and with what."""
        trainer = NumberTrainer(*fails) if fails is not None else NumberTrainer()
        return Harness(tmp_path / name, trainer=trainer, **changes)

    return make
