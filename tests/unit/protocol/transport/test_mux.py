"""One stream with many requests: each is answered exactly once or fails exactly once, and nothing is left behind."""

import asyncio
import hashlib
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocol.transport import answering, framing, outbox, pace
from protocol.transport.asking import NotTaken
from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable, RequestRefused, ResponseTooLarge, TransportError
from protocol.transport.framing import BODY, CANCEL, REQUEST, FrameParser, frame_bytes, request_head
from protocol.transport.mux import MAX_OPEN_REQUESTS

MIB = 2**20
relaxed = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


async def echo(asker, request):
    return request


def run(main):
    async def within_time():
        async with asyncio.timeout(60):
            await main()

    asyncio.run(within_time())


def expand(request, size):
    """An answer that only this request has."""
    return (hashlib.sha256(request).digest() * (size // 32 + 1))[:size]


class Work:
    """A handler that does what the request says: size of the answer, seconds, whether to refuse."""

    def __init__(self):
        self.num_calls = 0

    async def work(self, asker, request):
        self.num_calls += 1
        size, wait_ms, refuse = int.from_bytes(request[:4], "big"), request[4], request[5]
        await asyncio.sleep(wait_ms / 1000)
        if refuse:
            raise RequestRefused("not_now", "later")
        return expand(request, size)


def order(number, answer_size, wait_ms, refuse, request_size):
    head = answer_size.to_bytes(4, "big") + bytes([wait_ms, refuse]) + number.to_bytes(2, "big")
    return head + random.Random(number).randbytes(request_size)


SIZES = st.one_of(st.integers(0, 3000), st.sampled_from([1023, 1024, 32_768, 65_535, 65_536, 300_000]))
ORDERS = st.lists(
    st.tuples(SIZES, st.integers(0, 5), st.booleans(), SIZES, st.none() | st.integers(0, 8)), min_size=1, max_size=40
)


@given(ORDERS)
@relaxed
def test_every_request_is_answered_once_whatever_else_is_under_way(link, orders):
    async def main():
        work = Work()
        async with link(work.work) as one:

            async def ask(number, answer_size, wait_ms, refuse, request_size, cancel_after_ms):
                request = order(number, answer_size, wait_ms, refuse, request_size)
                asking = asyncio.create_task(one.ask("work", request))
                if cancel_after_ms is not None:
                    await asyncio.wait({asking}, timeout=cancel_after_ms / 1000)
                    asking.cancel()
                try:
                    answer = await asking
                except asyncio.CancelledError:
                    assert cancel_after_ms is not None
                except RequestRefused:
                    assert refuse
                else:
                    assert not refuse
                    assert answer == expand(request, answer_size)

            await asyncio.gather(*(ask(number, *rest) for number, rest in enumerate(orders)))
            assert await one.ask("work", order(0, 9, 0, 0, 0)) == expand(order(0, 9, 0, 0, 0), 9)
            assert work.num_calls <= len(orders) + 1
            assert one.asker_tally.broken.total() == one.answerer_tally.broken.total() == 0
            while one.num_held:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert one.asker_tally.bytes_out == one.answerer_tally.bytes_in
        assert one.asker_tally.bytes_in == one.answerer_tally.bytes_out

    run(main)


@given(ORDERS, st.integers(0, 400_000), st.booleans(), st.integers(1, 255))
@relaxed
def test_every_request_ends_once_where_the_stream_breaks(link, orders, at, cut, flip):
    """A byte is changed, or the stream ends, somewhere: requests fail or have an answer, and none hangs."""

    async def main():
        work, num_passed = Work(), 0

        def meddle(data):
            nonlocal num_passed
            begin, num_passed = num_passed, num_passed + len(data)
            if begin <= at < num_passed:
                if cut:
                    return None
                return data[: at - begin] + bytes([data[at - begin] ^ flip]) + data[at - begin + 1 :]
            return data

        async with link(work.work, meddle=meddle) as one:

            async def ask(number, answer_size, wait_ms, refuse, request_size, cancel_after_ms):
                request = order(number, answer_size, wait_ms, refuse, request_size)
                asking = asyncio.create_task(one.ask("work", request))
                if cancel_after_ms is not None:
                    await asyncio.wait({asking}, timeout=cancel_after_ms / 1000)
                    asking.cancel()
                try:
                    return await asking
                except asyncio.CancelledError:
                    assert cancel_after_ms is not None
                except (TransportError, NotTaken) as error:
                    return error

            outcomes = await asyncio.gather(*(ask(number, *rest) for number, rest in enumerate(orders)))
            if num_passed <= at:
                assert not any(isinstance(outcome, PeerUnreachable | NotTaken) for outcome in outcomes)
            assert work.num_calls <= len(orders)

    old = pace.GRACE_S
    pace.GRACE_S = 0.05
    try:
        run(main)
    finally:
        pace.GRACE_S = old


def test_a_large_body_does_not_hold_up_a_small_one(link):
    async def main():
        async with link(echo) as one:
            large = [asyncio.create_task(one.ask("echo", bytes(4 * MIB))) for _ in range(4)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert await one.ask("echo", b"small") == b"small"
            before = one.answerer_tally.bytes_out
            assert not any(task.done() for task in large)
            assert one.answerer_tally.bytes_in < 2 * MIB  # of the 16 that were first
            assert before < MIB
            assert [len(await task) for task in large] == [4 * MIB] * 4

    run(main)


def test_sizes_at_the_edges(link):
    async def main():
        async with link(echo) as one:
            for size in (0, 1, 1023, 1024, 32_767, 32_768, 32_769, 65_535, 65_536, MAX_FRAME_BYTES):
                payload = random.Random(size).randbytes(size)
                assert await one.ask("echo", payload, cap=size) == payload

    run(main)


def test_refusals_and_caps(link, until):
    calls = []

    async def small(asker, request):
        calls.append((asker, request))
        return bytes(2 * MIB)

    async def main():
        async with link(echo) as one:
            one.handle("small", small, max_request_bytes=10)
            for name, size, code in (
                ("small", 11, "too_large"),
                ("small", 4 * MIB, "too_large"),
                ("nobody", 0, "unknown_name"),
            ):
                with pytest.raises(RequestRefused) as refusal:
                    await one.ask(name, bytes(size))
                assert refusal.value.code == code
            before = one.asker_tally.bytes_in
            with pytest.raises(ResponseTooLarge):
                await one.ask("small", b"", cap=2 * MIB - 1)
            assert one.asker_tally.bytes_in - before == 11
            assert calls == [("peer", b"")]
            await until(lambda: not one.num_held)
            assert one.answerer_tally.bytes_in < 4 * MIB  # the rest of what was refused was not sent
            assert one.asker_tally.broken.total() == one.answerer_tally.broken.total() == 0

    run(main)


def test_giving_up_ends_the_work_and_frees_what_it_held(link, until):
    running = []

    async def stuck(asker, request):
        running.append(request)
        try:
            await asyncio.Event().wait()
        finally:
            running.remove(request)

    async def main():
        async with link(stuck, echo, max_requests_per_asker=3) as one:
            for _ in range(20):
                asking = [asyncio.create_task(one.ask("stuck", bytes([n]))) for n in range(3)]
                await until(lambda: len(running) == 3)
                with pytest.raises(RequestRefused, match="busy"):
                    await one.ask("echo")
                for task in asking:
                    task.cancel()
                await until(lambda: not running and not one.num_held)
            assert await one.ask("echo", b"x") == b"x"

    run(main)


def test_an_answer_that_is_given_up_on_its_way_is_not_sent_to_its_end(link, until):
    async def large(asker, request):
        return bytes(MAX_FRAME_BYTES)

    async def main():
        async with link(large, echo) as one:
            for number in range(1, 6):
                before = one.asker_tally.bytes_in
                asking = asyncio.create_task(one.ask("large"))
                await until(lambda before=before: one.asker_tally.bytes_in - before > 100_000)
                asking.cancel()
                at_cancel = one.asker_tally.bytes_in
                await until(lambda: not one.num_held)
                assert one.asker_tally.bytes_in - at_cancel < MIB  # what was in the sockets' buffers
                assert await one.ask("echo", bytes([number])) == bytes([number])
            assert one.asker_tally.broken.total() == one.answerer_tally.broken.total() == 0

    run(main)


def test_more_requests_than_a_stream_has_wait_their_turn(link):
    num_now = most = 0

    async def brief(asker, request):
        nonlocal num_now, most
        num_now += 1
        most = max(most, num_now)
        await asyncio.sleep(0.001)
        num_now -= 1
        return request

    async def main():
        async with link(brief) as one:
            answers = await asyncio.gather(*(one.ask("brief", number.to_bytes(2, "big")) for number in range(500)))
            assert answers == [number.to_bytes(2, "big") for number in range(500)]
            assert most == MAX_OPEN_REQUESTS

    run(main)


def test_a_stream_that_ends_fails_what_is_under_way_and_what_waits(link):
    async def stuck(asker, request):
        await asyncio.Event().wait()

    async def main():
        async with link(stuck) as one:
            asking = [asyncio.create_task(one.ask("stuck")) for _ in range(MAX_OPEN_REQUESTS + 5)]
            while one.asker._num_waiting < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            one.answerer.abort()
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(outcome) for outcome in outcomes] == [PeerUnreachable] * MAX_OPEN_REQUESTS + [NotTaken] * 5
            with pytest.raises(NotTaken):
                await one.ask("stuck")

    run(main)


def test_a_closing_stream_ends_what_it_took_and_nothing_else(link, until):
    async def main():
        async with link(echo) as one:
            assert await one.ask("echo", b"x") == b"x"
            assert one.answerer.is_idle
            one.answerer.close()
            with pytest.raises(NotTaken):  # it crosses the closing
                await one.ask("echo", b"x")
            assert not one.asker.takes_requests
            await until(lambda: all(task.done() for task in one.running))
            assert one.asker_tally.broken.total() == one.answerer_tally.broken.total() == 0

    run(main)


# Peers that do not play by the rules


async def raw(link_, stream_pair, *, alone=False):
    """The asker's end of a stream to an answerer, without an asker; `alone` where the link's own must end."""
    if alone:
        link_.answerer.abort()
    near, far = await stream_pair()
    one = answering.Answerer("peer", *far, link_.answerer_tally, link_.dispatcher, link_.space)
    running = asyncio.create_task(one.run())
    return near, one, running


def request(number, size, content=b"", name="echo"):
    return frame_bytes(REQUEST, number, request_head(name, size, MAX_FRAME_BYTES) + content)


def test_a_peer_that_reads_nothing_costs_a_bounded_amount_and_is_cut_off(link, stream_pair, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.3)
    monkeypatch.setattr(pace, "MIN_BYTES_PER_S", 8 * MIB)
    monkeypatch.setattr(answering, "MAX_UNSENT_BYTES_PER_ASKER", 5 * MIB)
    most = 0

    async def large(asker, request):
        return bytes(MIB)

    async def main():
        nonlocal most
        async with link(large) as one:
            (reader, writer), answerer, running = await raw(one, stream_pair, alone=True)
            reader._transport.pause_reading()
            number = 0
            while not running.done():
                if number < 30:
                    number += 1
                    writer.write(request(number, 0, name="large"))
                await asyncio.sleep(0.002)
                most = max(most, one.space._num_all)
                assert answerer._writer.transport.get_write_buffer_size() < 200_000
            assert 4 * MIB <= most <= 5 * MIB
            assert one.space._num_all == 0
            assert one.answerer_tally.broken == {"too_slow": 1}
            writer.transport.abort()

    run(main)


def test_a_peer_that_asks_and_asks_and_never_reads_refusals_is_not_read_further(link, stream_pair, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.3)
    monkeypatch.setattr(pace, "MIN_BYTES_PER_S", 8 * MIB)

    async def main():
        async with link() as one:
            (reader, writer), answerer, running = await raw(one, stream_pair, alone=True)
            reader._transport.pause_reading()
            number = 0
            while not running.done():
                for _ in range(200):
                    number += 1
                    writer.write(request(number, 0, name="nobody"))
                await asyncio.wait(
                    {asyncio.ensure_future(writer.drain()), running}, return_when=asyncio.FIRST_COMPLETED, timeout=1
                )
                assert len(answerer._outbox._small) <= outbox.MAX_SMALL_FRAMES + 64
            assert one.answerer_tally.broken == {"too_slow": 1}
            writer.transport.abort()

    run(main)


FLOODS = {
    "requests that are refused": b"".join(request(n, 0, name="nobody") for n in range(2, 30_000)),
    "frames that cross a closing": b"".join(frame_bytes(CANCEL, n) for n in range(2, 60_000)),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_does_not_keep_others_from_the_loop(link, stream_pair, name):
    """Many small frames in one read: others have their turn between them."""

    async def main():
        async with link(echo) as one:
            (reader, writer), answerer, running = await raw(one, stream_pair)
            writer.write(request(1, 0))
            await reader.read(100)
            if "closing" in name:
                answerer.close()
            writer.write(FLOODS[name])
            draining = asyncio.create_task(reader.read(2**24))
            num_turns = 0
            while one.answerer_tally.bytes_in < len(FLOODS[name]):
                if draining.done():
                    draining = asyncio.create_task(reader.read(2**24))
                num_turns += 1
                await asyncio.sleep(0)
            assert num_turns > 30_000 / 64 / 2
            writer.transport.abort()
            await asyncio.gather(draining, running, return_exceptions=True)

    run(main)


BROKEN = {
    "an answer": frame_bytes(framing.ANSWER, 1, bytes(4)),
    "a used number": request(2, 0) + request(2, 0),
    "a smaller number": request(2, 0) + request(1, 0),
    "a body of nothing": frame_bytes(BODY, 1, bytes(10)),
    "a body after the end": request(1, 2, b"ab") + frame_bytes(BODY, 1, b"c"),
    "a longer body": request(1, 2, b"abc"),
    "crumbs": request(1, 2000, b"abc"),
    "more crumbs": request(1, 9000, bytes(2000)) + frame_bytes(BODY, 1, bytes(1023)),
    "too much": request(1, MAX_FRAME_BYTES + 1),
    "too much of what is refused": request(1, 4 * MIB, bytes(2000), name="nobody")
    + 65 * frame_bytes(BODY, 1, bytes(65_535)),
    "cancelled before it began": frame_bytes(CANCEL, 1),
    "cancelled twice": request(1, 0) + frame_bytes(CANCEL, 1) + frame_bytes(CANCEL, 1),
    "a body after the cancelling": request(1, 9000, bytes(2000))
    + frame_bytes(CANCEL, 1)
    + frame_bytes(BODY, 1, bytes(7000)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_must_not_come_ends_the_stream_and_is_counted(link, stream_pair, name):
    async def main():
        async with link(echo) as one:
            (reader, writer), _, running = await raw(one, stream_pair)
            writer.write(BROKEN[name])
            await reader.read()
            await running
            assert one.answerer_tally.broken == {"bad_framing": 1}
            assert await one.ask("echo", b"x") == b"x"  # another stream notices nothing

    run(main)


def test_too_many_requests_at_one_time_end_the_stream(link, stream_pair):
    async def main():
        async with link(echo) as one:
            (reader, writer), _, running = await raw(one, stream_pair)
            writer.write(b"".join(request(n, 5000, bytes(2000)) for n in range(1, MAX_OPEN_REQUESTS + 2)))
            await reader.read()
            await running
            assert one.answerer_tally.broken == {"too_many_requests": 1}
            assert one.dispatcher.num_under_way == 0

    run(main)


@pytest.mark.parametrize(
    "data", [b"", request(1, 0)[:3], request(1, 5000, bytes(2000)), request(1, 0) + frame_bytes(BODY, 1, b"x")[:-1]]
)
def test_whoever_owes_bytes_and_sends_none_is_cut_off(link, stream_pair, monkeypatch, data):
    monkeypatch.setattr(pace, "GRACE_S", 0.1)

    async def main():
        async with link(echo) as one:
            (reader, writer), _, running = await raw(one, stream_pair, alone=True)
            writer.write(data)
            await reader.read()
            await running
            assert one.answerer_tally.broken == {"too_slow": 1}
            writer.transport.abort()

    run(main)


def test_an_idle_stream_is_not_cut_off(link, stream_pair, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.05)

    async def main():
        async with link(echo) as one:
            for _ in range(3):
                assert await one.ask("echo", b"x") == b"x"
                await asyncio.sleep(0.2)
            assert one.asker.takes_requests

    run(main)


def test_what_was_given_up_must_end(link, stream_pair, monkeypatch):
    """A peer that never says CANCELLED would fill the stream with what waits for it."""
    monkeypatch.setattr(pace, "GRACE_S", 0.1)

    async def main():
        near, far = await stream_pair()
        async with link() as one:
            one.asker._writer.transport.abort()
            asker = type(one.asker)(*near, one.asker_tally)
            running = asyncio.create_task(asker.run())
            asking = asyncio.create_task(asker.request("echo", b"", 10))
            parser, kinds = FrameParser(), []
            while len(kinds) < 2:
                kinds += [frame.kind for frame in parser.feed(await far[0].read(100))]
                asking.cancel()
            assert kinds == [REQUEST, CANCEL]
            await running
            assert one.asker_tally.broken["too_slow"] == 1
            far[1].transport.abort()

    run(main)
