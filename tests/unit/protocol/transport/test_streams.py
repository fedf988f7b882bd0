import asyncio

import pytest

from protocol.transport.base import PeerUnreachable, RequestRefused, ResponseTooLarge
from protocol.transport.streams import (
    ANSWERED,
    BrokenStream,
    read_request_head,
    read_response,
    refusal_bytes,
    request_head,
    response_head,
    transfer_timeout_s,
)


def read(work, data, *arguments):
    async def main():
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await work(reader, *arguments)

    return asyncio.run(main())


def test_golden_bytes():
    assert request_head("hello", 258) == bytes.fromhex("05") + b"hello" + bytes.fromhex("00000102")
    assert response_head(ANSWERED, 4 * 2**20) == bytes.fromhex("0000400000")
    assert refusal_bytes(RequestRefused("busy", "später")) == bytes.fromhex("010000000c04") + b"busysp\xc3\xa4ter"


def test_what_is_written_is_read():
    assert read(read_request_head, request_head("a" * 32, 2**32 - 1)) == ("a" * 32, 2**32 - 1)
    assert read(read_response, response_head(ANSWERED, 3) + b"abc", 3) == b"abc"
    assert read(read_response, response_head(ANSWERED, 0), 0) == b""
    with pytest.raises(RequestRefused) as refusal:
        read(read_response, refusal_bytes(RequestRefused("busy", "später")), 0)
    assert (refusal.value.code, refusal.value.detail) == ("busy", "später")


@pytest.mark.parametrize("head", [b"\0", b"\x21" + b"a" * 40, b"\x02a-" + bytes(4), b"\x02\xc3\xbc" + bytes(4)])
def test_a_request_that_has_no_name(head):
    with pytest.raises(BrokenStream):
        read(read_request_head, head)


@pytest.mark.parametrize("length", range(9))
def test_a_head_that_is_cut_short(length):
    with pytest.raises(asyncio.IncompleteReadError):
        read(read_request_head, request_head("echo", 1)[:length])


def test_a_response_over_the_cap_is_not_waited_for():
    for cap, size in ((2, 3), (2**30, 4 * 2**20 + 1)):
        with pytest.raises(ResponseTooLarge):
            read(read_response, response_head(ANSWERED, size), cap)


@pytest.mark.parametrize(
    "answer",
    [b"\x02\0\0\0\0", b"\xff" * 5, b"\x01\0\0\0\1\0", b"\x01\0\0\4\1" + bytes(1025), b"\x01\0\0\0\2\0x",
     b"\x01\0\0\0\3\x05ab", b"\x01\0\0\0\4\x02Ab!", b"\x01\0\0\0\4\x02ab\xff"],
)  # fmt: skip
def test_a_refusal_that_is_none(answer):
    with pytest.raises(PeerUnreachable):
        read(read_response, answer, 10)


def test_a_body_has_time_by_its_size():
    assert transfer_timeout_s(0) == 5.0
    assert transfer_timeout_s(4 * 2**20) == 5.0 + 64
