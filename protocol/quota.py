"""How much a peer may cost: token buckets by name, in bounded memory.

A bucket holds up to `burst` tokens and gains `per_s` of them a second. One that has filled up again is as good as
new, so that only buckets in use are remembered.
"""

__all__ = ["Quota", "Quotas"]


class Quota:
    """One token bucket. Times are seconds of any clock that does not go back."""

    __slots__ = ("_at_s", "_burst", "_per_s", "_tokens")

    def __init__(self, per_s: float, burst: float, now_s: float) -> None:
        self._per_s, self._burst, self._tokens, self._at_s = per_s, burst, burst, now_s

    def take(self, now_s: float, cost: float = 1.0) -> bool:
        """Spend `cost` tokens if they are there."""
        self._fill(now_s)
        if self._tokens < cost:
            return False
        self._tokens -= cost
        return True

    def spend(self, now_s: float, cost: float) -> None:
        """Spend what has been used already; the bucket may go into debt."""
        self._fill(now_s)
        self._tokens -= cost

    def is_full(self, now_s: float) -> bool:
        """Whether nothing of it has been spent lately."""
        self._fill(now_s)
        return self._tokens >= self._burst

    def _fill(self, now_s: float) -> None:
        self._tokens = min(self._burst, self._tokens + self._per_s * max(0.0, now_s - self._at_s))
        self._at_s = max(now_s, self._at_s)


class Quotas:
    """Buckets of one kind by the name of who spends."""

    def __init__(self, per_s: float, burst: float, max_names: int) -> None:
        self._per_s, self._burst, self._max_names = per_s, burst, max_names
        self._buckets: dict[str, Quota] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, name: str, now_s: float, cost: float = 1.0) -> bool:
        """Spend `cost` of a name's tokens if they are there; where too many names spend at once, nobody new may."""
        bucket = self._bucket(name, now_s)
        return bucket is not None and bucket.take(now_s, cost)

    def spend(self, name: str, now_s: float, cost: float) -> None:
        """Book what a name has used already."""
        bucket = self._bucket(name, now_s)
        if bucket is not None:
            bucket.spend(now_s, cost)

    def _bucket(self, name: str, now_s: float) -> Quota | None:
        bucket = self._buckets.get(name)
        if bucket is None:
            if len(self._buckets) >= self._max_names:
                self._buckets = {n: b for n, b in self._buckets.items() if not b.is_full(now_s)}
                if len(self._buckets) >= self._max_names:
                    return None
            bucket = self._buckets[name] = Quota(self._per_s, self._burst, now_s)
        return bucket
