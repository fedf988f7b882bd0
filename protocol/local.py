"""What the parts of one member share: identity, settings, clock, chance, transport, opinions, counters."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.clock import Clock
from protocol.config import SwarmConfig
from protocol.counters import Counters
from protocol.identity import Identity
from protocol.refusals import Reason, Refusal, RefusalCounter
from protocol.reputation import Reputation
from protocol.tasks import Tasks
from protocol.transport.base import RequestRefused, Transport

__all__ = ["Local"]


@dataclass(slots=True)
class Local:
    """One node's own things."""

    identity: Identity
    transport: Transport
    config: SwarmConfig
    clock: Clock
    rng: random.Random
    reputation: Reputation
    node_id: str
    tasks: Tasks = field(default_factory=Tasks)
    refusals: RefusalCounter = field(default_factory=RefusalCounter)
    counters: Counters = field(default_factory=Counters)
    on_ban: list[Callable[[str], None]] = field(default_factory=list)  # who wants to know that a peer is banned

    def refuse(self, reason: Reason, blame: str | None = None) -> None:
        """Count one refusal, and hold it against whoever is to blame, if the reason is one that is penalised."""
        self.refusals.count(reason)
        if blame is not None and blame != self.node_id and self.reputation.refused(blame, reason, self.clock()):
            for tell in self.on_ban:
                tell(blame)

    def refuse_request(self, reason: Reason, detail: str = "", blame: str | None = None) -> RequestRefused:
        """Count a request that is refused, and return what tells the asker so."""
        self.refuse(reason, blame)
        return RequestRefused(reason.value, detail)

    def refuse_malformed(self, refusal: Refusal, blame: str) -> RequestRefused:
        """The same, for a request that does not decode."""
        return self.refuse_request(refusal.reason, refusal.detail, blame)
