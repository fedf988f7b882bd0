"""What nodes ask one another: golden bytes, round trips, caps, filters."""

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from protocol import limits, requests
from protocol.bloom import bloom_bits, in_bloom, repair_request
from protocol.codec import decode, encode
from protocol.digests import leaf_of
from protocol.identity import Identity
from protocol.refusals import Reason, Refusal
from protocol.requests import (
    AnnounceRequest,
    AnnounceResponse,
    Hello,
    Offer,
    PeersRequest,
    PeersResponse,
    PullRequest,
    PullResponse,
    RepairRequest,
    RepairResponse,
    check_pull,
    fitting_offers,
    max_pull_response_bytes,
)
from protocol.signing import sign_announcement, sign_node_record

ME = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
ROOT = bytes(range(32))
RECORD = sign_node_record(
    ME,
    "main",
    transport="memory",
    addresses=[],
    created_at_ms=1,
    role="bootstrap",
    software="s",
    model="m",
    tasks=[],
    rollouts_per_minute=0,
)
OFFERS = st.lists(st.builds(Offer, st.binary(max_size=200), st.integers(0, 2**64 - 1)), max_size=20).map(tuple)
MESSAGES = {
    "hello": st.builds(
        Hello, st.sampled_from(["a", "main", "é" * 32]), st.integers(0, 2**64 - 1), st.booleans(), st.just(RECORD)
    ),
    "announce_request": st.builds(AnnounceRequest, OFFERS),
    "announce_response": st.builds(AnnounceResponse, st.integers(0, 255)),
    "pull_request": st.builds(
        PullRequest, st.binary(min_size=32, max_size=32), st.sets(st.integers(0, 63)).map(sorted).map(tuple)
    ),
    "pull_response": st.integers(1, 64).flatmap(
        lambda n: st.builds(
            PullResponse,
            st.lists(st.binary(min_size=16, max_size=16), min_size=n, max_size=n).map(tuple),
            st.dictionaries(st.integers(0, n - 1), st.binary(max_size=50)).map(lambda d: dict(sorted(d.items()))),
        )
    ),
    "repair_request": st.builds(
        RepairRequest, st.binary(min_size=8, max_size=8), st.integers(1, 16), st.binary(), st.integers(1, 256)
    ),
    "repair_response": st.builds(RepairResponse, OFFERS),
    "peers_request": st.builds(PeersRequest, st.integers(1, 64)),
    "peers_response": st.builds(PeersResponse, st.lists(st.binary(max_size=1024), max_size=8).map(tuple)),
}


def encode_(name, message):
    return getattr(requests, f"encode_{name}")(message)


def decode_(name, data):
    return getattr(requests, f"decode_{name}")(data)


def reason_of(function, *arguments):
    with pytest.raises(Refusal) as caught:
        function(*arguments)
    return caught.value.reason


@pytest.mark.parametrize(
    ("name", "message", "golden"),
    [
        ("hello", Hello("main", 7, True, RECORD), "960101a46d61696e07c3c4" + f"{len(RECORD.encoded):02x}"),
        ("announce_request", AnnounceRequest(()), "93010190"),
        ("announce_request", AnnounceRequest((Offer(b"ab", 5),)), "9301019192c402616205"),
        ("announce_response", AnnounceResponse(30), "9301011e"),
        ("pull_request", PullRequest(ROOT, (0, 2)), "940101c420" + ROOT.hex() + "05"),
        (
            "pull_response",
            PullResponse((bytes(16), b"\x01" * 16), {1: b"ab"}),
            "940101c420" + "00" * 16 + "01" * 16 + "919201c4026162",
        ),
        ("repair_request", RepairRequest(b"saltsalt", 9, b"\xff", 8), "960101c40873616c7473616c7409c401ff08"),
        ("repair_response", RepairResponse((Offer(b"ab", 5),)), "9301019192c402616205"),
        ("peers_request", PeersRequest(16), "93010110"),
        ("peers_response", PeersResponse((b"ab", b"")), "93010192c4026162c400"),
    ],
)
def test_golden_bytes(name, message, golden):
    expected = bytes.fromhex(golden) + (RECORD.encoded if name == "hello" else b"")
    assert encode_(name, message) == expected
    assert decode_(name, expected) == message


