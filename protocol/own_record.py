"""The node's own record: signed when it is first needed, and anew when it is renewed."""

from collections.abc import Callable

from protocol.about import NodeAbout
from protocol.clock import Clock
from protocol.identity import Identity
from protocol.limits import MAX_TASKS
from protocol.messages import NodeRecord
from protocol.signing import sign_node_record
from protocol.transport.base import Transport

__all__ = ["OwnRecord", "sign_own_record"]

_MAX_AGE_S = 60.0  # of the record that a hello shows


def sign_own_record(
    identity: Identity, transport: Transport, swarm_id: str, about: NodeAbout, created_at_ms: int
) -> NodeRecord:
    """Return a node's record as it is now."""
    return sign_node_record(
        identity,
        swarm_id,
        transport=transport.name,
        addresses=transport.addresses,
        created_at_ms=created_at_ms,
        role=about.role,
        software=about.software,
        model=about.model,
        tasks=about.tasks[:MAX_TASKS],
        rollouts_per_minute=about.rollouts_per_minute,
    )


class OwnRecord:
    """The newest record of this node."""

    def __init__(
        self, identity: Identity, transport: Transport, swarm_id: str, about: Callable[[], NodeAbout], clock: Clock
    ) -> None:
        self._identity, self._transport, self._swarm_id, self._about = identity, transport, swarm_id, about
        self._clock = clock
        self._record: NodeRecord | None = None

    def __call__(self) -> NodeRecord:
        """Return a record that is not old."""
        if self._record is None or self._clock() - self._record.created_at_ms / 1000 > _MAX_AGE_S:
            return self.renew()
        return self._record

    def renew(self) -> NodeRecord:
        """Sign a new record and return it."""
        self._record = sign_own_record(
            self._identity, self._transport, self._swarm_id, self._about(), int(self._clock() * 1000)
        )
        return self._record
