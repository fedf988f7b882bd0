"""Canonical MessagePack: one value has one encoding.

A value is None, a bool, an integer of 64 bits, a finite float, a string, bytes, a list (tuples are written
as lists), or a mapping with string keys. Keys are written in the order of their UTF-8 bytes, integers in
their shortest form, floats with 64 bits. `decode` refuses every other encoding of the same value, so that
equal digests mean equal bytes. What a record means is `messages`'s, which fields it has is `wire`'s, signing is
`signing`'s, and how large anything may be is `limits`'s.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack

from protocol.errors import CodecError
from protocol.limits import MAX_DEPTH, MAX_FILE_RECORD_BYTES, MAX_RECORD_BYTES, MAX_SOURCE_BYTES, MAX_UINT64
from protocol.messages import TaskRef

__all__ = ["DIGEST_HEX_DIGITS", "decode", "digest", "encode", "pack_task_ref", "unpack_task_ref"]

DIGEST_HEX_DIGITS = 32  # 128 bits of SHA-256

_MIN_SIGNED = -(2**63)
_TEXTS, _ARRAYS = (str, bytes), (list, tuple)

# MessagePack's tags from 0xc0 to 0xdf: bytes of the length, bytes always there, bytes and values per unit of length.
_SCALAR, _BINARY, _EXTENSION, _ARRAY, _MAP = (0, 0), (1, 0), (1, 0), (0, 1), (0, 2)
_LAYOUT = (
    *((0, 0, *_SCALAR) for _ in range(4)),  # nil, reserved, false, true
    *((n, 0, *_BINARY) for n in (1, 2, 4)),
    *((n, 1, *_EXTENSION) for n in (1, 2, 4)),
    *((0, n, *_SCALAR) for n in (4, 8)),  # floats
    *((0, n, *_SCALAR) for n in (1, 2, 4, 8) * 2),  # unsigned and signed integers
    *((0, n, *_SCALAR) for n in (2, 3, 5, 9, 17)),  # extensions of fixed length
    *((n, 0, *_BINARY) for n in (1, 2, 4)),  # strings
    *((n, 0, *_ARRAY) for n in (2, 4)),
    *((n, 0, *_MAP) for n in (2, 4)),
)
_NOT_PLAIN = frozenset((0xC1, 0xC7, 0xC8, 0xC9, 0xCA, 0xCB, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xDE, 0xDF))

# Bytes of a plain scalar, where its tag says how many: integers, nil, booleans and short strings. 0 for all others.
_STEPS = tuple(
    1 if tag < 0x80 or tag >= 0xE0 or tag in (0xC0, 0xC2, 0xC3)
    else 1 + (tag & 31) if 0xA0 <= tag < 0xC0
    else 1 + _LAYOUT[tag - 0xC0][1] if 0xCC <= tag <= 0xD3
    else 0
    for tag in range(256)
)  # fmt: skip


def encode(value: object, *, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Return the canonical encoding. Raises CodecError for a value that has none, or one over `max_bytes`."""
    try:
        data: bytes = msgpack.packb(_canonical(value, MAX_DEPTH), use_bin_type=True)
    except UnicodeEncodeError as error:
        raise CodecError(f"a string that is not Unicode text: {error.reason}") from error
    if len(data) > max_bytes:
        raise CodecError(f"a record of {len(data)} bytes is over the limit of {max_bytes}")
    return data


def decode(data: bytes, *, max_bytes: int = MAX_RECORD_BYTES, max_values: int | None = None) -> Any:
    """Return the value of a canonical encoding; its containers are lists and dicts.

    Raises CodecError for anything else. Memory stays proportional to `len(data)`, whatever lengths the
    data declares: the structure is walked without building anything before a container is allocated.
    `max_values` bounds the scalars and containers: a million small values take far more memory than bytes.
    """
    if len(data) > max_bytes:
        raise CodecError(f"a record of {len(data)} bytes is over the limit of {max_bytes}")
    is_plain = max_values is not None and _scan(data, max_values)
    try:
        if is_plain:  # what takes the long way below is known already
            value = msgpack.unpackb(data, raw=False, max_ext_len=0)
            if msgpack.packb(value, use_bin_type=True) != data:
                raise CodecError("not in canonical form")
            return value
        walk = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
        walk.feed(data)
        walk.skip()
        if walk.tell() != len(data):
            raise CodecError(f"{len(data) - walk.tell()} bytes after the record")
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (msgpack.UnpackException, ValueError) as error:
        raise CodecError(f"not MessagePack: {error or type(error).__name__}") from error
    if encode(value, max_bytes=max_bytes) != data:
        raise CodecError("not in canonical form")
    return value