@given(st.sampled_from(sorted(MESSAGES)).flatmap(lambda name: st.tuples(st.just(name), MESSAGES[name])))
def test_every_message_comes_back(pair):
    name, message = pair
    assert decode_(name, encode_(name, message)) == message


@given(st.sampled_from(sorted(MESSAGES)).flatmap(lambda name: st.tuples(st.just(name), MESSAGES[name])), st.data())
def test_a_message_cut_short_or_with_more_behind_it_is_refused(pair, data):
    name, message = pair
    whole = encode_(name, message)
    assert reason_of(decode_, name, whole[: data.draw(st.integers(0, len(whole) - 1))]) is Reason.BAD_SCHEMA
    assert reason_of(decode_, name, whole + b"\x00") in (Reason.BAD_SCHEMA, Reason.OVERSIZE)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("hello", ["main", 7, 1, RECORD.encoded], Reason.BAD_SCHEMA),
        ("hello", ["", 7, True, RECORD.encoded], Reason.BAD_SCHEMA),
        ("hello", ["x" * 65, 7, True, RECORD.encoded], Reason.OVERSIZE),
        ("hello", ["main", 7, True, RECORD.encoded[:-1]], Reason.BAD_SCHEMA),
        ("hello", ["main", 7, True, bytes(2000)], Reason.OVERSIZE),
        ("announce_request", [[[b"a", 2**64 - 1]] * 257], Reason.OVERSIZE),
        ("announce_request", [[[b"a", -1]]], Reason.BAD_SCHEMA),
        ("announce_request", [[[b"a"]]], Reason.BAD_SCHEMA),
        ("announce_request", [[[bytes(1025), 1]]], Reason.OVERSIZE),
        ("announce_request", [[[bytes(1000), 1]] * 100], Reason.OVERSIZE),
        ("announce_response", [256], Reason.BAD_SCHEMA),
        ("pull_request", [ROOT[1:], 1], Reason.BAD_SCHEMA),
        ("pull_request", [ROOT, [1, 2]], Reason.BAD_SCHEMA),
        ("pull_response", [b"", []], Reason.BAD_SCHEMA),
        ("pull_response", [bytes(17), []], Reason.BAD_SCHEMA),
        ("pull_response", [bytes(16 * 65), []], Reason.OVERSIZE),
        ("pull_response", [bytes(16), [[1, b"a"]]], Reason.BAD_SCHEMA),  # no such frame
        ("pull_response", [bytes(32), [[1, b"a"], [0, b"a"]]], Reason.BAD_SCHEMA),
        ("pull_response", [bytes(32), [[1, b"a"], [1, b"a"]]], Reason.BAD_SCHEMA),
        ("pull_response", [bytes(16), [[0, bytes(limits.MAX_FRAME_BYTES + 1)]]], Reason.OVERSIZE),
        ("repair_request", [bytes(7), 1, b"", 1], Reason.BAD_SCHEMA),
        ("repair_request", [bytes(8), 0, b"", 1], Reason.BAD_SCHEMA),
        ("repair_request", [bytes(8), 17, b"", 1], Reason.BAD_SCHEMA),
        ("repair_request", [bytes(8), 1, b"", 0], Reason.BAD_SCHEMA),
        ("repair_request", [bytes(8), 1, bytes(2**14 + 1), 1], Reason.OVERSIZE),
        ("peers_request", [0], Reason.BAD_SCHEMA),
        ("peers_request", [65], Reason.BAD_SCHEMA),
        ("peers_response", [[b"a"] * 65], Reason.OVERSIZE),
        ("peers_response", [[bytes(1025)]], Reason.OVERSIZE),
    ],
)
def test_what_breaks_a_rule_is_refused(name, fields, reason):
    assert reason_of(decode_, name, encode([1, 1, *fields])) is reason


