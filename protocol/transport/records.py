"""Which records a node of any DHT stores and believes: their owners' signed ones, few, small and short-lived.

    RecordRules    whether a record is a live one of its owner's: what the transport's validator says, asked once
    RecordStore    what one node holds for the others

How a record is packed, and who may bring it, is the DHT's.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from protocol.clock import Clock
from protocol.errors import IdentityError
from protocol.identity import public_key_of
from protocol.transport.base import MAX_RECORD_VALUE_BYTES, RecordValidator

__all__ = ["MAX_CLOCK_SKEW_S", "MAX_KEY_BYTES", "MAX_RECORDS_PER_KEY", "Held", "RecordRules", "RecordStore"]

MAX_KEY_BYTES = 64
MAX_RECORD_LIFE_S = 600.0  # from now until a record expires
MAX_CLOCK_SKEW_S = 60.0  # between the owner's clock and ours
MAX_RECORDS_PER_KEY = 256  # owners under one key on one node
MAX_KEYS_PER_OWNER = 16  # on one node
MAX_RECORDS = 16_384  # on one node
MIN_RENEWAL_S = 1.0  # a record replaces its owner's earlier one if it expires at least this much later
_NUM_REMEMBERED = 8192  # records whose signature was found good


class RecordRules:
    """What is asked before a record is stored, and before one that a peer returned is believed."""

    def __init__(self, validator: RecordValidator, clock: Clock) -> None:
        self._validator, self._clock = validator, clock
        self._good: OrderedDict[bytes, None] = OrderedDict()  # digests; what is good stays so until it expires

    def is_timely(self, expires_at: float) -> bool:
        """Whether a record may expire then."""
        now = self._clock()
        return math.isfinite(expires_at) and now < expires_at <= now + MAX_RECORD_LIFE_S + MAX_CLOCK_SKEW_S

    def is_good(self, key: bytes, owner: str, value: bytes, expires_at: float) -> bool:
        """Whether this is a live record of its owner."""
        if not 1 <= len(key) <= MAX_KEY_BYTES or len(value) > MAX_RECORD_VALUE_BYTES or not self.is_timely(expires_at):
            return False
        try:
            public_key_of(owner)
        except IdentityError:
            return False
        digest = hashlib.sha256(repr((key, owner, value, expires_at)).encode()).digest()
        if digest not in self._good:
            if not self._validator(key, owner, value, expires_at, self._clock()):
                return False
            self._good[digest] = None
            if len(self._good) > _NUM_REMEMBERED:
                self._good.popitem(last=False)
        return True


@dataclass(frozen=True, slots=True)
class Held:
    """A record's value as it is held."""

    value: bytes
    expires_at: float  # unix seconds


class RecordStore:
    """What one node holds for the others. First come, first kept: who is there cannot be crowded out."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._keys: dict[Hashable, dict[str, Held]] = {}
        self._owners: dict[str, set[Hashable]] = {}
        self._num_records = 0

    def put(self, key: Hashable, owner: str, value: bytes, expires_at: float) -> bool:
        """Store a good record as far as the quotas allow. Returns whether it is held now."""
        self._drop_expired(key)
        earlier = self._keys.get(key, {}).get(owner)
        if earlier is not None:
            if earlier.value == value and earlier.expires_at == expires_at:
                return True
            if earlier.expires_at + MIN_RENEWAL_S > expires_at:
                return False
        elif not self._has_room(key, owner):
            self._drop_all_expired()
            if not self._has_room(key, owner):
                return False
        if earlier is None:
            self._num_records += 1
            self._keys.setdefault(key, {})
            self._owners.setdefault(owner, set()).add(key)
        self._keys[key][owner] = Held(value, expires_at)
        return True

    def get(self, key: Hashable) -> dict[str, Held]:
        """Return a copy of what is under a key, by owner."""
        self._drop_expired(key)
        return dict(self._keys.get(key, {}))

    def __len__(self) -> int:
        self._drop_all_expired()
        return self._num_records

    def _has_room(self, key: Hashable, owner: str) -> bool:
        return (
            self._num_records < MAX_RECORDS
            and len(self._keys.get(key, ())) < MAX_RECORDS_PER_KEY
            and len(self._owners.get(owner, ())) < MAX_KEYS_PER_OWNER
        )

    def _drop_expired(self, key: Hashable) -> None:
        held, now = self._keys.get(key, {}), self._clock()
        for owner in [owner for owner, record in held.items() if record.expires_at <= now]:
            del held[owner]
            self._num_records -= 1
            self._owners[owner].discard(key)
            if not self._owners[owner]:
                del self._owners[owner]
        if key in self._keys and not held:
            del self._keys[key]

    def _drop_all_expired(self) -> None:
        for key in list(self._keys):
            self._drop_expired(key)
