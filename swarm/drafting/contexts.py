"""What followed which context: counts of next tokens by hashed contexts of several lengths.

A suffix automaton finds the longest match of any length in less time, but what followed it last, not most often: to
count, it would have to visit every suffix. By measurement the counts are worth more (docs/drafting.md).
"""

from collections.abc import Sequence

from swarm.drafting.base import HASH_BASE, HASH_MASK

__all__ = ["NUM_CLASSES", "ORDERS", "ContextTable"]

ORDERS = (8, 4, 2)  # lengths of a context, the longest first
_POWERS = tuple(pow(HASH_BASE, order, 1 << 64) for order in ORDERS)
_NUM_AGREEMENTS = 4  # seen once; always the same; mostly the same; else
NUM_CLASSES = len(ORDERS) * _NUM_AGREEMENTS  # kinds of a proposed token: how long the match, how sure the counts


class _Followers:
    """Tokens that followed one context more than once."""

    __slots__ = ("best", "best_count", "counts", "total")

    def __init__(self, first: int, second: int) -> None:
        self.counts = {first: 1}
        self.best, self.best_count, self.total = first, 1, 1
        self.add(second)

    def add(self, token: int) -> None:
        """Count a token. Of equally frequent ones the newest is the best."""
        self.total += 1
        count = self.counts[token] = self.counts.get(token, 0) + 1
        if count >= self.best_count:
            self.best, self.best_count = token, count

    def agreement(self) -> int:
        """Return how sure the counts are of their best token."""
        return 1 if self.best_count == self.total else 2 if 4 * self.best_count >= 3 * self.total else 3


class ContextTable:
    """Contexts of the texts of one prompt."""

    def __init__(self) -> None:
        # hash of a context -> the token that followed it once, or those that followed it more often
        self._levels: tuple[dict[int, int | _Followers], ...] = tuple({} for _ in ORDERS)

    def insert(self, tokens: Sequence[int], hashes: Sequence[int], start: int, stop: int) -> None:
        """Count tokens start to stop - 1 of a text as followers of what stands before them."""
        for order, power, level in zip(ORDERS, _POWERS, self._levels, strict=True):
            for index in range(max(start, order), stop):
                key, token = (hashes[index] - hashes[index - order] * power) & HASH_MASK, tokens[index]
                found = level.get(key)
                if found is None:
                    level[key] = token
                elif isinstance(found, int):
                    level[key] = _Followers(found, token)
                else:
                    found.add(token)

    def draft(
        self, hashes: Sequence[int], rates: Sequence[float], depth: int, least: float
    ) -> tuple[list[int], list[float], list[int]]:
        """Continue a text of these prefix hashes, each time by the best follower of the longest known context.

        rates: how often a token of each class is right. Ends after `depth` tokens, where no context is known, or
        where the chance that all tokens so far are right falls below `least`. returns: the tokens, that chance
        at each of them, and their classes.
        """
        tail = list(hashes[-ORDERS[0] - 1 :])
        tokens: list[int] = []
        chances: list[float] = []
        classes: list[int] = []
        chance, first = 1.0, 0
        while len(tokens) < depth:
            for rank in range(first, len(ORDERS)):
                order = ORDERS[rank]
                if len(tail) <= order:
                    continue
                found = self._levels[rank].get((tail[-1] - tail[-1 - order] * _POWERS[rank]) & HASH_MASK)
                if found is not None:
                    break
            else:
                break
            token, agreement = (found, 0) if isinstance(found, int) else (found.best, found.agreement())
            kind = rank * _NUM_AGREEMENTS + agreement
            chance *= rates[kind]
            if chance < least:
                break
            tokens.append(token)
            chances.append(chance)
            classes.append(kind)
            tail.append((tail[-1] * HASH_BASE + token + 1) & HASH_MASK)
            first = max(rank - 1, 0)  # a context grows by one token: it cannot skip a length that failed before
        return tokens, chances, classes
