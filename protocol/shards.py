"""Node records in the DHT: a trie of small shards, so that a swarm of two and one of ten thousand read alike.

A shard is one key of the DHT, for one salt and one prefix of a node's hash; it has room for `SHARD_ROOM` records. A
node's place is the shallowest shard on its own path where it is among the first `SHARD_ROOM` by a rank that nobody
chooses (a hash of key and owner). So a flood of records fills some shards, and pushes others deeper; it never hides
them. Two salts make two tries with unrelated keys: whoever holds all replicas of one key isolates nobody.

    key    = 16 bytes of SHA-256("swarm-node/shard" | swarm id), salt (1 byte), depth (1 byte), prefix (2 bytes)
    prefix = the first `depth` bits of SHA-256(salt byte | public key), the rest zero

A record is believed under a key only if its owner signed it, may write that key, and it expires when its signed time
says.
"""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache

from protocol.errors import IdentityError
from protocol.identity import public_key_of
from protocol.limits import MAX_FUTURE_SKEW_S, MAX_NODE_RECORD_BYTES, NODE_RECORD_TTL_S
from protocol.messages import NodeRecord
from protocol.refusals import Refusal
from protocol.signing import verify_node_record
from protocol.transport.base import Record, RecordValidator, Transport
from protocol.wire import decode_node_record

__all__ = ["MAX_SHARD_DEPTH", "NUM_SALTS", "SHARD_ROOM", "Shards", "record_validator", "shard_key"]

NUM_SALTS = 2
MAX_SHARD_DEPTH = 16
SHARD_ROOM = 12
_LOOK_UP = 0.25  # how often a node that has room looks for room above, where readers come first
_MAX_EXPIRY_ERROR_S = 1.0  # between a record's expiration and what its signed time makes of it: rounding, no more
_MAX_CHECKED = 4096  # signatures that are remembered as good, since the DHT shows the same records again and again


def shard_key(swarm_id: str, salt: int, depth: int, path: int) -> bytes:
    """Return the key of a shard; of `path` (16 bits) the first `depth` count."""
    prefix = path & ~((1 << (MAX_SHARD_DEPTH - depth)) - 1) & 0xFFFF
    return _swarm_digest(swarm_id) + bytes([salt, depth]) + prefix.to_bytes(2)


@lru_cache(maxsize=64)
def _swarm_digest(swarm_id: str) -> bytes:
    return hashlib.sha256(b"swarm-node/shard" + swarm_id.encode()).digest()[:16]


def path_of(node_id: str, salt: int) -> int:
    """Return the 16 bits that say where a node's records may stand. Raises IdentityError for no node id."""
    return int.from_bytes(hashlib.sha256(bytes([salt]) + public_key_of(node_id)).digest()[:2])


def record_validator(swarm_id: str) -> RecordValidator:
    """Return what decides for a transport which records to store, return and believe in this swarm."""
    good: OrderedDict[bytes, tuple[str, float]] = OrderedDict()  # digest of a record -> owner, created at

    def read(value: bytes, now: float) -> tuple[str, float] | None:
        digest = hashlib.sha256(value).digest()
        found = good.get(digest)
        if found is None:
            try:
                record = decode_node_record(value)
                verify_node_record(swarm_id, record)
            except Refusal:
                return None
            found = good[digest] = (record.node_id, record.created_at_ms / 1000)
            while good and (len(good) > _MAX_CHECKED or next(iter(good.values()))[1] < now - NODE_RECORD_TTL_S):
                good.popitem(last=False)
        return found

    def is_valid(key: bytes, owner: str, value: bytes, expires_at: float, now: float) -> bool:
        if len(value) > MAX_NODE_RECORD_BYTES or not now < expires_at <= now + NODE_RECORD_TTL_S + MAX_FUTURE_SKEW_S:
            return False
        try:
            may_write = len(key) == 20 and key[16] < NUM_SALTS and key[17] <= MAX_SHARD_DEPTH
            if not may_write or key != shard_key(swarm_id, key[16], key[17], path_of(owner, key[16])):
                return False
        except IdentityError:
            return False
        found = read(value, now)
        if found is None or found[0] != owner:
            return False
        # The expiration is the transport's and unsigned: bound to the signed time, an old record cannot be revived, nor
        # a holder let a live one seem older than another.
        is_due = abs(expires_at - (found[1] + NODE_RECORD_TTL_S)) <= _MAX_EXPIRY_ERROR_S
        return is_due and found[1] <= now + MAX_FUTURE_SKEW_S

    return is_valid


