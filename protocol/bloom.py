"""A Bloom filter over 32-byte keys: the batches that a node knows, told in a few bits each.

Bit i of the filter is bit i % 8, counted from the lowest, of byte i // 8. A key sets bits (a + n * b) mod num_bits for
n from 0 to num_hashes - 1, where SHA-256(salt ‖ key) begins with a and b, 8 bytes each, lowest first. Another salt
errs on other keys.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator

from protocol.limits import MAX_BLOOM_BYTES, MAX_BLOOM_HASHES
from protocol.requests import RepairRequest

__all__ = ["bloom_bits", "in_bloom", "repair_request"]

_BITS_PER_KEY = 13  # with 9 hashes one key in 500 is taken for known
_NUM_HASHES = 9


def bloom_bits(salt: bytes, keys: Iterable[bytes], num_bits: int, num_hashes: int) -> bytes:
    """Return the filter over some keys, `num_bits` (a multiple of 8) in size."""
    if num_bits % 8 or not 0 <= num_bits <= 8 * MAX_BLOOM_BYTES or not 1 <= num_hashes <= MAX_BLOOM_HASHES:
        raise ValueError(f"no filter has {num_bits} bits and {num_hashes} hashes")
    bits = bytearray(num_bits // 8)
    if bits:
        for key in keys:
            for position in _positions(salt, key, num_bits, num_hashes):
                bits[position >> 3] |= 1 << (position & 7)
    return bytes(bits)


def repair_request(salt: bytes, roots: Collection[bytes], max_offers: int) -> RepairRequest:
    """Return the request of a node that knows these batches, with a filter of fitting size."""
    num_bytes = min(MAX_BLOOM_BYTES, -(-_BITS_PER_KEY * len(roots) // 8))
    return RepairRequest(salt, _NUM_HASHES, bloom_bits(salt, roots, 8 * num_bytes, _NUM_HASHES), max_offers)


def in_bloom(request: RepairRequest, root: bytes) -> bool:
    """Whether the asker says that it knows this batch; once in a while it does so by mistake."""
    num_bits = 8 * len(request.bits)
    return num_bits > 0 and all(
        request.bits[position >> 3] >> (position & 7) & 1
        for position in _positions(request.salt, root, num_bits, request.num_hashes)
    )


def _positions(salt: bytes, key: bytes, num_bits: int, num_hashes: int) -> Iterator[int]:
    digest = hashlib.sha256(salt + key).digest()
    start, step = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    return ((start + n * step) % num_bits for n in range(num_hashes))
