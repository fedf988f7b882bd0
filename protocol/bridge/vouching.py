"""Which authors of the other side nodes of this one have learnt from: these are let through when their side is flooded.

A bridge scores nothing, so that all authors would be alike to it, and a flood of names that cost nothing would leave
honest ones what is theirs by number. Nodes hold what their own verifier has found of use, and say so to who asks
(`repair`): a side asks one trainer after the other among its neighbours which batches of the other side it holds. A
batch counts once, and an author once in each answer, whoever answers. What is made of it is the other side's
`reputation`'s to say, by the rules of any node: a record takes ten minutes of use.

A neighbour may lie: the offers of one answer, the time between two of them, and what an author with a record may have
passed on (`side`) bound what that brings.
"""

from collections.abc import Sequence

from protocol.announcements import Announcements
from protocol.bridge.store import BridgeStore
from protocol.identity import node_id_of, public_key_of
from protocol.limits import PUBLIC_KEY_BYTES
from protocol.local import Local
from protocol.neighbours import Neighbours
from protocol.refusals import Refusal
from protocol.repairs import ask_repair
from protocol.requests import Offer
from protocol.wire import decode_announcement

__all__ = ["MAX_AUTHORS_BYTES", "Vouching", "decode_authors", "encode_authors"]

MAX_OFFERS = 32  # of one answer
MAX_AUTHORS_BYTES = MAX_OFFERS * PUBLIC_KEY_BYTES


class Vouching:
    """The questions of one side."""

    def __init__(self, local: Local, announcements: Announcements, store: BridgeStore, neighbours: Neighbours) -> None:
        self._local, self._announcements, self._store, self._neighbours = local, announcements, store, neighbours
        self._counted: set[bytes] = set()  # batches of the other side that somebody has learnt from

    async def ask(self) -> list[str]:
        """Ask a neighbour; return the authors of the other side that it has learnt from, as far as that is news."""
        local, roots = self._local, self._announcements.roots()
        self._counted &= set(roots)
        trainers = [link.node_id for link in self._neighbours.ids.values() if link.record.role == "trainer"]
        if not trainers or not self._store.num_claims:
            return []
        node_id = local.rng.choice(trainers)
        of_no_use = [root for root in roots if root in self._counted or not self._store.claimed(root)]
        offers = await ask_repair(local, self._neighbours, node_id, of_no_use, MAX_OFFERS)
        try:
            return self._authors_of(offers or ())
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=node_id)
            return []

    def _authors_of(self, offers: Sequence[Offer]) -> list[str]:
        """Return whose batches are offered that the other side has told of, and that have not been counted."""
        found: dict[str, None] = {}
        for offer in offers:
            batch = self._announcements.get(decode_announcement(offer.encoded).root)
            if batch is None or batch.root in self._counted or not self._store.claimed(batch.root):
                continue  # it comes from this side, or was not heard of yet
            if offer.held & batch.all_frames:
                self._counted.add(batch.root)
                found[batch.author] = None
        return list(found)


def encode_authors(authors: Sequence[str]) -> bytes:
    """Return node ids as one side tells the other: their public keys."""
    return b"".join(map(public_key_of, authors))


def decode_authors(payload: bytes) -> list[str]:
    """Return the node ids that `encode_authors` was given."""
    return [node_id_of(payload[at : at + PUBLIC_KEY_BYTES]) for at in range(0, len(payload), PUBLIC_KEY_BYTES)]
