"""Signed records: golden bytes, what a signature covers, newer versions relayed intact, what is cut to fit."""

import dataclasses
import random

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits
from protocol.codec import decode, encode
from protocol.digests import check_frames, leaf_of, root_of
from protocol.identity import Identity
from protocol.refusals import Reason, Refusal
from protocol.signing import sign_announcement, sign_node_record, verify_announcement, verify_node_record
from protocol.wire import announcement_body, decode_announcement, decode_node_record

ME = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = Identity(Ed25519PrivateKey.from_private_bytes(bytes(32)))
FRAMES = [b"frame zero", b"frame one", b"frame two"]
ANNOUNCEMENT_HEX = (
    "e041c5f97c29a41cdcac12a15d00e0d3726da09fdd13f9d6df7c1e46357a764ad1f979b6bfd8f2f38dc6353779af7876e97d8d911372d357"
    "72f2ae5cb9c5510a980101c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b803cf0000019b76daa80093"
    "0a0909c420c1f1169793114cdbacbf48b723991b37f85e3d2f2e0e4b6044f2eb25537d88ec9207cd012c"
)
ANNOUNCEMENT_1_0_HEX = (
    "f9adfcc3a01f53348860428c62197126835adaedbbd1a1d35ae3371ca7e4e06fe82bda7bfe67ee6f04b4de7474da21d549999fd1d8b55fb4"
    "a73d4e3c62bdba04970100c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b803cf0000019b76daa80093"
    "0a0909c420c1f1169793114cdbacbf48b723991b37f85e3d2f2e0e4b6044f2eb25537d88ec"
)
NODE_RECORD_HEX = (
    "461dbeabcedc2f8f1e7c52f97da7507d9d4194ba1fff0a836f6c0516235e35fb7b543845ef39cd7fe62929e0e74e2de0da385f8ce0bac490"
    "5df651b180bc530f9b0101c42003a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8a66d656d6f727991a92f6d"
    "656d6f72792f31cf0000019b76daa800a7747261696e6572b0737761726d2d6e6f64652f302e312e30a474696e7991b1726561736f6e696e"
    "675f67796d2f6763645a"
)


def announce(identity=ME, swarm_id="main", **changes):
    fields = {"sequence": 3, "created_at_ms": 1767225600000, "frames": FRAMES, "policy_versions": (300, 7, 7)} | changes
    return sign_announcement(identity, swarm_id, **fields)


def describe(identity=ME, swarm_id="main", **changes):
    fields = {
        "transport": "memory",
        "addresses": ["/memory/1"],
        "created_at_ms": 1767225600000,
        "role": "trainer",
        "software": "swarm-node/0.1.0",
        "model": "tiny",
        "tasks": ["reasoning_gym/gcd"],
        "rollouts_per_minute": 90,
    } | changes
    return sign_node_record(identity, swarm_id, **fields)


def resigned(encoded, tag, change):
    """A record whose fields were changed and that was signed anew, as a newer version or a liar would."""
    body = encode(change(decode(encoded[64:])))
    return ME.sign(tag, b"\x04main" + body) + body


def reason_of(function, *arguments):
    with pytest.raises(Refusal) as caught:
        function(*arguments)
    return caught.value.reason


def test_golden_announcement():
    assert announce().encoded.hex() == ANNOUNCEMENT_HEX
    read = decode_announcement(bytes.fromhex(ANNOUNCEMENT_HEX))
    assert read == announce()
    assert (read.version, read.author, read.sequence) == ((1, 1), ME.node_id, 3)
    assert (read.created_at_ms, read.frame_sizes, read.policy_versions) == (1767225600000, (10, 9, 9), (7, 300))
    assert read.root == root_of(ME.node_id, [leaf_of(frame) for frame in FRAMES])
    verify_announcement("main", read)


def test_an_announcement_of_the_first_minor_version_says_nothing_of_policies():
    read = decode_announcement(bytes.fromhex(ANNOUNCEMENT_1_0_HEX))
    assert (read.version, read.policy_versions, read.root) == ((1, 0), (), announce().root)
    verify_announcement("main", read)
    more = resigned(read.encoded, b"announcement", lambda f: [*f, [7]])
    assert reason_of(decode_announcement, more) is Reason.BAD_SCHEMA