@pytest.mark.parametrize("name", sorted(MESSAGES))
@given(data=st.data())
def test_a_newer_minor_version_is_read_and_another_major_refused(name, data):
    message = data.draw(MESSAGES[name])
    fields = decode(encode_(name, message))
    read = decode_(name, encode([1, 3, *fields[2:], "new"]))
    for field in dataclasses.fields(message):
        if field.name != "version":
            assert getattr(read, field.name) == getattr(message, field.name)
    assert reason_of(decode_, name, encode([2, 0, *fields[2:]])) is Reason.OTHER_MAJOR


def test_the_cap_of_a_pull_is_what_an_honest_response_takes():
    for sizes in ([1], [100, 200, 300], [255, 256, 65_535, 65_536], [65_000] * 64):
        frames = [bytes(size) for size in sizes]
        announcement = sign_announcement(ME, "main", sequence=1, created_at_ms=1, frames=frames)
        leaves = tuple(leaf_of(frame) for frame in frames)
        for asked in ([0], list(range(len(frames)))):
            response = PullResponse(leaves, {number: frames[number] for number in asked})
            data = requests.encode_pull_response(response)
            assert len(data) <= max_pull_response_bytes(announcement, asked) <= len(data) + 4 * len(asked)
            assert check_pull(announcement, asked, requests.decode_pull_response(data)) == response.frames


def test_the_largest_batch_fits_in_one_response():
    frames = {number: bytes(65_472) for number in range(64)}
    assert sum(map(len, frames.values())) == limits.MAX_BATCH_BYTES
    data = requests.encode_pull_response(PullResponse((bytes(16),) * 64, frames))
    assert len(data) <= limits.MAX_PULL_RESPONSE_BYTES


@pytest.mark.parametrize("size", [0, 100, 160, 400, 1024])
def test_as_many_offers_are_taken_as_fit(size):
    offers = [Offer(bytes(size), 2**64 - 1)] * 1000
    kept = fitting_offers(offers)
    assert 0 < len(kept) <= limits.MAX_OFFERS
    requests.encode_announce_request(AnnounceRequest(kept))
    requests.encode_repair_response(RepairResponse(kept))
    if len(kept) < limits.MAX_OFFERS:
        with pytest.raises(Refusal):
            requests.encode_announce_request(AnnounceRequest((*kept, offers[0])))


@given(st.sets(st.binary(min_size=32, max_size=32), max_size=50), st.binary(min_size=8, max_size=8))
def test_a_filter_holds_what_was_put_in(roots, salt):
    request = repair_request(salt, roots, 8)
    assert requests.decode_repair_request(requests.encode_repair_request(request)) == request
    assert all(in_bloom(request, root) for root in roots)


def test_a_filter_errs_seldom_and_elsewhere_with_another_salt():
    roots = [n.to_bytes(32) for n in range(1000)]
    strangers = [n.to_bytes(32) for n in range(1000, 21_000)]
    filters = [repair_request(salt, roots, 8) for salt in (b"saltsalt", bytes(8))]
    errors = [{stranger for stranger in strangers if in_bloom(each, stranger)} for each in filters]
    assert all(10 <= len(found) <= 100 for found in errors)  # 1 in 500
    assert len(errors[0] & errors[1]) <= 5
    assert not in_bloom(repair_request(b"saltsalt", [], 8), roots[0])


def test_a_filter_stays_under_its_cap():
    request = repair_request(bytes(8), [n.to_bytes(32) for n in range(11_000)], 8)
    assert len(request.bits) == limits.MAX_BLOOM_BYTES
    requests.encode_repair_request(request)
    with pytest.raises(ValueError, match="no filter"):
        bloom_bits(bytes(8), [], 12, 9)
