"""Records as bytes: golden encodings, one form each, limits on both sides, newer and other versions."""

import random
import string

import msgpack
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.codec import encode
from protocol.compression import DICTIONARY_ID
from protocol.messages import PROTOCOL_VERSION, SharedCompletion, SharedGroup, TaskRef
from protocol.refusals import Reason, Refusal
from protocol.versions import check_version, peek_version, upgrade_advice
from protocol.wire import (
    decode_announcement,
    decode_frame,
    decode_group,
    decode_node_record,
    encode_frame,
    encode_group,
)

REF = TaskRef("reasoning_gym/gcd", "ffeeddccbbaa99887766554433221100", 2**64 - 1, 0)
GROUP = SharedGroup(REF, (SharedCompletion("<answer>12</answer>", True), SharedCompletion("", True)))
GROUP_HEX = (
    "94010194b1726561736f6e696e675f67796d2f676364c410ffeeddccbbaa99887766554433221100cfffffffffffffffff009292b33c616e"
    "737765723e31323c2f616e737765723ec392a0c3"
)
FRAME_HEX = (
    "28b52ffd2201804cd501008402940101676364c410ffeeddccbbaa99887766554433221100cfff009292b33c3e31323c2fc392a0c305fc0e"
    "b10fddf24904b85a0bd815ee02"
)

UINT64 = st.integers(0, 2**64 - 1)
REFS = st.builds(
    TaskRef,
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=30),
    st.binary(min_size=16, max_size=16).map(bytes.hex),
    UINT64,
    UINT64,
)
GROUPS = st.builds(
    SharedGroup,
    REFS,
    st.lists(st.builds(SharedCompletion, st.text(max_size=200), st.booleans()), min_size=1, max_size=8).map(tuple),
)


def refused(decode, data):
    with pytest.raises(Refusal) as caught:
        decode(data)
    return caught.value.reason


def group_value(**changes):
    ref = ["s", bytes(16), 0, 0]
    return {"version": [1, 1], "ref": ref, "completions": [["a", True]], "more": []} | changes


def packed(**changes):
    value = group_value(**changes)
    return encode([*value["version"], value["ref"], value["completions"], *value["more"]])


def test_golden_group():
    assert encode_group(GROUP).hex() == GROUP_HEX
    assert decode_group(bytes.fromhex(GROUP_HEX)) == GROUP


def test_golden_frame():
    assert decode_frame(bytes.fromhex(FRAME_HEX)) == GROUP
    header = zstandard.get_frame_parameters(encode_frame(GROUP))
    assert (header.dict_id, header.content_size) == (DICTIONARY_ID, len(GROUP_HEX) // 2)
    assert not header.has_checksum


@given(GROUPS)
def test_a_group_comes_back_from_its_frame(group):
    assert decode_frame(encode_frame(group)) == group


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_or_are_the_one_encoding_of_a_group(data):
    try:
        group = decode_group(data)
    except Refusal:
        return
    assert encode_group(group) == data


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ref": ["", bytes(16), 0, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["\x1b[2J", bytes(16), 0, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(15), 0, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", "0" * 32, 0, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(16), -1, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(16), True, 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(16), 0, 1.0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(16), 0]}, Reason.BAD_SCHEMA),
        ({"ref": ["s", bytes(16), 0, 0, 0]}, Reason.BAD_SCHEMA),
        ({"ref": {"source": "s"}}, Reason.BAD_SCHEMA),
        ({"ref": ["s" * 129, bytes(16), 0, 0]}, Reason.OVERSIZE),
        ({"completions": []}, Reason.BAD_SCHEMA),
        ({"completions": [["a", 1]]}, Reason.BAD_SCHEMA),
        ({"completions": [[b"a", True]]}, Reason.BAD_SCHEMA),
        ({"completions": [["a", True, 1.0]]}, Reason.BAD_SCHEMA),
        ({"completions": ["a"]}, Reason.BAD_SCHEMA),
        ({"completions": [["a", True]] * 65}, Reason.OVERSIZE),
        ({"completions": [["a" * (32 * 2**10 + 1), True]]}, Reason.OVERSIZE),
        ({"more": [1.0]}, Reason.BAD_SCHEMA),  # a reward has no place
        ({"version": [2, 0]}, Reason.OTHER_MAJOR),
        ({"version": [0, 9]}, Reason.OTHER_MAJOR),
        ({"version": ["1", 0]}, Reason.BAD_SCHEMA),
        ({"version": [1, -1]}, Reason.BAD_SCHEMA),
        ({"version": [1, 70_000]}, Reason.BAD_SCHEMA),
    ],
)
def test_a_group_with_other_fields_is_refused(changes, reason):
    assert decode_group(packed()) == SharedGroup(TaskRef("s", "0" * 32, 0, 0), (SharedCompletion("a", True),))
    assert refused(decode_group, packed(**changes)) is reason


