"""Frames that this node gives to whoever asks: its own batches and what it admitted of others, bounded in bytes.

Frames are held under the root of their batch, with the digests that prove them. Which batches are live is
`announcements`'s; how much one peer may ask for is `pulling`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["FrameStore", "HeldBatch"]


@dataclass(slots=True)
class HeldBatch:
    """Part of a batch, or all of it."""

    digests: tuple[bytes, ...]  # of every frame of the batch, held or not
    expires_at_s: float  # unix seconds
    own: bool
    frames: dict[int, bytes] = field(default_factory=dict)  # by number

    @property
    def mask(self) -> int:
        """The numbers of the frames that are held, as bits."""
        return sum(1 << number for number in self.frames)


class FrameStore:
    """Frames by batch. Where room runs out, the batches of others that were added first go first, then own ones."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._batches: dict[bytes, HeldBatch] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def get(self, root: bytes) -> HeldBatch | None:
        """Return what is held of a batch."""
        return self._batches.get(root)

    def mask(self, root: bytes) -> int:
        """Return which frames of a batch are held, as bits."""
        held = self._batches.get(root)
        return held.mask if held else 0

    def roots(self) -> list[bytes]:
        """The batches of which something is held, oldest first."""
        return list(self._batches)

    def add_own(self, root: bytes, digests: Sequence[bytes], frames: Sequence[bytes], expires_at_s: float) -> None:
        """Hold a whole batch of this node."""
        self._batches[root] = HeldBatch(tuple(digests), expires_at_s, True, dict(enumerate(frames)))
        self.num_bytes += sum(map(len, frames))
        self._make_room(root)

    def add(self, root: bytes, digests: Sequence[bytes], number: int, frame: bytes, expires_at_s: float) -> None:
        """Hold one frame of another author's batch."""
        held = self._batches.get(root)
        if held is None:
            held = self._batches[root] = HeldBatch(tuple(digests), expires_at_s, False)
        if number not in held.frames:
            held.frames[number] = frame
            self.num_bytes += len(frame)
            self._make_room(root)

    def drop(self, root: bytes) -> None:
        """Forget a batch."""
        held = self._batches.pop(root, None)
        if held is not None:
            self.num_bytes -= sum(map(len, held.frames.values()))

    def expire(self, now_s: float) -> None:
        """Drop what nobody may want any more."""
        for root in [root for root, held in self._batches.items() if held.expires_at_s <= now_s]:
            self.drop(root)

    def _make_room(self, newest: bytes) -> None:
        tests: tuple[Callable[[HeldBatch], bool], ...] = (lambda held: not held.own, lambda held: True)
        for may_go in tests:
            while self.num_bytes > self._max_bytes:
                root = next((r for r, held in self._batches.items() if r != newest and may_go(held)), None)
                if root is None:
                    break
                self.drop(root)