def digest(value: object) -> str:
    """Return the first 128 bits of SHA-256 of the canonical encoding, as 32 hex digits."""
    return hashlib.sha256(encode(value, max_bytes=MAX_FILE_RECORD_BYTES)).hexdigest()[:DIGEST_HEX_DIGITS]


def pack_task_ref(ref: TaskRef) -> list[Any]:
    """Return a reference as a value for `encode`: `[source, digest, seed, index]`."""
    return [ref.source, ref.digest, ref.seed, ref.index]


def unpack_task_ref(value: object) -> TaskRef:
    """Return the reference in a decoded value. Raises CodecError where a field breaks what TaskRef promises."""
    if not isinstance(value, list) or len(value) != 4:
        raise CodecError("a task reference has four fields")
    source, source_digest, seed, index = value
    if not isinstance(source, str) or not 0 < len(source.encode()) <= MAX_SOURCE_BYTES:
        raise CodecError(f"a task source's name has 1 to {MAX_SOURCE_BYTES} bytes")
    if not isinstance(source_digest, str) or not re.fullmatch(f"[0-9a-f]{{{DIGEST_HEX_DIGITS}}}", source_digest):
        raise CodecError(f"a task source's digest has {DIGEST_HEX_DIGITS} hex digits")
    for name, number in (("seed", seed), ("index", index)):
        if type(number) is not int or not 0 <= number <= MAX_UINT64:
            raise CodecError(f"a task's {name} is an unsigned integer of 64 bits")
    return TaskRef(source, source_digest, seed, index)


def _scan(data: bytes, max_values: int) -> bool:
    """Raise CodecError where `data` begins with more than `max_values` values, after looking at no more than those.

    Returns whether `data` is exactly one value made of nil, booleans, integers, strings, binaries and at most
    `MAX_DEPTH` arrays: such a value is canonical if it is what its own encoding says, without a closer look. Bytes
    that are no MessagePack are not this function's to refuse: it reads as far as they make sense.
    """
    position, num_due, num_arrays, is_plain, size = 0, 1, 0, True, len(data)  # num_due: promised by arrays so far
    for _ in range(max_values):
        if num_due == 0 or position >= size:
            break
        tag = data[position]
        step = _STEPS[tag]
        if step:
            position += step
            num_due -= 1
        elif tag < 0xA0:  # a map or an array whose length is in the tag
            is_map = tag < 0x90
            position += 1
            num_due += (tag & 15) * (2 if is_map else 1) - 1
            num_arrays += 1
            is_plain = is_plain and not is_map
        else:
            num_length_bytes, num_fixed_bytes, bytes_per_unit, values_per_unit = _LAYOUT[tag - 0xC0]
            length = int.from_bytes(data[position + 1 : position + 1 + num_length_bytes], "big")
            position += 1 + num_length_bytes + num_fixed_bytes + length * bytes_per_unit
            num_due += length * values_per_unit - 1
            num_arrays += values_per_unit == 1
            is_plain = is_plain and tag not in _NOT_PLAIN
    else:
        if num_due and position < size:
            raise CodecError(f"a record of more than {max_values} values")
    return is_plain and num_due == 0 and position == size and num_arrays <= MAX_DEPTH


def _canonical(value: object, depth: int) -> object:
    """Return `value` with its keys in order, or raise CodecError; `depth` containers may still be opened."""
    kind = type(value)
    if kind is bytes or kind is str or kind is bool or value is None:
        return value
    if isinstance(value, int):
        if not _MIN_SIGNED <= value <= MAX_UINT64:
            raise CodecError(f"{value} does not fit 64 bits")
        return int(value)
    if isinstance(value, _TEXTS):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CodecError(f"{value} is not a finite number")
        return float(value)
    if depth == 0:
        raise CodecError(f"more than {MAX_DEPTH} containers within one another")
    if isinstance(value, _ARRAYS):
        return [_canonical(item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CodecError(f"the key {key!r} is not a string")
        return {key: _canonical(value[key], depth - 1) for key in sorted(value, key=str.encode)}
    raise CodecError(f"a value of type {type(value).__name__} has no encoding")
