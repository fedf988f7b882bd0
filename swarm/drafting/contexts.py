"""What followed which context: counts of next tokens by hashed contexts of several lengths.

A draft asks the table of its own prompt, and a table of what all prompts' completions have in common: how a kind of
answer begins, goes on and ends is known before a prompt has any completion.

A suffix automaton finds the longest match of any length in less time, but what followed it last, not most often: to
count, it would have to visit every suffix. By measurement the counts are worth more (docs/drafting.md).
"""

from collections.abc import Sequence

from swarm.drafting.base import HASH_BASE, HASH_MASK

__all__ = ["NUM_CLASSES", "ORDERS", "ContextTable", "draft"]

ORDERS = (8, 4, 2)  # lengths of a context, the longest first
_POWERS = tuple(pow(HASH_BASE, order, 1 << 64) for order in ORDERS)
_NUM_AGREEMENTS = 4  # seen once; always the same; mostly the same; else
_NUM_OWN = len(ORDERS) * _NUM_AGREEMENTS
NUM_CLASSES = 2 * _NUM_OWN  # kinds of a proposed token: whose table, how long the match, how sure the counts


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

    def find(self, keys: Sequence[int | None]) -> tuple[int, int] | None:
        """Return the best follower of the longest known context, and how it is known (rank and agreement).

        keys: the hash of the context of each order; None where the text is too short.
        """
        for rank, (key, level) in enumerate(zip(keys, self._levels, strict=True)):
            found = None if key is None else level.get(key)
            if found is not None:
                kind = rank * _NUM_AGREEMENTS
                return (found, kind) if isinstance(found, int) else (found.best, kind + found.agreement())
        return None


def draft(
    tables: Sequence[ContextTable],
    common: Sequence[ContextTable],
    hashes: Sequence[int],
    rates: Sequence[float],
    depth: int,
    least: float,
) -> tuple[list[int], list[float], list[int]]:
    """Continue a text of these prefix hashes, each time by the likelier of what its own and the common tables say.

    Of `tables`, and of `common`, the first that knows a context is asked. rates: how often a token of each class is
    right. Ends after `depth` tokens, where no context is known, or where the chance that all tokens so far are right
    falls below `least`. returns: the tokens, that chance at each of them, and their classes.
    """
    tail = list(hashes[-ORDERS[0] - 1 :])
    tokens: list[int] = []
    chances: list[float] = []
    classes: list[int] = []
    chance = 1.0
    while len(tokens) < depth:
        keys = [
            (tail[-1] - tail[-1 - order] * power) & HASH_MASK if len(tail) > order else None
            for order, power in zip(ORDERS, _POWERS, strict=True)
        ]
        best, token, kind = 0.0, -1, -1
        for first_kind, asked in ((0, tables), (_NUM_OWN, common)):
            found = next(filter(None, (table.find(keys) for table in asked)), None)
            if found is not None and rates[first_kind + found[1]] > best:
                token, kind = found[0], first_kind + found[1]
                best = rates[kind]
        chance *= best
        if kind < 0 or chance < least:
            break
        tokens.append(token)
        chances.append(chance)
        classes.append(kind)
        tail.append((tail[-1] * HASH_BASE + token + 1) & HASH_MASK)
    return tokens, chances, classes
