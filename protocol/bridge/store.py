"""What a side of a bridge can give: frames that it holds, and frames that the other side can have brought."""

from collections import OrderedDict

from protocol.store import FrameStore

__all__ = ["BridgeStore"]


class BridgeStore(FrameStore):
    """Frames by batch, with *claims*: frames that are offered as if they were held, and fetched when one is asked for.

    Of too many batches those claimed first are no longer offered.
    """

    def __init__(self, max_bytes: int, max_claims: int) -> None:
        super().__init__(max_bytes)
        self._max_claims = max_claims
        self._claims: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # root -> frames as bits, expires_at_s

    def mask(self, root: bytes) -> int:
        """Return which frames of a batch can be given, as bits."""
        return super().mask(root) | self.claimed(root)

    def roots(self) -> list[bytes]:
        """The batches of which something can be given."""
        held = super().roots()
        return held + [root for root in self._claims if self.get(root) is None]

    def claimed(self, root: bytes) -> int:
        """Return which frames the other side can have brought, as bits."""
        return self._claims.get(root, (0, 0.0))[0]

    def held(self, root: bytes) -> int:
        """Return which frames are here, as bits."""
        return super().mask(root)

    @property
    def num_claims(self) -> int:
        """Batches of which the other side can bring something."""
        return len(self._claims)

    def claim(self, root: bytes, frames: int, expires_at_s: float) -> None:
        """Offer these frames too from now on."""
        self._claims[root] = (self.claimed(root) | frames, expires_at_s)
        if len(self._claims) > self._max_claims:
            self._claims.popitem(last=False)

    def give_up(self, root: bytes) -> None:
        """Offer what is here alone: the other side has nothing of this batch any more."""
        self._claims.pop(root, None)

    def expire(self, now_s: float) -> None:
        """Drop what nobody may want any more."""
        super().expire(now_s)
        for root in [root for root, (_, expires_at_s) in self._claims.items() if expires_at_s <= now_s]:
            self.give_up(root)
