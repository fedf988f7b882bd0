"""Prompt lookup, the baseline: what followed the last tokens where the sequence had them before.

It looks at one sequence alone, its prompt included, and takes the most recent place with the longest match.
"""

from collections.abc import Sequence

from swarm.drafting.base import HASH_BASE, HASH_MASK, Drafter, SequenceState
from swarm.drafting.worth import UNKNOWN, Worth

__all__ = ["NgramDrafter"]

_ORDERS = (4, 3, 2)  # lengths of a match, the longest first


class _Places:
    """Where the contexts of one sequence were last seen."""

    __slots__ = ("num_seen", "tables")

    def __init__(self) -> None:
        self.tables: tuple[dict[int, int], ...] = tuple({} for _ in _ORDERS)
        self.num_seen = 0  # tokens whose contexts are in the tables


class NgramDrafter(Drafter):
    """Copies what followed the last occurrence of the longest match of up to four tokens."""

    name = "ngram"

    def __init__(self) -> None:
        self._places: dict[int, _Places] = {}
        self._levels = tuple((order, pow(HASH_BASE, order, 1 << 64)) for order in _ORDERS)

    def propose(
        self, states: Sequence[SequenceState], depth: int, budget: int, worth: Worth = UNKNOWN
    ) -> list[list[int]]:
        """See Drafter. Where the budget is short, each sequence with a match gets an equal share."""
        drafts = [self._draft(state, min(depth, state.room)) for state in states]
        num_drafts = sum(map(bool, drafts))
        if sum(map(len, drafts)) > budget:
            share, left = divmod(budget, num_drafts)
            for draft in drafts:
                if draft:
                    del draft[share + (left > 0) :]
                    left -= 1
        return drafts

    def _draft(self, state: SequenceState, most: int) -> list[int]:
        places = self._places.setdefault(state.request_id, _Places())
        tokens, hashes = state.tokens, state.prefix_hashes()
        end = len(tokens)
        for (order, power), table in zip(self._levels, places.tables, strict=True):
            # the context that ends the sequence is not entered yet: it has no successor
            for index in range(max(places.num_seen, order), end):
                table[(hashes[index] - hashes[index - order] * power) & HASH_MASK] = index
        places.num_seen = end
        if most > 0:
            for (order, power), table in zip(self._levels, places.tables, strict=True):
                if end >= order:
                    place = table.get((hashes[end] - hashes[end - order] * power) & HASH_MASK)
                    if place is not None:
                        return tokens[place : place + most]
        return []

    def observe(self, state: SequenceState) -> None:
        """Forget a sequence that does not run any more."""
        self._places.pop(state.request_id, None)
