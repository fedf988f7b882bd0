"""The canonical encoding: golden bytes, one encoding per value, and refusal of everything else."""

import hashlib
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import decode, digest, encode, pack_task_ref, unpack_task_ref
from protocol.errors import CodecError
from protocol.limits import MAX_DEPTH
from protocol.messages import TaskRef

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.binary()
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
REF = TaskRef("reasoning_gym/products", "00112233445566778899aabbccddeeff", 2**64 - 1, 7)


def shuffled(value, random):
    """The same value with the keys of its mappings in another order, and tuples for lists."""
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    return tuple(shuffled(item, random) for item in value) if isinstance(value, list) else value


def count(value):
    """Scalars and containers in a value, the keys of mappings among them."""
    if isinstance(value, dict):
        return 1 + len(value) + sum(map(count, value.values()))
    return 1 + sum(map(count, value)) if isinstance(value, list | tuple) else 1


@pytest.mark.parametrize(
    ("value", "golden"),
    [
        (None, "c0"),
        (False, "c2"),
        (127, "7f"),
        (128, "cc80"),
        (-1, "ff"),
        (2**64 - 1, "cfffffffffffffffff"),
        (-(2**63), "d38000000000000000"),
        (1.5, "cb3ff8000000000000"),
        ("é", "a2c3a9"),
        (b"\x00\xff", "c40200ff"),
        ((1, [2]), "92019102"),
        ({"b": 1, "a": {"z": 0, "": None}}, "82a16182a0c0a17a00a16201"),
        ({"é": 1, "z": 2, "zz": 3}, "83a17a02a27a7a03a2c3a901"),
    ],
)
def test_golden_bytes(value, golden):
    assert encode(value).hex() == golden


def test_a_digest_is_the_start_of_sha256_of_the_encoding():
    expected = hashlib.sha256(bytes.fromhex("82a16101a16202")).hexdigest()[:32]
    assert digest({"b": 2, "a": 1}) == expected == "19f2a1aa9670884ef43ef46ffbe4a62a"


@given(VALUES)
def test_what_is_encoded_comes_back(value):
    assert decode(encode(value)) == value


@given(VALUES, st.randoms(use_true_random=False))
def test_equal_values_have_equal_bytes(value, random):
    assert encode(shuffled(value, random)) == encode(value)


@given(st.binary(max_size=64))
def test_bytes_are_refused_or_are_the_only_encoding_of_their_value(data):
    try:
        value = decode(data)
    except CodecError:
        return
    assert encode(value) == data


