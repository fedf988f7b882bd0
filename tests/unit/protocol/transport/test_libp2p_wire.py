"""Streams of libp2p hold a window and no more, give it back by halves, and write what waits together."""

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


def test_frames_that_wait_go_in_one_write_in_their_order(connection):
    async def main():
        async with trio.open_nursery() as nursery:
            for frame in (b"first", b"one ", b"two ", b"three"):
                nursery.start_soon(connection._write_frame, frame)
                await trio.testing.wait_all_tasks_blocked()
            connection.secured_conn.may_write.set()
        assert connection.secured_conn.written == [b"first", b"one two three"]

    trio.run(main)


def test_a_write_that_is_cut_short_ends_the_connection(connection):
    async def main():
        from libp2p.io.exceptions import ConnectionClosedError

        with trio.move_on_after(0.01):
            await connection._write_frame(b"half")
        assert connection.secured_conn.is_closed
        with pytest.raises(ConnectionClosedError):
            await connection._write_frame(b"more")

    trio.run(main)


def test_a_stream_holds_a_window_and_no_more(connection):
    from protocol.transport.libp2p_wire import WINDOW_BYTES

    connection.stream_buffers[1] = bytearray()
    connection.stream_buffers[1].extend(bytes(WINDOW_BYTES))
    with pytest.raises(BufferError):
        connection.stream_buffers[1].extend(b"x")


def test_a_window_is_given_back_by_halves(connection):
    async def main():
        from libp2p.stream_muxer.yamux import yamux

        connection.secured_conn.may_write.set()
        stream = yamux.YamuxStream(1, connection, True)
        connection.streams[1], connection.stream_buffers[1] = stream, bytearray()
        connection.stream_buffers[1].extend(bytes(yamux.DEFAULT_WINDOW_SIZE))
        stream.recv_window = 0
        assert len(await stream.read(100)) == 100
        assert not connection.secured_conn.written
        await stream.read(yamux.DEFAULT_WINDOW_SIZE // 2)
        assert len(connection.secured_conn.written) == 1

    trio.run(main)