class Shards:
    """One node's place in the directory, and its view of the rest."""

    def __init__(self, transport: Transport, swarm_id: str, *, timeout_s: float, rng: random.Random) -> None:
        self._transport, self._swarm_id, self._timeout_s = transport, swarm_id, timeout_s
        self._rng = rng
        self._paths = [path_of(transport.node_id, salt) for salt in range(NUM_SALTS)]
        self._depths: list[int | None] = [None] * NUM_SALTS

    @property
    def depths(self) -> list[int | None]:
        """How deep the node's own records stand, by salt; None before they were placed."""
        return list(self._depths)

    async def publish(self, record: NodeRecord, salts: Sequence[int] = range(NUM_SALTS)) -> int:
        """Store the node's own record in its places; return how many nodes hold it there. Raises TransportError."""
        expires_at = record.created_at_ms / 1000 + NODE_RECORD_TTL_S
        num_holders = 0
        for salt in salts:
            key = shard_key(self._swarm_id, salt, self._depths[salt] or 0, self._paths[salt])
            num_holders += await self._transport.store(key, record.encoded, expires_at)
        return num_holders

    async def place(self, found: Callable[[NodeRecord, int], None]) -> None:
        """Find the node's places (again), and report what was read on the way. Raises TransportError.

        Looks at few shards: the present place and the one above it, or else in doubling steps downwards and back.
        """
        for salt in range(NUM_SALTS):
            hint = self._depths[salt] if self._depths[salt] is not None else self._depths[0]
            self._depths[salt] = await self._place(salt, hint or 0, found)

    async def read(self, salt: int, found: Callable[[NodeRecord, int], None]) -> None:
        """Report the records of one random shard of a trie. Raises TransportError."""
        path, depth = self._rng.getrandbits(MAX_SHARD_DEPTH), self._depths[salt] or 0
        while not await self._look(salt, depth, path, found) and depth:
            depth -= 1

    async def _place(self, salt: int, hint: int, found: Callable[[NodeRecord, int], None]) -> int:
        path = self._paths[salt]
        full, step = -1, 1  # the deepest depth that is known to be full
        depth = hint
        while not await self._has_room(salt, depth, path, found):
            if depth == MAX_SHARD_DEPTH:
                return depth
            full = depth
            depth, step = min(depth + step, MAX_SHARD_DEPTH), 2 * step
        if full < 0:
            # There is room at the hint: perhaps also above it.
            while depth and (self._depths[salt] is None or self._rng.random() < _LOOK_UP):
                if not await self._has_room(salt, depth - 1, path, found):
                    break
                depth -= 1
            return depth
        while depth - full > 1:
            middle = (full + depth) // 2
            if await self._has_room(salt, middle, path, found):
                depth = middle
            else:
                full = middle
        return depth

    async def _has_room(self, salt: int, depth: int, path: int, found: Callable[[NodeRecord, int], None]) -> bool:
        key = shard_key(self._swarm_id, salt, depth, path)
        own_rank = _rank(key, self._transport.node_id)
        others = [r for r in await self._look(salt, depth, path, found) if r.owner != self._transport.node_id]
        return sum(1 for record in others if _rank(key, record.owner) < own_rank) < SHARD_ROOM

    async def _look(
        self, salt: int, depth: int, path: int, found: Callable[[NodeRecord, int], None]
    ) -> Sequence[Record]:
        """Look a shard up, and report the records that have their place in it, and as many of the others by chance.

        The others have theirs deeper, and will move. So a crowd of nodes that join, or of names that somebody made
        up, costs no more to read than two full shards, and hides nobody for long.
        """
        key = shard_key(self._swarm_id, salt, depth, path)
        records = await self._transport.lookup(key, timeout_s=self._timeout_s)
        ranked = sorted(records, key=lambda record: _rank(key, record.owner))
        others = ranked[SHARD_ROOM:]
        for record in ranked[:SHARD_ROOM] + self._rng.sample(others, min(SHARD_ROOM, len(others))):
            found(decode_node_record(record.value), salt)
        return records


def _rank(key: bytes, owner: str) -> bytes:
    return hashlib.sha256(key + owner.encode()).digest()
