"""Which records a DHT node stores and believes: its owner's signed ones, few, small and short-lived.

A record stands in hivemind's DHT as one entry of a dictionary: DHT key = SHA-1 of the key, subkey = the owner's
node id, value = MessagePack bytes of (1 byte length of the key, key, value). The key travels in the value since
a node that stores it is told the hash alone. Plain values, whole dictionaries, entries brought by another than
their owner, and cache entries are refused. Nothing here needs hivemind to be imported but the storage's class.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import msgpack
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils.timed_storage import ValueWithExpiration

from protocol.clock import Clock
from protocol.errors import IdentityError
from protocol.identity import public_key_of
from protocol.transport.base import MAX_RECORD_VALUE_BYTES, Record, RecordValidator
from protocol.transport.records import (
    MAX_CLOCK_SKEW_S,
    MAX_KEY_BYTES,
    MAX_RECORDS_PER_KEY,
    RecordRules,
    RecordStore,
)

__all__ = [
    "MAX_CLOCK_SKEW_S",
    "MAX_PACKED_BYTES",
    "MAX_RECORDS_PER_KEY",
    "BoundedStorage",
    "OwnedRecordValidator",
    "dht_id_of_key",
    "pack_record",
    "unpack_records",
]

MAX_PACKED_BYTES = 1 + MAX_KEY_BYTES + MAX_RECORD_VALUE_BYTES


def dht_id_of_key(key: bytes) -> DHTID:
    """Return where a key stands in the DHT. Raises ValueError for one that is too long."""
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ValueError(f"a key has 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")
    return DHTID.from_bytes(hashlib.sha1(key, usedforsecurity=False).digest())


def pack_record(key: bytes, value: bytes) -> bytes:
    """Return a record's value as the DHT holds it."""
    packed: bytes = msgpack.packb(bytes([len(key)]) + key + value, use_bin_type=True)
    return packed


def _unpack(packed: bytes) -> tuple[bytes, bytes] | None:
    """Return (key, value), or None for bytes that `pack_record` cannot have made."""
    if len(packed) > MAX_PACKED_BYTES + 5:
        return None
    try:
        content = msgpack.unpackb(packed, raw=False)
    except (ValueError, msgpack.UnpackException):
        return None
    if not isinstance(content, bytes) or not content or len(content) < 1 + content[0]:
        return None
    key, value = content[1 : 1 + content[0]], content[1 + content[0] :]
    return (key, value) if packed == pack_record(key, value) and len(value) <= MAX_RECORD_VALUE_BYTES else None


class OwnedRecordValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """What hivemind asks before it stores a record, and before it believes one that a peer returned."""

    def __init__(self, validator: RecordValidator, clock: Clock) -> None:
        self._rules = RecordRules(validator, clock)

    def validate(self, record: DHTRecord) -> bool:
        """Whether this is a live record of its owner."""
        return self.owner_of(record.key, record.subkey, record.value, record.expiration_time) is not None

    def owner_of(self, dht_key: bytes, subkey: bytes, packed: bytes, expires_at: float) -> str | None:
        """Return whose good record this is, or None for one that is not good."""
        if not self._rules.is_timely(expires_at):
            return None
        owner, content = _owner_of_subkey(subkey), _unpack(packed)
        if owner is None or content is None:
            return None
        key, value = content
        if not key or len(key) > MAX_KEY_BYTES or dht_id_of_key(key).to_bytes() != dht_key:
            return None
        return owner if self._rules.is_good(key, owner, value, expires_at) else None


def _owner_of_subkey(subkey: bytes) -> str | None:
    """Return the node id that a packed subkey names, or None where it names none."""
    if len(subkey) > 64:
        return None
    try:
        owner = msgpack.unpackb(subkey, raw=False)
        if not isinstance(owner, str) or msgpack.packb(owner, use_bin_type=True) != subkey:
            return None
        public_key_of(owner)
    except (ValueError, msgpack.UnpackException, IdentityError):
        return None
    return owner


class BoundedStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind has no types
    """A `RecordStore` as hivemind's DHT uses it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._held = RecordStore(clock)

    def store(self, key: DHTID, value: Any, expiration_time: float, subkey: Any = None) -> bool:
        """Store a record; refuse a plain value."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Store a good record as far as the quotas allow. Returns whether it is held now."""
        return self._held.put(key, subkey, value, expiration_time)

    def get(self, key: DHTID) -> ValueWithExpiration | None:
        """Return a copy of what is under a key, as the dictionary that hivemind sends."""
        held = self._held.get(key)
        records = {owner: ValueWithExpiration(one.value, one.expires_at) for owner, one in held.items()}
        return as_dictionary(records) if records else None

    def items(self) -> Iterator[Any]:
        """Return nothing: hivemind would hand whole dictionaries over to new neighbours, which refuse them."""
        return iter(())

    def __len__(self) -> int:
        return len(self._held)

    def __bool__(self) -> bool:
        return bool(len(self._held))


def as_dictionary(records: dict[str, ValueWithExpiration]) -> ValueWithExpiration:
    """Return records as the value that hivemind sends and merges."""
    dictionary = DictionaryDHTValue()
    with dictionary.freeze():
        for owner, (value, expires_at) in records.items():
            dictionary.store(owner, value, expires_at)
    return ValueWithExpiration(dictionary, dictionary.latest_expiration_time)


def unpack_records(dictionary: Any) -> list[Record]:
    """Return the records of a dictionary whose entries are all good."""
    records = []
    with dictionary.freeze():
        for owner, (packed, expires_at) in dictionary.items():
            content = _unpack(packed)
            if content is not None:
                records.append(Record(owner, content[1], expires_at))
    return records
