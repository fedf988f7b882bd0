"""How far this node's clock is from those of the peers that it has met: one of them may be wrong, not most."""

import statistics
from collections import OrderedDict

__all__ = ["ClockOffsets"]

MAX_OFFSET_S = 5.0  # beyond it people are warned; hello is refused beyond `limits.MAX_FUTURE_SKEW_S`
_MAX_PEERS = 64


class ClockOffsets:
    """The last offset to each peer: positive where the peer is ahead."""

    def __init__(self) -> None:
        self._offsets_s: OrderedDict[str, float] = OrderedDict()
        self._refusals: OrderedDict[str, str] = OrderedDict()

    def note(self, peer: str, offset_s: float) -> None:
        """Take what a peer's hello shows; half of the time on the way is an error of it."""
        self._offsets_s.pop(peer, None)
        self._refusals.pop(peer, None)
        self._offsets_s[peer] = offset_s
        if len(self._offsets_s) > _MAX_PEERS:
            self._offsets_s.popitem(last=False)

    def note_refused(self, peer: str, detail: str) -> None:
        """Take what a peer says that refuses this node for its clock: peers that take it outweigh it."""
        self._refusals.pop(peer, None)
        self._refusals[peer] = detail
        if len(self._refusals) > _MAX_PEERS:
            self._refusals.popitem(last=False)

    @property
    def median_s(self) -> float | None:
        """How far ahead the peers' clocks are; None before the first peer."""
        return statistics.median(self._offsets_s.values()) if self._offsets_s else None

    @property
    def warning(self) -> str | None:
        """One line for people, where this node's clock is the odd one."""
        if len(self._refusals) > len(self._offsets_s):
            return (
                f"{len(self._refusals)} peers refuse this node for its clock: {next(reversed(self._refusals.values()))}"
            )
        median_s = self.median_s
        if median_s is None or abs(median_s) <= MAX_OFFSET_S:
            return None
        side = "behind" if median_s > 0 else "ahead of"
        return (
            f"the clock is {abs(median_s):.0f} s {side} those of {len(self._offsets_s)} peers: "
            "set it, for example with `timedatectl set-ntp true`"
        )