@given(VALUES, st.data())
def test_a_truncated_record_is_refused(value, data):
    encoded = encode(value)
    with pytest.raises(CodecError):
        decode(encoded[: data.draw(st.integers(0, len(encoded) - 1))])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xcc\x01", id="integer longer than needed"),
        pytest.param(b"\xca\x3f\xc0\x00\x00", id="float of 32 bits"),
        pytest.param(b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00", id="not a number"),
        pytest.param(b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", id="infinity"),
        pytest.param(b"\xd9\x01a", id="string longer than needed"),
        pytest.param(b"\xa1\xff", id="not UTF-8"),
        pytest.param(b"\x82\xa1b\x01\xa1a\x02", id="keys out of order"),
        pytest.param(b"\x82\xa1a\x01\xa1a\x02", id="key twice"),
        pytest.param(b"\x81\x01\x02", id="key not a string"),
        pytest.param(b"\xd4\x05\x00", id="extension type"),
        pytest.param(b"\xd6\xff\x00\x00\x00\x00", id="timestamp"),
        pytest.param(b"\xc1", id="reserved byte"),
        pytest.param(b"\x01\x02", id="two records"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x91" * (MAX_DEPTH + 1) + b"\x01", id="one container too deep"),
        pytest.param(b"\x91" * 100_000 + b"\x01", id="far too deep"),
    ],
)
def test_every_other_encoding_is_refused(data):
    with pytest.raises(CodecError):
        decode(data)


def test_the_deepest_record_that_is_allowed_passes():
    data = b"\x91" * MAX_DEPTH + b"\x01"
    assert encode(decode(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param((b"\xdd\x00\x0f\x00\x00" * 900).ljust(2**20, b"\x00"), id="nested arrays of a million items each"),
        pytest.param(b"\xdf\x7f\xff\xff\xff\xa1a", id="a map that claims two billion keys"),
        pytest.param(b"\xc6\x7f\xff\xff\xff", id="two gigabytes of bytes that never come"),
    ],
)
def test_a_declared_length_costs_no_memory(data):
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 32 * 2**20


@given(VALUES)
def test_values_are_counted_as_they_stand(value):
    data, num_values = encode(value), count(value)
    assert decode(data, max_values=num_values) == value
    with pytest.raises(CodecError, match="more than"):
        decode(data, max_values=num_values - 1)


@given(VALUES | st.lists(st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary() | st.booleans()), st.data())
def test_counting_values_changes_nothing_that_is_decoded(value, data):
    changed = bytearray(encode(value))
    position = data.draw(st.integers(0, len(changed) - 1))
    changed[position] = data.draw(st.integers(0, 255))
    for encoded in (encode(value), bytes(changed), bytes(changed[:position])):
        try:
            expected = decode(encoded)
        except CodecError:
            with pytest.raises(CodecError):
                decode(encoded, max_values=1000)
        else:
            assert repr(decode(encoded, max_values=1000)) == repr(expected)


@pytest.mark.parametrize("max_values", [None, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"\x91\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
        b"\x91\xc7\x00\x05",
        b"\x91\xd6\xff\x00\x00\x00\x00",
        b"\x91\xcc\x01",
        b"\x91\xd9\x01a",
        b"\x91\xa1\xff",
        b"\x91\xdc\x00\x01\x01",
        b"\x91\x82\xa1b\x01\xa1a\x02",
        b"\x91" * (MAX_DEPTH + 1) + b"\x01",
        b"\x91\x01\x01",
        b"\x92\x01",
        b"\x91\xc4\x05abc",
    ],
)
def test_what_is_not_canonical_is_refused_counted_or_not(data, max_values):
    with pytest.raises(CodecError):
        decode(data, max_values=max_values)


def test_a_million_small_values_cost_no_memory():
    data = b"\xdd\x00\x10\x00\x00" + b"\x90" * 2**20
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="more than 100 values"):
            decode(data, max_values=100)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2**16


def test_size_limits_hold_both_ways():
    data = encode(b"x" * 98)
    assert len(data) == 100
    assert decode(data, max_bytes=100) == b"x" * 98
    with pytest.raises(CodecError, match="100 bytes is over the limit of 99"):
        decode(data, max_bytes=99)
    with pytest.raises(CodecError, match="100 bytes is over the limit of 99"):
        encode(b"x" * 98, max_bytes=99)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**64, -(2**63) - 1, {1: 2}, {"a": {3}}, object(), "\ud800", {"\ud800": 1}]
)
def test_values_without_an_encoding_are_refused(value):
    with pytest.raises(CodecError):
        encode(value)


def test_a_task_reference_crosses_unchanged():
    data = encode(pack_task_ref(REF))
    golden = "94b6" + b"reasoning_gym/products".hex() + "d920" + REF.digest.encode().hex() + "cf" + "ff" * 8 + "07"
    assert data.hex() == golden
    assert unpack_task_ref(decode(data)) == REF


@pytest.mark.parametrize(
    "fields",
    [
        ["s", REF.digest, 0],
        ["", REF.digest, 0, 0],
        ["é" * 65, REF.digest, 0, 0],
        ["s", REF.digest.upper(), 0, 0],
        ["s", REF.digest[:-1], 0, 0],
        ["s", REF.digest + "\n", 0, 0],
        ["s", REF.digest, -1, 0],
        ["s", REF.digest, 0, 2**64],
        ["s", REF.digest, True, 0],
        ["s", REF.digest, 1.0, 0],
        {"source": "s"},
        None,
    ],
)
def test_a_malformed_task_reference_is_refused(fields):
    with pytest.raises(CodecError):
        unpack_task_ref(fields)
