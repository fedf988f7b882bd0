"""Streams of libp2p hold a window and no more, give it back by halves, and one task writes for all of a connection."""

import struct
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

pytestmark = pytest.mark.libp2p


class Secured:
    """What a connection writes to; it goes on when the test says so."""

    is_initiator = True

    def __init__(self):
        self.may_write = trio.Event()
        self.written = []
        self.is_closed = False

    async def write(self, data):
        self.written.append(data)
        await self.may_write.wait()

    async def close(self):
        self.is_closed = True


@pytest.fixture
def connection():
    from libp2p.peer.id import ID

    from protocol.transport.libp2p_wire import Connection

    return Connection(Secured(), ID(b"peer"))


def frame(text, *, kind=0, flags=0, stream=1):
    return struct.pack("!BBHII", 0, kind, flags, stream, len(text)) + text


@pytest.fixture
def autojump_clock():
    return trio.testing.MockClock(autojump_threshold=0)


@asynccontextmanager
async def writing(connection):
    """The connection's writer, as `start` runs it."""
    async with trio.open_nursery() as nursery:
        connection._nursery = nursery
        nursery.start_soon(connection._write_queued)
        await trio.testing.wait_all_tasks_blocked()
        yield nursery
        nursery.cancel_scope.cancel()


async def fill(connection):
    """Queue frames until the next one waits for room; return them all."""
    from protocol.transport.libp2p_wire import QUEUE_BYTES

    frames = [frame(b"%04d" % number + bytes(20_000)) for number in range(1 + -(-QUEUE_BYTES // 20_016))]
    for one in frames:
        await connection._write_frame(one)
        await trio.testing.wait_all_tasks_blocked()  # the writer has taken the first alone
    return frames


def test_frames_that_wait_go_in_one_write_in_their_order(connection):
    async def main():
        frames = [frame(text) for text in (b"first", b"one", b"two", b"three")]
        async with writing(connection) as nursery:
            for one in frames:
                nursery.start_soon(connection._write_frame, one)
                await trio.testing.wait_all_tasks_blocked()
            connection.secured_conn.may_write.set()
            await trio.testing.wait_all_tasks_blocked()
        assert connection.secured_conn.written == [frames[0], b"".join(frames[1:])]

    trio.run(main)


def test_who_is_cancelled_in_the_middle_of_a_write_leaves_the_connection_good(connection):
    async def main():
        async with writing(connection):
            with trio.move_on_after(0.01):
                await connection._write_frame(frame(b"half"))
            with trio.move_on_after(0.01):
                await connection._write_frame(frame(b"behind it"))
            connection.secured_conn.may_write.set()
            await connection._write_frame(frame(b"more"))
            await trio.testing.wait_all_tasks_blocked()
            assert not connection.secured_conn.is_closed
        assert b"".join(connection.secured_conn.written) == frame(b"half") + frame(b"behind it") + frame(b"more")

    trio.run(main)


def test_data_waits_for_room_in_its_order_and_what_is_cancelled_meanwhile_is_not_sent(connection):
    async def main():
        from libp2p.stream_muxer.yamux import yamux

        stream = connection.streams[1] = yamux.YamuxStream(1, connection, True)
        connection.stream_buffers[1] = bytearray()
        window = stream.send_window
        async with writing(connection) as nursery:
            frames = await fill(connection)
            given_up = trio.CancelScope()

            async def give_up():
                with given_up:
                    await stream.write(b"never mind")

            nursery.start_soon(give_up)
            await trio.testing.wait_all_tasks_blocked()
            late = [frame(b"%d" % number) for number in range(9)] + [frame(b"", kind=1, flags=yamux.FLAG_FIN)]
            for one in late:
                nursery.start_soon(connection._write_frame, one)
                await trio.testing.wait_all_tasks_blocked()
            assert sum(map(len, frames)) == connection._num_queued
            assert stream.send_window == window - len(b"never mind")
            given_up.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert stream.send_window == window
            connection.secured_conn.may_write.set()
            await trio.testing.wait_all_tasks_blocked()
        assert b"".join(connection.secured_conn.written) == b"".join(frames + late)

    trio.run(main)


@pytest.mark.parametrize("kind", ["PING", "SYN"])
def test_what_a_peer_makes_a_node_answer_waits_for_room_as_well(connection, kind, monkeypatch):
    """A peer that asks and asks, and reads no answer, fills a bounded queue; so does a node that asks it."""
    from protocol.transport import libp2p_wire

    monkeypatch.setattr(libp2p_wire, "QUEUE_BYTES", 1200)

    async def main():
        from libp2p.stream_muxer.yamux import yamux

        answer = frame(b"", kind=yamux.TYPE_PING, flags=yamux.FLAG_ACK, stream=0)
        async with writing(connection):
            with trio.move_on_after(0.5) as scope:
                for _ in range(1200):
                    if kind == "SYN":
                        await connection.open_stream()
                        connection.stream_backlog_semaphore.release()
                    else:
                        await connection._write_frame(answer)
            assert scope.cancelled_caught
            assert len(connection._queued) == 2 * 1200
            assert len(connection.streams) == (connection._num_queued // 12 if kind == "SYN" else 0)

    trio.run(main)


def test_a_connection_that_closes_writes_what_is_queued_first(connection):
    async def main():
        async with writing(connection) as nursery:
            for text in (b"first", b"second"):
                await connection._write_frame(frame(text))
            nursery.start_soon(connection.close)
            await trio.testing.wait_all_tasks_blocked()
            assert not connection.secured_conn.is_closed
            connection.secured_conn.may_write.set()
            await connection.event_closed.wait()
            written = b"".join(connection.secured_conn.written)
        assert written == frame(b"first") + frame(b"second") + frame(b"", kind=3, stream=0)
        assert connection.secured_conn.is_closed

    trio.run(main)


@pytest.mark.parametrize("how", ["it fails", "it stands still"])
def test_a_write_that_does_not_succeed_ends_the_connection_and_who_waits_is_told(connection, how, autojump_clock):
    async def main():
        from libp2p.io.exceptions import ConnectionClosedError

        told = []

        async def write(one):
            try:
                await connection._write_frame(one)
            except ConnectionClosedError as error:
                told.append(type(error.__cause__))

        async def break_off(data):
            await connection.secured_conn.may_write.wait()
            raise OSError("broken pipe")

        if how == "it fails":
            connection.secured_conn.write = break_off
        async with trio.open_nursery() as nursery, writing(connection):
            await fill(connection)
            for _ in range(3):
                nursery.start_soon(write, frame(b"waiting"))
            await trio.testing.wait_all_tasks_blocked()
            if how == "it fails":
                connection.secured_conn.may_write.set()
            await connection.event_closed.wait()
            assert connection.secured_conn.is_closed
            await trio.testing.wait_all_tasks_blocked()
        await write(frame(b"later"))
        assert told == [OSError if how == "it fails" else trio.TooSlowError] * 4
        assert not connection._queued

    trio.run(main, clock=autojump_clock)


def test_a_stream_holds_a_window_and_no_more(connection):
    from protocol.transport.libp2p_wire import WINDOW_BYTES

    connection.stream_buffers[1] = bytearray()
    connection.stream_buffers[1].extend(bytes(WINDOW_BYTES))
    with pytest.raises(BufferError):
        connection.stream_buffers[1].extend(b"x")


def test_a_window_is_given_back_by_halves(connection):
    async def main():
        from libp2p.stream_muxer.yamux import yamux

        stream = yamux.YamuxStream(1, connection, True)
        connection.streams[1], connection.stream_buffers[1] = stream, bytearray()
        connection.stream_buffers[1].extend(bytes(yamux.DEFAULT_WINDOW_SIZE))
        stream.recv_window = 0
        assert len(await stream.read(100)) == 100
        assert not connection._queued
        await stream.read(yamux.DEFAULT_WINDOW_SIZE // 2)
        assert len(connection._queued) == yamux.HEADER_SIZE

    trio.run(main)
