"""The channel between the two processes of a bridge, over a real socket pair."""

import asyncio
import socket
import struct

import pytest

from protocol.bridge.channel import ChannelBroken, memory_channels
from protocol.bridge.pipe import MAX_CONTENT_BYTES, PipeChannel
from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused, RequestTimedOut, ResponseTooLarge


def pipes():
    one, other = socket.socketpair()
    return PipeChannel(one), PipeChannel(other)


async def echo(asker, payload):
    return payload


async def refuse(asker, payload):
    raise RequestRefused("not_held", "ask another")


@pytest.fixture(params=[memory_channels, pipes], ids=["memory", "pipe"])
def make(request):
    return request.param


def run(make, main, **handlers):
    """Start both ends, the other with handlers, and close them after `main`."""

    async def whole():
        one, other = make()
        for name, handler in {"echo": echo, "refuse": refuse, **handlers}.items():
            other.handle(name, handler, max_request_bytes=MAX_FRAME_BYTES)
        await one.start()
        await other.start()
        try:
            await main(one, other)
        finally:
            await one.close()
            await other.close()

    asyncio.run(asyncio.wait_for(whole(), 20))


def test_requests_are_answered_each_with_its_own_answer_and_up_to_the_largest(make):
    async def main(one, other):
        asked = [bytes([number]) * (number * 1000) for number in range(100)]
        answers = await asyncio.gather(
            *(one.request("echo", payload, max_response_bytes=10**6, timeout_s=10) for payload in asked)
        )
        assert answers == asked
        largest = bytes(MAX_FRAME_BYTES)
        assert await one.request("echo", largest, max_response_bytes=MAX_FRAME_BYTES, timeout_s=10) == largest

    run(make, main)


def test_a_refusal_an_unknown_name_and_what_is_over_a_cap_are_the_askers_errors(make):
    async def main(one, other):
        async def ask(name, payload=b"x", most=10):
            return await one.request(name, payload, max_response_bytes=most, timeout_s=5)

        with pytest.raises(RequestRefused, match="not_held: ask another"):
            await ask("refuse")
        with pytest.raises(RequestRefused, match="unknown_name"):
            await ask("nothing")
        with pytest.raises(ResponseTooLarge, match="11 bytes, over the cap of 10"):
            await ask("echo", b"x" * 11)
        assert await ask("echo") == b"x", "the channel is none the worse"

    run(make, main)


def test_an_answer_that_does_not_come_in_time_is_given_up_on_both_ends(make):
    ended = []

    async def never(asker, payload):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(payload)

    async def main(one, other):
        with pytest.raises(RequestTimedOut, match=r"no response within 0\.05 s"):
            await one.request("never", b"1", max_response_bytes=1, timeout_s=0.05)
        assert await one.request("echo", b"2", max_response_bytes=1, timeout_s=5) == b"2"
        assert ended == [b"1"]

    run(make, main, never=never)


def test_a_bug_in_a_handler_is_raised_where_it_is(make):
    async def bug(asker, payload):
        raise KeyError("mine")

    async def main(one, other):
        with pytest.raises(RequestRefused, match="handler_failed"):
            await one.request("bug", b"", max_response_bytes=1, timeout_s=5)
        with pytest.raises(KeyError, match="mine"):
            await asyncio.wait_for(other.wait_failed(), 5)

    run(make, main, bug=bug)


def test_an_end_that_is_closed_breaks_the_other_and_what_it_waits_for(make):
    async def hang_up(asker, payload):
        await closing.wait()
        return b""

    closing = asyncio.Event()

    async def main(one, other):
        asking = asyncio.create_task(one.request("hang_up", b"", max_response_bytes=1, timeout_s=30))
        await asyncio.sleep(0)
        await other.close()
        with pytest.raises(ChannelBroken):
            await asyncio.wait_for(one.wait_failed(), 5)
        with pytest.raises(ChannelBroken):
            await one.request("echo", b"", max_response_bytes=1, timeout_s=5)
        closing.set()
        asking.cancel()

    run(make, main, hang_up=hang_up)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (struct.pack(">BII", 2, 1, MAX_CONTENT_BYTES + 1), "over the limit"),
        (struct.pack(">BII", 1, 1, 7) + b"abc", "hung up"),
    ],
    ids=["too large", "cut short"],
)
def test_bytes_that_are_no_frame_break_the_channel_before_they_are_held(sent, message):
    async def main():
        one, other = socket.socketpair()
        channel = PipeChannel(one)
        await channel.start()
        other.sendall(sent)
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelBroken, match=message):
            await asyncio.wait_for(channel.wait_failed(), 5)
        await channel.close()
        other.close()

    asyncio.run(main())
