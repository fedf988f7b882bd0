"""What nodes of the transport `libp2p` ask each other for the DHT, as bytes. A decoder raises DhtRefused and no other.

    dht_meet    [now_ms, addresses]      →  the same        who is there, by which clock, reachable where
    dht_find    [place, key]             →  [nodes, records]   who is near a place; what is held under the key, if any
    dht_store   [key, value, expires_at] →  [held]          hold this record of mine

All are canonical MessagePack. A node is `[public key, addresses]`, a record `[owner's public key, value, expires_at]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protocol import codec
from protocol.errors import CodecError
from protocol.identity import node_id_of, public_key_of
from protocol.limits import MAX_ADDRESS_BYTES, MAX_ADDRESSES, PUBLIC_KEY_BYTES
from protocol.transport.base import MAX_RECORD_VALUE_BYTES, Record
from protocol.transport.libp2p_routing import NUM_NEIGHBOURS
from protocol.transport.records import MAX_KEY_BYTES, MAX_RECORDS_PER_KEY

__all__ = [
    "FIND",
    "MAX_FIND_REQUEST_BYTES",
    "MAX_FIND_RESPONSE_BYTES",
    "MAX_MEET_BYTES",
    "MAX_STORE_REQUEST_BYTES",
    "MAX_STORE_RESPONSE_BYTES",
    "MEET",
    "STORE",
    "DhtRefused",
    "Find",
    "Found",
    "Meet",
    "Store",
]

MEET, FIND, STORE = "dht_meet", "dht_find", "dht_store"
PLACE_BYTES = 32
MAX_MEET_BYTES = 32 + MAX_ADDRESSES * (MAX_ADDRESS_BYTES + 4)
MAX_FIND_REQUEST_BYTES = 128
MAX_FIND_RESPONSE_BYTES = NUM_NEIGHBOURS * (48 + MAX_MEET_BYTES) + MAX_RECORDS_PER_KEY * (MAX_RECORD_VALUE_BYTES + 64)
MAX_STORE_REQUEST_BYTES = MAX_KEY_BYTES + MAX_RECORD_VALUE_BYTES + 32
MAX_STORE_RESPONSE_BYTES = 16
MAX_MS = 2**53  # whatever a clock may say


class DhtRefused(Exception):
    """A message that no honest node sends."""


def _open(data: bytes, num_fields: int, max_bytes: int, max_values: int) -> list[Any]:
    try:
        fields = codec.decode(data, max_bytes=max_bytes, max_values=max_values)
    except CodecError as error:
        raise DhtRefused(str(error)) from error
    if not isinstance(fields, list) or len(fields) != num_fields:
        raise DhtRefused(f"not an array of {num_fields}")
    return fields


def _binary(value: Any, least: int, most: int) -> bytes:
    if not isinstance(value, bytes) or not least <= len(value) <= most:
        raise DhtRefused(f"not {least} to {most} bytes")
    return value


def _items(value: Any, most: int, num_fields: int) -> list[list[Any]]:
    if not isinstance(value, list) or len(value) > most:
        raise DhtRefused(f"not an array of at most {most}")
    if any(not isinstance(item, list) or len(item) != num_fields for item in value):
        raise DhtRefused(f"an item that is not an array of {num_fields}")
    return value


def _addresses(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_ADDRESSES:
        raise DhtRefused("too many addresses")
    if any(not isinstance(one, str) or len(one.encode()) > MAX_ADDRESS_BYTES for one in value):
        raise DhtRefused("an address that is none")
    return tuple(value)


def _time(value: Any) -> float:
    if not isinstance(value, float):
        raise DhtRefused("a time that is no float")
    return value


def _node_id(value: Any) -> str:
    return node_id_of(_binary(value, PUBLIC_KEY_BYTES, PUBLIC_KEY_BYTES))


@dataclass(frozen=True, slots=True)
class Meet:
    """Who is there; request and response alike."""

    now_ms: int  # unix milliseconds by the sender's clock
    addresses: tuple[str, ...]  # multiaddresses without the peer id

    def encode(self) -> bytes:
        """Return it as bytes."""
        return codec.encode([self.now_ms, list(self.addresses[:MAX_ADDRESSES])])

    @classmethod
    def decode(cls, data: bytes) -> "Meet":
        """Return what bytes say."""
        now_ms, addresses = _open(data, 2, MAX_MEET_BYTES, 4 + MAX_ADDRESSES)
        if type(now_ms) is not int or not 0 <= now_ms <= MAX_MS:
            raise DhtRefused("a time that is none")
        return cls(now_ms, _addresses(addresses))


@dataclass(frozen=True, slots=True)
class Find:
    """Who is near a place, and what is held under a key, if one is asked for."""

    place: int
    key: bytes  # empty: none

    def encode(self) -> bytes:
        """Return it as bytes."""
        return codec.encode([self.place.to_bytes(PLACE_BYTES, "big"), self.key])

    @classmethod
    def decode(cls, data: bytes) -> "Find":
        """Return what bytes say."""
        place, key = _open(data, 2, MAX_FIND_REQUEST_BYTES, 4)
        return cls(int.from_bytes(_binary(place, PLACE_BYTES, PLACE_BYTES), "big"), _binary(key, 0, MAX_KEY_BYTES))


@dataclass(frozen=True, slots=True)
class Found:
    """The answer to `Find`. Nobody signs for the addresses; a record its owner has signed."""

    nodes: Sequence[tuple[str, tuple[str, ...]]]  # (node id, addresses)
    records: Sequence[Record]

    def encode(self) -> bytes:
        """Return it as bytes."""
        nodes = [[public_key_of(node_id), list(addresses)] for node_id, addresses in self.nodes]
        records = [[public_key_of(record.owner), record.value, record.expires_at] for record in self.records]
        return codec.encode([nodes, records])

    @classmethod
    def decode(cls, data: bytes) -> "Found":
        """Return what bytes say."""
        max_values = 4 + NUM_NEIGHBOURS * (4 + MAX_ADDRESSES) + 5 * MAX_RECORDS_PER_KEY
        nodes, records = _open(data, 2, MAX_FIND_RESPONSE_BYTES, max_values)
        return cls(
            [(_node_id(key), _addresses(addresses)) for key, addresses in _items(nodes, NUM_NEIGHBOURS, 2)],
            [
                Record(_node_id(owner), _binary(value, 0, MAX_RECORD_VALUE_BYTES), _time(expires_at))
                for owner, value, expires_at in _items(records, MAX_RECORDS_PER_KEY, 3)
            ],
        )


@dataclass(frozen=True, slots=True)
class Store:
    """Hold a record of the asker's."""

    key: bytes
    value: bytes
    expires_at: float

    def encode(self) -> bytes:
        """Return it as bytes."""
        return codec.encode([self.key, self.value, self.expires_at])

    @classmethod
    def decode(cls, data: bytes) -> "Store":
        """Return what bytes say."""
        key, value, expires_at = _open(data, 3, MAX_STORE_REQUEST_BYTES, 6)
        return cls(_binary(key, 1, MAX_KEY_BYTES), _binary(value, 0, MAX_RECORD_VALUE_BYTES), _time(expires_at))

    @staticmethod
    def encode_answer(held: bool) -> bytes:
        """Return the answer as bytes."""
        return codec.encode([held])

    @staticmethod
    def decode_answer(data: bytes) -> bool:
        """Return whether it is held."""
        return _open(data, 1, MAX_STORE_RESPONSE_BYTES, 4)[0] is True
