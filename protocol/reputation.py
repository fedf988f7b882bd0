"""What this node thinks of its peers, from what it has seen itself; never told to anyone, never heard from anyone.

A score is a sum of outcomes that fades with a half-life. A peer whose score falls below the threshold is banned
for a while. An author that has given enough useful groups, over no less than the time of probation, is *established*:
`pool` and `planning` give all others one common share, so that throwing identities away buys nothing. Who pays for
which outcome is `admission`'s to say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protocol.refusals import Reason

__all__ = ["MAX_PEERS_JUDGED", "PENALTIES", "Reputation"]

MAX_PEERS_JUDGED = 4096  # beyond it, what is closest to no opinion is forgotten
MAX_SCORE = 20.0  # good deeds beyond it do not pay for bad ones
USEFUL, SERVED, UNRESPONSIVE = 1.0, 0.05, -0.2
MALFORMED = -2.5  # a bug could do it: several of them end in a ban
HOSTILE = -6.0  # nothing but intent does it: two of them end in a ban

PENALTIES: Mapping[Reason, float] = {
    reason: HOSTILE if reason in {Reason.CONFLICT, Reason.WRONG_IDENTITY} else MALFORMED
    for reason in Reason
    if reason.penalised
}


_LEAST_USEFUL = 0.6  # of a group: one that was given a while ago does not count as steady use


@dataclass(slots=True)
class _Opinion:
    """Sums as they were at one time."""

    at_s: float  # unix seconds
    score: float = 0.0
    useful: float = 0.0  # groups that could be learnt from
    useful_since_s: float = 0.0  # since when it has never faded below `_LEAST_USEFUL`
    established: bool = False  # since the record was made, until `useful` has fallen to half of it


class Reputation:
    """Scores by node id. Times are unix seconds."""

    def __init__(
        self,
        *,
        half_life_s: float,
        min_score: float,
        ban_s: float,
        min_useful: float,
        probation_s: float,
        max_peers: int = MAX_PEERS_JUDGED,
    ) -> None:
        self._half_life_s, self._min_score, self._ban_s, self._min_useful = half_life_s, min_score, ban_s, min_useful
        self._probation_s, self._max_peers = probation_s, max_peers
        self._opinions: dict[str, _Opinion] = {}
        self._banned_until_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._opinions)

    def useful(self, author: str, now_s: float) -> None:
        """An author's group was admitted, and can be learnt from."""
        opinion = self._changed(author, USEFUL, now_s)
        if opinion.useful < _LEAST_USEFUL:
            opinion.useful_since_s = now_s
        opinion.useful = min(opinion.useful + 1, 4 * self._min_useful)
        if opinion.useful >= self._min_useful and now_s - opinion.useful_since_s >= self._probation_s:
            opinion.established = True

    def served(self, holder: str, now_s: float) -> None:
        """A holder gave what it was asked for."""
        self._changed(holder, SERVED, now_s)

    def unresponsive(self, peer: str, now_s: float) -> None:
        """A peer did not answer in time: often its line's fault, so that this alone never leads to a ban."""
        if self.score(peer, now_s) > self._min_score / 2:
            self._changed(peer, UNRESPONSIVE, now_s)

    def refused(self, peer: str, reason: Reason, now_s: float) -> bool:
        """A peer sent something that is refused. Returns whether it is banned from now on."""
        if not reason.penalised:
            return False
        if self._changed(peer, PENALTIES[reason], now_s).score >= self._min_score:
            return False
        self._banned_until_s[peer] = now_s + self._ban_s
        if len(self._banned_until_s) > self._max_peers:
            del self._banned_until_s[min(self._banned_until_s, key=self._banned_until_s.__getitem__)]
        return True

    def score(self, peer: str, now_s: float) -> float:
        """The faded sum of outcomes; 0 for a stranger."""
        opinion = self._opinions.get(peer)
        return opinion.score * self._faded(opinion, now_s) if opinion else 0.0

    def is_established(self, author: str, now_s: float) -> bool:
        """Whether an author has a record of useful groups, and is not in disgrace."""
        opinion = self._opinions.get(author)
        if opinion is None or not opinion.established or opinion.score < 0:
            return False
        return opinion.useful * self._faded(opinion, now_s) >= self._min_useful / 2

    def is_banned(self, peer: str, now_s: float) -> bool:
        """Whether a peer is refused for now."""
        until_s = self._banned_until_s.get(peer)
        if until_s is not None and now_s >= until_s:
            del self._banned_until_s[peer]
            return False
        return until_s is not None

    def banned(self, now_s: float) -> set[str]:
        """The peers that are refused for now."""
        return {peer for peer, until_s in self._banned_until_s.items() if now_s < until_s}

    def state(self) -> dict[str, Any]:
        """Plain data that `restore` takes."""
        rows = [
            [peer, o.at_s, o.score, o.useful, o.useful_since_s, o.established] for peer, o in self._opinions.items()
        ]
        return {"opinions": rows, "banned_until_s": dict(self._banned_until_s)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._opinions = {
            peer: _Opinion(at_s, score, useful, since_s, established)
            for peer, at_s, score, useful, since_s, established in state["opinions"][: self._max_peers]
        }
        self._banned_until_s = dict(state["banned_until_s"])

    def _changed(self, peer: str, outcome: float, now_s: float) -> _Opinion:
        """Fade what is known of a peer to now, add an outcome, return it."""
        opinion = self._opinions.get(peer)
        if opinion is None:
            if len(self._opinions) >= self._max_peers:
                self._forget(now_s)
            opinion = self._opinions[peer] = _Opinion(now_s)
        faded = self._faded(opinion, now_s)
        if opinion.useful * faded < self._min_useful / 2:
            opinion.established = False
        opinion.useful *= faded
        opinion.score = min(opinion.score * faded + outcome, MAX_SCORE)
        opinion.at_s = max(now_s, opinion.at_s)
        return opinion

    def _faded(self, opinion: _Opinion, now_s: float) -> float:
        return float(0.5 ** (max(0.0, now_s - opinion.at_s) / self._half_life_s))

    def _forget(self, now_s: float) -> None:
        """Make room: a quarter of the peers, those of whom least is known. Seldom, hence sorting is cheap."""
        ranked = sorted(
            self._opinions, key=lambda p: abs(self._opinions[p].score) * self._faded(self._opinions[p], now_s)
        )
        for peer in ranked[: max(1, self._max_peers // 4)]:
            del self._opinions[peer]
