"""The strategy tuner: for each size of the running batch, whether to speculate, with which drafter, and how much.

A bandit per bucket of running sequences. An arm is a strategy, `OFF` one of them; its reward is tokens per second and
sequence, forgotten exponentially. One arm is the incumbent; others are tried in bursts of a few steps.

    ledger      the time that speculation has lost against `OFF`, less what it won since. It never passes a share of the
                time that was measured, plus a few steps: whatever the rewards are, throughput stays above plain
                decoding's by that bound, as `OFF` was last measured. Wins are not saved up for later losses.
    hysteresis  an arm has to beat the incumbent by a margin over two bursts; one that loses waits, each time
                twice as long, or four times where it is clearly worse.
    forgetting  `OFF` is measured again and again while speculation is on; a new policy halves what is known, and
                ends long waits.

Departures from TLT: its ε-greedy choice explores whatever it costs; here what exploring may cost is the bound.
Speculation is an arm against `OFF` at every batch size, in place of a threshold on the batch size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["OFF", "Strategy", "StrategyTuner", "bucket_of"]


@dataclass(frozen=True, slots=True)
class Strategy:
    """How to speculate."""

    drafter: str  # its name; "off": not at all
    depth: int = 0  # tokens of one draft, at most
    num_verified: int = 0  # tokens of all drafts of a step, at most

    @property
    def key(self) -> str:
        """Its name in checkpoints and on displays."""
        return f"{self.drafter}/{self.depth}/{self.num_verified}" if self.depth else self.drafter


OFF = Strategy("off")

_BURST_STEPS = 4
_MEMORY_STEPS = 48.0  # an arm's reward is a mean over about so many of its own steps
_LEAST_STEPS = 2 * _BURST_STEPS  # that an arm has to have been tried before it can become the incumbent
_MARGIN = 0.03  # by which it has to be better
_CLEARLY = 0.85  # an arm of less than this share of the incumbent's rate is clearly worse
_WAIT_STEPS = 48  # between two bursts of an arm
_OFF_WAIT_STEPS = 96  # between two bursts of OFF while speculation is on
_MAX_WAIT_STEPS = 6144
_ALLOWED_STEPS = 4.0  # steps of plain decoding that the ledger may hold beside its share of the time


def bucket_of(num_running: int) -> int:
    """Return the least size of the bucket that a batch size belongs to: 1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, …"""
    if num_running <= 4:
        return num_running
    half = 1 << ((num_running - 1).bit_length() - 1)  # half < num_running <= 2 * half
    return half + 1 if num_running <= half + half // 2 else half + half // 2 + 1


@dataclass(slots=True)
class _Arm:
    """What is known of a strategy in one bucket."""

    progress: float = 0.0  # tokens per sequence, forgotten exponentially
    elapsed_s: float = 0.0  # likewise
    num_steps: float = 0.0  # likewise; at most _MEMORY_STEPS
    wait_steps: int = _WAIT_STEPS
    due: int = 0  # step of the bucket from which on it may be tried

    @property
    def rate(self) -> float:
        """Tokens per sequence and second; 0 where nothing is known."""
        return self.progress / self.elapsed_s if self.elapsed_s else 0.0

    def add(self, progress: float, elapsed_s: float) -> None:
        """Take a step."""
        keep = 1 - 1 / _MEMORY_STEPS
        self.progress = keep * self.progress + progress
        self.elapsed_s = keep * self.elapsed_s + elapsed_s
        self.num_steps = keep * self.num_steps + 1

    def begin_burst(self) -> None:
        """What was measured long ago counts as two bursts at most."""
        if self.num_steps > _LEAST_STEPS:
            keep = _LEAST_STEPS / self.num_steps
            self.progress, self.elapsed_s, self.num_steps = self.progress * keep, self.elapsed_s * keep, _LEAST_STEPS

    def lost(self, at: int, *, clearly: bool = False) -> None:
        """Wait twice as long for the next try, or four times."""
        self.due = at + self.wait_steps
        self.wait_steps = min((4 if clearly else 2) * self.wait_steps, _MAX_WAIT_STEPS)

    def forget(self, at: int) -> None:
        """The policy has changed."""
        self.progress, self.elapsed_s, self.num_steps = self.progress / 2, self.elapsed_s / 2, self.num_steps / 2
        self.wait_steps = max(self.wait_steps // 2, _WAIT_STEPS)
        self.due = min(self.due, at + self.wait_steps)


@dataclass(slots=True)
class _Bucket:
    arms: list[_Arm]
    incumbent: int = 0
    chosen: int = 0
    burst_left: int = 0  # steps that the arm which is tried still has
    step: int = 0
    look_at: int = 0  # step from which on to look whether an arm is due
    total_s: float = 0.0
    lost_s: float = 0.0  # the ledger


@dataclass(slots=True)
class StrategyTuner:
    """Chooses a strategy for each decode step. Holds no clock: who calls it measures."""

    strategies: Sequence[Strategy]  # beside OFF
    max_lost_share: float = 0.01  # of the time, that speculation may lose against plain decoding
    saved_s: float = field(default=0.0, init=False)  # by speculation, against OFF as it was last measured
    _buckets: dict[int, _Bucket] = field(default_factory=dict, init=False)
    _bucket_of_size: dict[int, _Bucket] = field(default_factory=dict, init=False)
    _all: list[Strategy] = field(init=False)

    def __post_init__(self) -> None:
        """Put OFF first."""
        self._all = [OFF, *self.strategies]
        if len({one.key for one in self._all}) != len(self._all):
            raise ValueError("a strategy is named twice, or is OFF, which is always there")

    def choose(self, num_running: int) -> Strategy:
        """Return the strategy of the next step with so many sequences."""
        bucket = self._bucket(num_running)
        if not bucket.burst_left or not self._affords(bucket, bucket.chosen):
            bucket.burst_left = 0
            bucket.chosen = self._next(bucket)
        return self._all[bucket.chosen]

    def _next(self, bucket: _Bucket) -> int:
        """Return the arm of the next steps, and begin a burst where it is not the incumbent."""
        if bucket.incumbent and not self._affords(bucket, bucket.incumbent):
            self._retreat(bucket)
        if bucket.step < bucket.look_at or bucket.arms[0].num_steps < _BURST_STEPS - 0.5:
            return bucket.incumbent
        bucket.look_at = bucket.step + _BURST_STEPS
        waiting = [
            (arm.due, index) for index, arm in enumerate(bucket.arms)
            if index != bucket.incumbent and arm.due <= bucket.step and self._affords(bucket, index, _BURST_STEPS)
        ]  # fmt: skip
        if waiting:
            bucket.burst_left, (_, index) = _BURST_STEPS, min(waiting)
            bucket.arms[index].begin_burst()
            return index
        return bucket.incumbent

    def _affords(self, bucket: _Bucket, index: int, num_steps: int = 1) -> bool:
        """Whether so many steps of an arm leave the ledger within its bounds, if they are as the last ones were.

        An arm that was never tried is taken to make no progress at all.
        """
        if index == 0:
            return True
        off, arm = bucket.arms[0], bucket.arms[index]
        if not off.num_steps:
            return False
        step_s = off.elapsed_s / off.num_steps
        loss_s = step_s
        if arm.num_steps:
            loss_s = max(0.0, (arm.elapsed_s - arm.progress / off.rate) / arm.num_steps) if off.rate else 0.0
        return bucket.lost_s + num_steps * loss_s <= self.max_lost_share * bucket.total_s + _ALLOWED_STEPS * step_s

    def observe(self, num_running: int, num_tokens: int, elapsed_s: float) -> None:
        """Take what a step gave: the tokens of all sequences, and the time from proposing to bookkeeping."""
        bucket = self._bucket(num_running)
        bucket.step += 1
        bucket.total_s += elapsed_s
        off, arm = bucket.arms[0], bucket.arms[bucket.chosen]
        progress = num_tokens / num_running
        if bucket.chosen and off.rate:
            saved_s = progress / off.rate - elapsed_s
            self.saved_s += saved_s
            bucket.lost_s = max(0.0, bucket.lost_s - saved_s)
        arm.add(progress, elapsed_s)
        if bucket.burst_left:
            bucket.burst_left -= 1
            if not bucket.burst_left:
                self._judge(bucket)
        if bucket.incumbent and arm is bucket.arms[bucket.incumbent] and arm.rate < off.rate:
            self._retreat(bucket)

    def _judge(self, bucket: _Bucket) -> None:
        """A burst has ended: the arm becomes the incumbent, or waits."""
        arm, incumbent = bucket.arms[bucket.chosen], bucket.arms[bucket.incumbent]
        if bucket.chosen == 0:  # measured again, for what it is to be compared with
            arm.due = bucket.step + _OFF_WAIT_STEPS
            if incumbent.rate < arm.rate:
                self._retreat(bucket)
        elif arm.num_steps < _LEAST_STEPS and arm.rate > incumbent.rate:
            arm.due = bucket.step + _BURST_STEPS
        elif arm.num_steps >= _LEAST_STEPS and arm.rate > (1 + _MARGIN) * incumbent.rate:
            incumbent.due = bucket.step + _WAIT_STEPS
            bucket.incumbent = bucket.chosen
        else:
            arm.lost(bucket.step, clearly=arm.rate < _CLEARLY * incumbent.rate)

    def _retreat(self, bucket: _Bucket) -> None:
        """Speculation has come to lose: it is off until an arm has won again."""
        bucket.arms[bucket.incumbent].lost(bucket.step)
        bucket.incumbent = bucket.burst_left = 0

    def policy_changed(self, version: int) -> None:
        """The policy has new weights: what was measured counts for less."""
        for bucket in self._buckets.values():
            for arm in bucket.arms:
                arm.forget(bucket.step)

    def incumbents(self) -> dict[int, Strategy]:
        """Return the strategy that holds in each bucket, by its least batch size."""
        return {size: self._all[bucket.incumbent] for size, bucket in sorted(self._buckets.items())}

    def state(self) -> dict[str, Any]:
        """Return what has been learned, as plain data."""
        return {
            str(size): {
                "incumbent": self._all[bucket.incumbent].key,
                "step": bucket.step,
                "total_s": bucket.total_s,
                "lost_s": bucket.lost_s,
                "arms": {
                    strategy.key: [arm.progress, arm.elapsed_s, arm.num_steps, arm.wait_steps, arm.due]
                    for strategy, arm in zip(self._all, bucket.arms, strict=True)
                },
            }
            for size, bucket in self._buckets.items()
        }

    def load_state(self, plain: Mapping[str, Any]) -> None:
        """Go on with what `state` returned. Strategies that it does not know begin anew; unknown ones are dropped."""
        self._buckets, self._bucket_of_size = {}, {}
        keys = [strategy.key for strategy in self._all]
        for size, one in plain.items():
            arms = [_Arm(*one["arms"][key]) if key in one["arms"] else _Arm() for key in keys]
            incumbent = keys.index(one["incumbent"]) if one["incumbent"] in keys else 0
            self._buckets[int(size)] = _Bucket(
                arms, incumbent, incumbent, step=one["step"], total_s=one["total_s"], lost_s=one["lost_s"]
            )

    def _bucket(self, num_running: int) -> _Bucket:
        bucket = self._bucket_of_size.get(num_running)
        if bucket is None:
            size = bucket_of(num_running)
            if size not in self._buckets:
                self._buckets[size] = _Bucket([_Arm() for _ in self._all])
            bucket = self._bucket_of_size[num_running] = self._buckets[size]
        return bucket
