"""Node records that cross a bridge: so that who looks at the swarm from one network sees the nodes of the other.

They are told to who has no link with this node, and would look for whom it can connect to (`upkeep`). Between two
networks of one transport none are taken: whoever was told of those nodes would dial them.
"""

from collections.abc import Iterator

from protocol.directory import MAX_TOLD_AGE_S, Directory
from protocol.limits import MAX_PEERS
from protocol.local import Local
from protocol.messages import NodeRecord
from protocol.refusals import Refusal
from protocol.requests import PeersResponse, decode_peers_response, encode_peers_response
from protocol.signing import verify_node_record
from protocol.wire import decode_node_record

__all__ = ["FarRecords"]


class FarRecords:
    """The newest record of each node beyond the bridge, as many as a directory holds."""

    def __init__(self, local: Local, directory: Directory) -> None:
        self._local, self._directory = local, directory
        self._records: dict[str, NodeRecord] = {}  # by node id, those heard of last, last
        self._told_ms: dict[str, int] = {}  # by node id of this side: how new the record is that was told

    def __len__(self) -> int:
        return len(self._records)

    def news(self) -> Iterator[bytes]:
        """Yield what the other side is to be told of this side's directory, in responses to `peers`."""
        fresh = [known.record for known in self._directory.nodes() if not known.num_failures]
        new = [record for record in fresh if record.created_at_ms > self._told_ms.get(record.node_id, -1)]
        self._told_ms = {record.node_id: record.created_at_ms for record in fresh}
        for start in range(0, len(new), MAX_PEERS):
            yield encode_peers_response(PeersResponse(tuple(r.encoded for r in new[start : start + MAX_PEERS])))

    async def handle(self, asker: str, payload: bytes) -> bytes:
        """Take records from the other side."""
        local = self._local
        for encoded in decode_peers_response(payload).records:
            try:
                record = decode_node_record(encoded)
                verify_node_record(local.config.swarm_id, record)
            except Refusal as refusal:
                local.refuse(refusal.reason)
                continue
            if record.transport != local.transport.name and record.node_id != local.node_id:
                self._records.pop(record.node_id, None)
                self._records[record.node_id] = record
        while len(self._records) > local.config.max_known_nodes:
            del self._records[next(iter(self._records))]
        return b""

    def some(self, max_records: int) -> list[NodeRecord]:
        """Draw records of nodes that were there lately."""
        horizon_ms = (self._local.clock() - MAX_TOLD_AGE_S) * 1000
        self._records = {node_id: r for node_id, r in self._records.items() if r.created_at_ms >= horizon_ms}
        worth = list(self._records.values())
        return self._local.rng.sample(worth, min(len(worth), max_records))
