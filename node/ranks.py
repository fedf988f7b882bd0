"""The processes of one node that train its policy together, on a device each.

    leader      the first: the node with all that it has. Its trainer tells the others what it is asked, and does it
    followers   each has a trainer of the same policy, does what it is told, and ends with the leader

A follower is told over a channel of objects. Should the leader be gone without a word, by whatever end, a thread that
looks for its process ends the follower at once. Signals that ask torchrun's processes to stop are the leader's
to follow: it may need the others for the step that it finishes. What fails in a follower ends it with its traceback;
the leader finds the channel closed, and torchrun ends all.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from node.config import RunConfig
from node.parts import make_trainer
from node.torchrun import LaunchError, launch
from swarm.errors import TrainingDiverged, UserError
from swarm.policy import Policy, load_policy
from swarm.sharded_trainer import ShardedTrainer
from swarm.trainer import Trainer, UpdateStats
from swarm.types import TrainingBatch

__all__ = ["LeadingTrainer", "Ranks", "follow", "lead"]

_JOIN_WITHIN: Final = timedelta(minutes=10)  # the leader may be finding its swarm
_WAIT: Final = timedelta(days=20)  # for the leader's next word; in ms it must fit 31 bits
_LOOK_S: Final = 0.2  # how often a follower looks for the leader
_GONE_WITHIN_S: Final = 10.0  # a process whose connections are closed is gone


class Ranks:
    """The processes of this node, joined. Used by one thread at a time."""

    def __init__(self) -> None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=_JOIN_WITHIN)
        self._channel = dist.new_group(backend="gloo", timeout=_WAIT)
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._is_idle = True
        self.leader_pid: int = self._share(os.getpid())

    def placed(self, config: RunConfig) -> RunConfig:
        """Return the settings with this process's device. Raises LaunchError where there are too few GPUs."""
        device = launch().device(config.model.device, torch.cuda.device_count())
        return config.model_copy(update={"model": config.model.model_copy(update={"device": device})})

    @contextmanager
    def told(self, command: str, *arguments: Any) -> Iterator[None]:
        """Let the others do something, and do the same while the block runs."""
        self._is_idle = False  # and so it stays where the block fails: who knows where the others are
        self._share((command, arguments))
        yield
        self._is_idle = True

    def listen(self) -> tuple[str, tuple[Any, ...]]:
        """Wait for the leader's next command."""
        command: tuple[str, tuple[Any, ...]] = self._share(None)
        return command

    def agree(self, problem: str | None) -> list[str]:
        """Return the problems of all processes."""
        problems: list[str | None] = [None] * self.num_ranks
        dist.all_gather_object(problems, problem, group=self._channel)
        return [f"process {rank}: {text}" for rank, text in enumerate(problems) if text is not None]

    def close(self) -> None:
        """Let the others end, and leave. Where something has failed they find the leader gone."""
        if self._is_idle:
            self._share(("close", ()))
            dist.destroy_process_group()

    def _share(self, value: Any) -> Any:
        """Give everybody the leader's value."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._channel)
        return values[0]


class LeadingTrainer(ShardedTrainer):
    """The leader's trainer: whatever it is asked, all processes do. See Trainer."""

    ranks: Ranks

    def update(self, batch: TrainingBatch) -> UpdateStats:
        """Learn from a batch."""
        with self.ranks.told("update", batch):
            return super().update(batch)

    def policy_state(self) -> Mapping[str, Tensor]:
        """Return copies of the policy's weights in compute dtype."""
        with self.ranks.told("policy_state"):
            return super().policy_state()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return copies of what a resumed trainer needs, on the host."""
        with self.ranks.told("state_tensors"):
            return super().state_tensors()

    def load_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, int | float | str]) -> None:
        """Continue where `state_tensors` and `state_meta` were taken, by however many processes."""
        with self.ranks.told("load_state", {}, dict(meta)):
            super().load_state(tensors, meta)


def lead(ranks: Ranks, config: RunConfig, policy: Policy) -> LeadingTrainer:
    """Let every process load the policy and start a trainer of it. Raises LaunchError where one cannot."""
    # What auto stands for is decided once. The leader has loaded the policy before: what is downloaded is there.
    same = {"device": policy.model.device.type, "dtype": str(policy.model.dtype).removeprefix("torch.")}
    with ranks.told("start", config.model_copy(update={"model": config.model.model_copy(update=same)})):
        if problems := ranks.agree(None):
            raise LaunchError("; ".join(problems))
        trainer = make_trainer(config, policy, LeadingTrainer)
    assert isinstance(trainer, LeadingTrainer)
    trainer.ranks = ranks
    return trainer


def follow() -> int:
    """Train with the leader until it ends. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before it has joined, a follower is ended like any process
    ranks = Ranks()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    watch = threading.Thread(target=_end_with, args=(ranks.leader_pid,), daemon=True)
    watch.start()
    try:
        _do_as_told(ranks)
    except RuntimeError:
        watch.join(_GONE_WITHIN_S)  # which ends this process where the channel broke because the leader is gone
        raise
    return 0


def _do_as_told(ranks: Ranks) -> None:
    """Start a trainer, then do what the leader says until it says "close"."""
    _, (config,) = ranks.listen()
    trainer = _start(ranks, ranks.placed(config))
    if trainer is None:
        return
    commands: dict[str, Callable[..., object]] = {
        "update": trainer.update,
        "policy_state": trainer.policy_state,
        "state_tensors": trainer.state_tensors,
        "load_state": trainer.load_state,
    }
    while True:
        command, arguments = ranks.listen()
        if command == "close":
            dist.destroy_process_group()
            return
        try:
            commands[command](*arguments)
        except TrainingDiverged:
            continue  # the leader has found the same, and ends the run


def _start(ranks: Ranks, config: RunConfig) -> Trainer | None:
    """Start a trainer of the leader's policy; None where some process cannot, which the leader says."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    problem, policy = None, None
    try:
        if config.model.device.startswith("cuda"):
            torch.cuda.set_device(config.model.device)
        policy = load_policy(config.model)
    except UserError as error:
        problem = str(error)
    if ranks.agree(problem) or policy is None:
        return None
    return make_trainer(config, policy, ShardedTrainer)


def _end_with(pid: int) -> None:
    """Wait until a process is gone, then end this one in the middle of whatever it does: it has nothing of its own."""
    try:
        leader = psutil.Process(pid)
        while leader.is_running() and leader.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_LOOK_S)
    except psutil.NoSuchProcess:
        pass
    os._exit(0)