def test_a_batch_of_very_many_policies_names_the_newest():
    assert announce(policy_versions=range(100)).policy_versions == tuple(range(68, 100))
    assert announce(policy_versions=()).policy_versions == ()


def test_golden_node_record():
    assert describe().encoded.hex() == NODE_RECORD_HEX
    read = decode_node_record(bytes.fromhex(NODE_RECORD_HEX))
    assert read == describe()
    assert (read.node_id, read.role, read.addresses) == (ME.node_id, "trainer", ("/memory/1",))
    assert (read.model, read.tasks, read.rollouts_per_minute) == ("tiny", ("reasoning_gym/gcd",), 90)
    verify_node_record("main", read)


@pytest.mark.parametrize(
    ("make", "decode_it", "verify_it"),
    [
        (announce, decode_announcement, verify_announcement),
        (describe, decode_node_record, verify_node_record),
    ],
)
def test_a_signature_covers_every_bit_and_the_swarm(make, decode_it, verify_it):
    record = make()
    verify_it("main", record)
    for other_swarm in ("mai", "main2", "MAIN", "é"):
        assert reason_of(verify_it, other_swarm, record) is Reason.BAD_SIGNATURE
    num_verified = 0
    for bit in range(8 * len(record.encoded)):
        forged = bytearray(record.encoded)
        forged[bit // 8] ^= 1 << bit % 8
        try:
            verify_it("main", decode_it(bytes(forged)))
            num_verified += 1
        except Refusal:
            continue
    assert num_verified == 0


def test_no_signature_serves_for_another_kind_of_record():
    body = announce().encoded[64:]
    signed = ME.sign(b"node record", b"\x04main" + body) + body
    assert reason_of(verify_announcement, "main", decode_announcement(signed)) is Reason.BAD_SIGNATURE


def test_text_cannot_move_between_swarm_id_and_body():
    body = announce().encoded[64:]
    signed = ME.sign(b"announcement", b"main" + body) + body  # without the length
    assert reason_of(verify_announcement, "main", decode_announcement(signed)) is Reason.BAD_SIGNATURE


def test_what_is_verified_are_the_bytes_and_not_the_fields():
    record = dataclasses.replace(announce(), encoded=announce(OTHER).encoded)
    assert reason_of(verify_announcement, "main", record) is Reason.BAD_SIGNATURE


@pytest.mark.parametrize("swarm_id", ["", "x" * 65, "é" * 33])
def test_a_swarm_id_has_1_to_64_bytes(swarm_id):
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        announce(swarm_id=swarm_id)


def test_records_of_a_newer_minor_version_are_read_verified_and_kept_as_they_came():
    newer = resigned(announce().encoded, b"announcement", lambda f: [1, 9, *f[2:], "new", [1, {"a": None}]])
    read = decode_announcement(newer)
    assert read.version == (1, 9)
    assert read.encoded == newer
    assert read.root == announce().root
    verify_announcement("main", read)
    newer = resigned(describe().encoded, b"node record", lambda f: [1, 9, *f[2:], "new"])
    verify_node_record("main", decode_node_record(newer))
    with_role = resigned(newer, b"node record", lambda f: [*f[:6], "judge", *f[7:]])
    assert reason_of(decode_node_record, with_role) is Reason.UNKNOWN_MINOR


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: [*f, "more"], Reason.BAD_SCHEMA),
        (lambda f: f[:-1], Reason.BAD_SCHEMA),
        (lambda f: [2, 0, *f[2:]], Reason.OTHER_MAJOR),
        (lambda f: [*f[:2], f[2][:-1], *f[3:]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:3], -1, *f[4:]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:5], [], *f[6:]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:5], [0], *f[6:]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:5], [1] * 65, *f[6:]], Reason.OVERSIZE),
        (lambda f: [*f[:5], [limits.MAX_FRAME_BYTES + 1], *f[6:]], Reason.OVERSIZE),
        (lambda f: [*f[:5], [2**40], *f[6:]], Reason.OVERSIZE),
        (lambda f: [*f[:5], [limits.MAX_FRAME_BYTES] * 16, *f[6:]], Reason.OVERSIZE),
        (lambda f: [*f[:6], bytes(31), f[7]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:7], 7], Reason.BAD_SCHEMA),
        (lambda f: [*f[:7], [7, 7]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:7], [8, 7]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:7], [-1]], Reason.BAD_SCHEMA),
        (lambda f: [*f[:7], list(range(33))], Reason.OVERSIZE),
        (lambda f: [1, 2, *f[2:], bytes(1024)], Reason.OVERSIZE),
    ],
)
def test_an_announcement_with_other_fields_is_refused(change, reason):
    assert reason_of(decode_announcement, resigned(announce().encoded, b"announcement", change)) is reason