def test_the_largest_group_passes_and_one_byte_more_does_not():
    full = [SharedCompletion("a" * 32 * 2**10, True)] * 31
    room = limits.MAX_GROUP_BYTES - len(encode_group(SharedGroup(REF, tuple(full)))) - 5
    largest = SharedGroup(REF, (*full, SharedCompletion("a" * room, True)))
    assert len(encode_group(largest)) == limits.MAX_GROUP_BYTES
    assert decode_frame(encode_frame(largest)) == largest
    with pytest.raises(Refusal, match="oversize: group: 1048577 bytes are over the limit"):
        encode_frame(SharedGroup(REF, (*full, SharedCompletion("a" * (room + 1), True))))


def test_a_frame_over_its_limit_is_refused_on_both_sides():
    rng = random.Random(1)
    noise = ["".join(rng.choices(string.ascii_letters, k=32 * 2**10)) for _ in range(12)]
    group = SharedGroup(REF, tuple(SharedCompletion(text, True) for text in noise))
    assert decode_group(encode_group(group)) == group
    with pytest.raises(Refusal, match="oversize: frame"):
        encode_frame(group)
    frame = zstandard.compress(encode_group(group))
    assert len(frame) > limits.MAX_FRAME_BYTES
    assert refused(decode_frame, frame) is Reason.OVERSIZE


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (zstandard.compress(b"x" * 100)[:-1], Reason.BAD_COMPRESSION),
        (zstandard.compress(packed()) + b"\x00", Reason.BAD_COMPRESSION),
        (zstandard.compress(packed()) * 2, Reason.BAD_COMPRESSION),
        (zstandard.ZstdCompressor(write_content_size=False).compress(packed()), Reason.BAD_COMPRESSION),
        (zstandard.compress(bytes(2**20 + 1)), Reason.OVERSIZE),
        (b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x01\x00\x00", Reason.OVERSIZE),
        (b"\x28\xb5\x2f\xfd\x23\x39\x05\x00\x00\x40" + bytes(9), Reason.UNKNOWN_MINOR),  # another dictionary
        (b"\x50\x2a\x4d\x18\x00\x00\x00\x00", Reason.BAD_SCHEMA),  # a skippable frame holds nothing
        (zstandard.compress(packed()), None),  # without the dictionary
    ],
)
def test_only_one_whole_frame_of_known_size_is_decompressed(frame, reason):
    if reason is None:
        assert decode_frame(frame) == decode_group(packed())
    else:
        assert refused(decode_frame, frame) is reason


def test_a_group_of_the_first_minor_version_is_read():
    assert decode_group(packed(version=[1, 0])) == decode_group(packed())
    assert refused(decode_group, packed(version=[1, 0], more=[1])) is Reason.BAD_SCHEMA


def test_a_newer_minor_version_may_add_fields_at_the_end():
    newer = packed(version=[1, 7], more=["new", {"a": [1, 2]}])
    assert decode_group(newer) == decode_group(packed())
    assert refused(decode_group, packed(version=[1, 7], more=[[0] * 2000])) is Reason.BAD_SCHEMA  # too many values
    assert refused(decode_group, packed(version=[1, 7], ref=["s", bytes(16), 0, 0, 0])) is Reason.BAD_SCHEMA


def test_another_major_version_is_known_for_one_whatever_follows():
    for rest in (b"", b"\xc1\xc1", bytes(1000)):
        assert refused(decode_group, b"\x94\x02\x00" + rest) is Reason.OTHER_MAJOR
        assert refused(decode_announcement, bytes(64) + b"\x97\xcd\x01\x00\x00" + rest[:900]) is Reason.OTHER_MAJOR
    assert refused(decode_node_record, bytes(64) + b"\x9b\x02") is Reason.BAD_SCHEMA


def test_who_should_upgrade_is_said_alike_on_both_sides():
    said = "protocols 1.0 and 2.3 do not mix: upgrade the node that speaks 1.0"
    assert upgrade_advice((2, 3), (1, 0)) == upgrade_advice((1, 0), (2, 3)) == said
    with pytest.raises(Refusal, match=said):
        check_version((2, 3), (1, 0))
    check_version((PROTOCOL_VERSION[0], 99))


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1), st.integers(0, 40))
def test_the_version_of_any_record_can_be_peeked_at(major, minor, num_fields):
    data = msgpack.packb([major, minor, *[None] * num_fields])
    assert peek_version(data) == (major, minor)
    for size in range(len(data)):
        assert peek_version(data[:size]) in (None, (major, minor))
