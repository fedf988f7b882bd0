"""Whom a node knows of the DHT: Kademlia's buckets of nodes that it has met, with the addresses that they told. Pure.

A place is SHA-256 of the peer id, so that a node cannot choose it, and distance is XOR. Who is there first stays, until
it does not answer: a crowd of new nodes does not drive out those that have long been useful.
"""

import hashlib
from collections import OrderedDict

from protocol.transport.peer_id import peer_bytes_of

__all__ = ["NUM_NEIGHBOURS", "RoutingTable", "place_of_key", "place_of_node"]

NUM_NEIGHBOURS = 20  # in one bucket, and that one names as nearer to a key


def place_of_key(key: bytes) -> int:
    """Return where a key stands."""
    return int.from_bytes(hashlib.sha256(key).digest(), "big")


def place_of_node(node_id: str) -> int:
    """Return the one place that a node may have. Raises IdentityError for a string that is no node id."""
    return place_of_key(peer_bytes_of(node_id))


class RoutingTable:
    """The nodes that one node knows, more of those near to it."""

    def __init__(self, own: str) -> None:
        self._own, self._own_place = own, place_of_node(own)
        self._buckets: dict[int, OrderedDict[str, tuple[str, ...]]] = {}  # by length of the distance in bits

    def add(self, node_id: str, addresses: tuple[str, ...]) -> None:
        """Take a node that was met, or its new addresses, where there is room."""
        if node_id == self._own:
            return
        bucket = self._bucket(node_id)
        if node_id in bucket or len(bucket) < NUM_NEIGHBOURS:
            bucket[node_id] = addresses

    def drop(self, node_id: str) -> None:
        """Forget a node that does not answer."""
        self._bucket(node_id).pop(node_id, None)

    def addresses(self, node_id: str) -> tuple[str, ...]:
        """Return where a node said that it can be reached; nothing where it is not known."""
        return self._bucket(node_id).get(node_id, ())

    def nearest(self, place: int, num: int = NUM_NEIGHBOURS) -> list[tuple[str, tuple[str, ...]]]:
        """Return the known nodes nearest to a place, with their addresses, the nearest first."""
        known = [item for bucket in self._buckets.values() for item in bucket.items()]
        return sorted(known, key=lambda item: place_of_node(item[0]) ^ place)[:num]

    def ids(self) -> list[str]:
        """Return the known nodes."""
        return [node_id for bucket in self._buckets.values() for node_id in bucket]

    def _bucket(self, node_id: str) -> "OrderedDict[str, tuple[str, ...]]":
        distance = place_of_node(node_id) ^ self._own_place
        return self._buckets.setdefault(distance.bit_length(), OrderedDict())