@pytest.mark.parametrize(
    ("position", "value", "reason"),
    [
        (3, "", Reason.BAD_SCHEMA),
        (3, "x" * 65, Reason.OVERSIZE),
        (4, ["/memory/\x1b[31m"], Reason.BAD_SCHEMA),
        (4, ["/memory/1"] * 9, Reason.OVERSIZE),
        (4, ["/" + "m" * 256], Reason.OVERSIZE),
        (6, "judge", Reason.BAD_SCHEMA),
        (7, "line\nbreak", Reason.BAD_SCHEMA),
        (8, "\x9b31m", Reason.BAD_SCHEMA),
        (9, ["t"] * 33, Reason.OVERSIZE),
        (10, -1, Reason.BAD_SCHEMA),
        (10, 1.5, Reason.BAD_SCHEMA),
    ],
)
def test_a_node_record_with_other_fields_is_refused(position, value, reason):
    changed = resigned(describe().encoded, b"node record", lambda f: [*f[:position], value, *f[position + 1 :]])
    assert reason_of(decode_node_record, changed) is reason


def test_the_largest_announcement_fits():
    largest = announcement_body(
        author=ME.node_id,
        sequence=2**64 - 1,
        created_at_ms=2**64 - 1,
        frame_sizes=(65_472,) * 64,
        root=bytes(32),
        policy_versions=tuple(range(2**64 - limits.MAX_POLICY_VERSIONS, 2**64)),
    )
    assert 64 * 65_472 == limits.MAX_BATCH_BYTES
    record = decode_announcement(bytes(64) + largest)
    assert len(record.encoded) < 768 < limits.MAX_ANNOUNCEMENT_BYTES


def test_an_author_cannot_announce_what_nobody_takes():
    for frames in ([], [b""], [b"x"] * 65, [bytes(limits.MAX_FRAME_BYTES + 1)]):
        with pytest.raises(Refusal):
            announce(frames=frames)


def test_a_node_record_is_cut_to_fit_tasks_first():
    long = [f"/dns4/{'n' * 150}/{n}" for n in range(20)]
    record = describe(addresses=long, tasks=[f"reasoning_gym/{n:04}" for n in range(100)], model="é" * 100)
    assert len(record.encoded) <= limits.MAX_NODE_RECORD_BYTES
    assert record.tasks == ()
    assert record.addresses == tuple(long[: len(record.addresses)])
    assert 4 <= len(record.addresses) < 8
    assert record.model == "é" * 32
    verify_node_record("main", record)
    record = describe(tasks=[f"reasoning_gym/{n:04}" for n in range(100)])
    assert len(record.tasks) == limits.MAX_TASKS


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_only_the_announced_frames_pass(frames, rng: random.Random):
    announcement = announce(frames=frames)
    leaves = [leaf_of(frame) for frame in frames]
    asked = range(len(frames))
    check_frames(announcement, asked, leaves, dict(enumerate(frames)))
    number = rng.randrange(len(frames))
    changed = bytes([frames[number][0] ^ 1]) + frames[number][1:]
    wrong = [leaf_of(changed) if n == number else leaf for n, leaf in enumerate(leaves)]
    for bad_leaves, bad_frames, reason in (
        (leaves, {number: changed}, Reason.WRONG_DIGEST),
        (leaves, {number: frames[number] + b"x"}, Reason.WRONG_DIGEST),
        (wrong, {number: changed}, Reason.WRONG_DIGEST),
        (wrong, {}, Reason.WRONG_DIGEST),
        (leaves[:-1], {}, Reason.WRONG_DIGEST),
        ([*leaves, leaves[0]], {}, Reason.WRONG_DIGEST),
        (leaves, {len(frames): frames[0]}, Reason.UNASKED),
    ):
        assert reason_of(check_frames, announcement, asked, bad_leaves, bad_frames) is reason
    assert reason_of(check_frames, announcement, (), leaves, {number: frames[number]}) is Reason.UNASKED


def test_two_authors_of_the_same_frames_have_two_roots():
    assert announce(ME).root != announce(OTHER).root
