"""docs/protocol.md is enough to read a batch: nothing of `protocol` decodes, verifies or knows a constant here."""

import base64
import hashlib
import re
import struct
from pathlib import Path

import msgpack
import pytest
import zstandard
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAGE = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text(encoding="utf-8")


def stated(pattern):
    """What the page says where a sentence of it matches."""
    found = re.search(pattern.replace(" ", r"\s+"), PAGE)  # lines break anywhere
    assert found, f"the page does not say {pattern}"
    return found[1]


def example():
    """The bytes of the worked example by name."""
    found = {}
    for block in re.findall(r"```hex\n(.*?)```", PAGE, re.DOTALL):
        for name, digits in re.findall(r"^(\w+):\n((?:  [0-9a-f]+\n)+)", block, re.MULTILINE):
            found[name] = bytes.fromhex(re.sub(r"\s", "", digits))
    return found


def dictionary():
    packed = base64.b64decode(re.search(r"```base64\n(.*?)```", PAGE, re.DOTALL)[1])
    return zstandard.ZstdDecompressor().decompress(packed)


EXAMPLE = example()
SECRET = bytes.fromhex(stated(r"The secret key is ([0-9a-f]{64})"))
PUBLIC = Ed25519PrivateKey.from_private_bytes(SECRET).public_key().public_bytes_raw()
SWARM_ID = stated(r"The swarm id is `(\w+)`").encode()


def unpack(data):
    """A canonical record: the only encoding of its value."""
    value = msgpack.unpackb(data, raw=False)
    assert msgpack.packb(value, use_bin_type=True) == data
    return value


def open_signed(data, tag):
    """The fields of a signed record, once its signature is found good."""
    signature, body = data[:64], data[64:]
    fields = unpack(body)
    message = b"swarm-node/1" + bytes([len(tag)]) + tag + bytes([len(SWARM_ID)]) + SWARM_ID + body
    Ed25519PublicKey.from_public_bytes(fields[2]).verify(signature, message)
    return fields


def group_of(frame):
    header = zstandard.get_frame_parameters(frame)
    assert header.dict_id == int(stated(r"Its dictionary id is 0 \(none\) or (\d+)"))
    assert max(header.content_size, header.window_size) <= 2**20
    content = zstandard.ZstdDecompressor(zstandard.ZstdCompressionDict(dictionary())).decompress(frame)
    return content, unpack(content)


def test_the_dictionary_is_the_one_stated():
    assert hashlib.sha256(dictionary()).hexdigest() == stated(r"SHA-256 `([0-9a-f]{64})`")


def test_a_batch_is_decoded_and_verified():
    offers = unpack(EXAMPLE["announce_request"])[2]
    [(announcement, held)] = offers
    assert (announcement, held) == (EXAMPLE["announcement"], 3)
    major, minor, author, sequence, created_at_ms, sizes, root, authors = open_signed(announcement, b"announcement")
    assert (major, minor, author, sequence, created_at_ms) == (1, 1, PUBLIC, 3, 1767225600000)
    assert authors == [16, 17]

    *_, leaves, [(number, frame)] = unpack(EXAMPLE["pull_response"])
    assert hashlib.sha256(b"\x01" + author + leaves).digest() == root
    assert len(leaves) == 16 * len(sizes)
    assert number == 1
    assert len(frame) == sizes[number]
    assert hashlib.sha256(b"\x00" + frame).digest()[:16] == leaves[16 * number : 16 * number + 16]

    content, group = group_of(frame)
    assert content == EXAMPLE["group_1"]
    assert group == [
        1,
        1,
        ["reasoning_gym/gcd", bytes.fromhex("ffeeddccbbaa99887766554433221100"), 2**64 - 1, 0],
        [["<answer>12</answer>", True], ["", True]],
    ]


def test_every_frame_and_leaf_of_the_example_is_as_stated():
    for number in (0, 1):
        frame = EXAMPLE[f"frame_{number}"]
        assert hashlib.sha256(b"\x00" + frame).digest()[:16] == EXAMPLE[f"leaf_{number}"]
        assert group_of(frame)[0] == EXAMPLE[f"group_{number}"]
    assert unpack(EXAMPLE["group_0"])[2:] == [
        ["reasoning_gym/products", bytes.fromhex("00112233445566778899aabbccddeeff"), 7, 41],
        [["6 \u00d7 7 = 42", True], ["I think that it is 36", False]],
    ]


def test_the_node_record_is_verified():
    fields = open_signed(EXAMPLE["node_record"], b"node record")
    address = stated(r"`(/ip4/[^`]+)`")
    tail = ["trainer", "swarm-node/0.1.0", "tiny", ["reasoning_gym/products"], 120]
    assert fields == [1, 1, PUBLIC, "hivemind", [address], 1767225600000, *tail]
    assert base64.b32encode(PUBLIC).decode().rstrip("=").lower() == stated(r"is `([a-z2-7]{52})`")


def test_the_other_messages_are_as_stated():
    root = open_signed(EXAMPLE["announcement"], b"announcement")[6]
    assert unpack(EXAMPLE["announce_response"]) == [1, 1, 30]
    assert unpack(EXAMPLE["pull_request"]) == [1, 1, root, 2]
    assert unpack(EXAMPLE["hello"]) == [1, 1, "example", 1767225600000, True, EXAMPLE["node_record"]]
    assert unpack(EXAMPLE["repair_response"]) == [1, 1, [[EXAMPLE["announcement"], 2]]]
    assert unpack(EXAMPLE["peers_request"]) == [1, 1, 16]
    assert unpack(EXAMPLE["peers_response"]) == [1, 1, [EXAMPLE["node_record"]]]


