import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused
from protocol.transport.framing import (
    ANSWER,
    BODY,
    CANCEL,
    CLOSING,
    MAX_PIECE_BYTES,
    REFUSAL,
    REQUEST,
    BrokenStream,
    Frame,
    FrameParser,
    RequestHead,
    answer_head,
    check_piece,
    frame_bytes,
    parse_answer,
    parse_refusal,
    parse_request,
    refusal_bytes,
    request_head,
)


def test_golden_bytes():
    assert frame_bytes(REQUEST, 7, request_head("hello", 3, 258) + b"abc") == bytes.fromhex(
        "01 00000007 0011 00000003 00000102 05 68656c6c6f 616263"
    )
    assert frame_bytes(ANSWER, 7, answer_head(4 * 2**20) + b"xy") == bytes.fromhex("02 00000007 0006 00400000 7879")
    assert frame_bytes(CANCEL, 2**32 - 1) == bytes.fromhex("03 ffffffff 0000")
    assert frame_bytes(BODY, 1, b"\x09", num_more=65_534) == bytes.fromhex("04 00000001 ffff 09")
    assert refusal_bytes(8, RequestRefused("busy", "sp\xe4ter")) == bytes.fromhex(
        "05 00000008 000c 04 62757379 7370c3a4746572"
    )


@given(
    st.lists(st.tuples(st.sampled_from([BODY, CANCEL]), st.integers(0, 2**32 - 1), st.binary(min_size=1)), max_size=20),
    st.randoms(),
)
def test_frames_are_read_however_the_stream_cuts_them(frames, rng):
    frames = [Frame(kind, number, b"" if kind == CANCEL else content) for kind, number, content in frames]
    data, parser, found = b"".join(frame_bytes(*frame) for frame in frames), FrameParser(), []
    while data:
        size = rng.randrange(1, 30)
        found += parser.feed(data[:size])
        data = data[size:]
    assert found == frames
    assert not parser.is_within_frame


@pytest.mark.parametrize(
    "header",
    [b"\0\0\0\0\1\0\0", b"\x08\0\0\0\1\0\0", b"\x03\0\0\0\1\0\1", b"\x04\0\0\0\1\0\0", b"\x01\0\0\0\1\0\x09",
     b"\x02\0\0\0\1\0\3", b"\x05\0\0\0\1\xff\xff", b"\x07\0\0\0\1\0\1"],
)  # fmt: skip
def test_a_header_that_is_none_is_refused_before_what_follows(header):
    good = frame_bytes(CLOSING, 1)
    found = []
    with pytest.raises(BrokenStream):
        found.extend(FrameParser().feed(good + header))
    assert found == [Frame(CLOSING, 1, b"")]  # what came before it counts


def test_a_parser_holds_one_frame_at_most():
    parser = FrameParser()
    frame = frame_bytes(BODY, 1, bytes(MAX_PIECE_BYTES))
    for _ in range(100):
        for at in range(0, len(frame), 1000):
            list(parser.feed(frame[at : at + 1000]))
            assert len(parser._buffer) < len(frame)


def test_heads_are_read_as_they_are_written():
    assert parse_request(request_head("a" * 32, 5, 2**32 - 1) + b"abc") == (RequestHead("a" * 32, 5, 2**32 - 1), b"abc")
    assert parse_answer(answer_head(MAX_FRAME_BYTES)) == (MAX_FRAME_BYTES, b"")
    refusal = parse_refusal(refusal_bytes(1, RequestRefused("busy", "\u00e4" * 500))[7:])
    assert (refusal.code, refusal.detail) == ("busy", "\u00e4" * 200)


@pytest.mark.parametrize("name", [b"", b"a" * 33, b"A", b"a-", b"\xc3\xbc"])
def test_a_request_without_a_name(name):
    with pytest.raises(BrokenStream):
        parse_request(bytes(8) + bytes([len(name)]) + name)


def test_a_name_that_is_cut_short():
    for length in range(10, 13):
        with pytest.raises(BrokenStream):
            parse_request(request_head("echo", 0, 0)[:length])


def test_bodies_over_the_cap_are_not_waited_for():
    for size in (MAX_FRAME_BYTES + 1, 2**32 - 1):
        with pytest.raises(BrokenStream):
            parse_answer(answer_head(size))
        with pytest.raises(BrokenStream):
            parse_request(request_head("echo", size, 0))


@pytest.mark.parametrize("content", [b"\0x", b"\x05busy", b"\x04Busy", b"\x04busy\xff", b"\x21" + b"a" * 40])
def test_a_refusal_that_is_none(content):
    with pytest.raises(BrokenStream):
        parse_refusal(content)


def test_pieces():
    assert check_piece(1024, 5000) == 3976
    assert check_piece(1, 1) == check_piece(0, 0) == 0
    for size, left in ((1023, 1024), (2, 1), (0, 1), (1, 0)):
        with pytest.raises(BrokenStream):
            check_piece(size, left)


def test_random_bytes_are_frames_or_broken():
    rng = random.Random(0)
    for _ in range(2000):
        parser = FrameParser()
        try:
            for frame in parser.feed(rng.randbytes(rng.randrange(100))):
                assert frame.kind in range(1, 8)
        except BrokenStream:
            pass
        assert len(parser._buffer) < 100
    assert REFUSAL == 5