def frames_of(stream):
    """(kind, number, content) of every frame, and nothing left."""
    while stream:
        kind, number, size = struct.unpack(">BIH", stream[:7])
        yield kind, number, stream[7 : 7 + size]
        stream = stream[7 + size :]


def test_the_requests_travel_as_stated():
    kinds = {int(kind): name for kind, name in re.findall(r"\| (?:asker|answerer|both) \| (\d) \| ([A-Z]+) \|", PAGE)}
    said = [(kinds[kind], number, content) for kind, number, content in frames_of(EXAMPLE["stream_of_the_asker"])]
    assert [(kind, number) for kind, number, _ in said] == [("REQUEST", 1), ("REQUEST", 2), ("CANCEL", 2)]
    for (_, _, content), name, payload in zip(said, ("pull", "peers"), ("pull_request", "peers_request"), strict=False):
        size, most, length = struct.unpack(">IIB", content[:9])
        assert content[9 : 9 + length] == name.encode()
        assert content[9 + length :] == EXAMPLE[payload]
        assert size == len(EXAMPLE[payload])
        assert most == {"pull": 4 * 2**20, "peers": 66_048}[name]
    said = [(kinds[kind], number, content) for kind, number, content in frames_of(EXAMPLE["stream_of_the_answerer"])]
    assert said == [
        ("ANSWER", 1, len(EXAMPLE["pull_response"]).to_bytes(4, "big") + EXAMPLE["pull_response"]),
        ("CANCELLED", 2, b""),
        ("CLOSING", 2, b""),
    ]


def test_the_filter_holds_the_root():
    root = open_signed(EXAMPLE["announcement"], b"announcement")[6]
    _, _, salt, num_hashes, bits, max_offers = unpack(EXAMPLE["repair_request"])
    assert (salt, num_hashes, len(bits), max_offers) == (b"saltsalt", 9, 2, 8)
    digest = hashlib.sha256(salt + root).digest()
    a, b = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    positions = {(a + n * b) % (8 * len(bits)) for n in range(num_hashes)}
    assert {i for i in range(8 * len(bits)) if bits[i // 8] >> i % 8 & 1} == positions


@pytest.mark.parametrize("name", ["announcement", "node_record"])
def test_no_bit_of_a_signed_record_can_change(name):
    tag = name.replace("_", " ").encode()
    for position in range(len(EXAMPLE[name])):
        forged = bytearray(EXAMPLE[name])
        forged[position] ^= 1
        with pytest.raises((InvalidSignature, AssertionError, ValueError, TypeError, IndexError)):
            open_signed(bytes(forged), tag)


def test_the_limits_stated_are_those_that_hold():
    from protocol import limits
    from protocol.transport import base, dispatch, framing, hivemind, mux, outbox, pace

    def number(pattern):
        return int(stated(pattern).replace(",", ""))

    assert number(r"1 to ([\d,]+) each; at most") == limits.MAX_FRAME_BYTES
    assert number(r"at most ([\d,]+) together") == limits.MAX_BATCH_BYTES
    assert number(r"tag `announcement`, at most ([\d,]+) bytes") == limits.MAX_ANNOUNCEMENT_BYTES
    assert number(r"array of at most ([\d,]+) unsigned") == limits.MAX_POLICY_VERSIONS
    assert number(r"tag `node record`, at most ([\d,]+) bytes") == limits.MAX_NODE_RECORD_BYTES
    assert number(r"`hello` .* \| ([\d,]+) bytes \| the same") == limits.MAX_HELLO_BYTES
    assert number(r"`repair` [^|]*\|[^|]*\| ([\d,]+) bytes") == limits.MAX_REPAIR_REQUEST_BYTES
    assert number(r"`peers` .* ([\d,]+) bytes \|\n") == limits.MAX_PEERS_RESPONSE_BYTES
    assert number(r"offers\*\*: array of at most ([\d,]+)") == limits.MAX_OFFERS
    assert number(r"fresh until ([\d,]+) s") == limits.FRESHNESS_S
    assert number(r"more than ([\d,]+) s ahead of the receiver") == limits.MAX_FUTURE_SKEW_S
    assert number(r"a record lives ([\d,]+) s") == limits.NODE_RECORD_TTL_S
    assert number(r"`quiet_s`, 0 to ([\d,]+)") == limits.MAX_QUIET_S
    assert number(r"A payload has at most 4 MiB \(([\d,]+) bytes\)") == base.MAX_FRAME_BYTES
    assert number(r"a piece that does not end its payload has at least ([\d,]+)") == framing.MIN_PIECE_BYTES
    assert number(r"hold up a small one \(([\d,]+) bytes") == outbox.CHUNK_BYTES
    assert number(r"detail, UTF-8, at most ([\d,]+) bytes") == framing.MAX_DETAIL_BYTES
    assert number(r"At most ([\d,]+) requests of one stream") == mux.MAX_OPEN_REQUESTS
    assert number(r"takes none for ([\d,]+) s") == pace.GRACE_S
    assert number(r"fewer than ([\d,]+) bytes/s") == pace.MIN_BYTES_PER_S
    assert number(r"at most ([\d,]+) requests of one asker") == dispatch.MAX_REQUESTS_PER_ASKER
    assert number(r"at one time, and ([\d,]+) of all") == dispatch.MAX_REQUESTS
    assert f"`{hivemind.STREAM_PROTOCOL}`" in PAGE


def test_every_reason_stands_on_the_page_with_what_it_costs():
    from protocol.refusals import Reason

    for reason in Reason:
        mark = "R" if reason.penalised else "I"
        assert re.search(rf"`{reason}`\s+{mark}\b", PAGE), f"the page does not say `{reason}` {mark}"
