import asyncio
import socket
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from protocol.transport.answering import Answerer, AnswerSpace
from protocol.transport.asking import Asker
from protocol.transport.base import MAX_FRAME_BYTES
from protocol.transport.dispatch import Dispatcher
from protocol.transport.mux import Tally


async def make_stream_pair():
    """Two ends of one stream, as (reader, writer) each."""
    ends = socket.socketpair()
    return [await asyncio.open_connection(sock=end) for end in ends]


class Link:
    """An asker and an answerer on one stream; what passes between them may be meddled with."""

    def __init__(self, **limits):
        self.dispatcher = Dispatcher(**{"max_requests": 1000, "max_requests_per_asker": 1000, **limits})
        self.space = AnswerSpace()
        self.asker_tally, self.answerer_tally = Tally(), Tally()
        self.tasks = []

    def handle(self, name, handler, max_request_bytes=MAX_FRAME_BYTES):
        self.dispatcher.handle(name, handler, max_request_bytes)

    async def open(self, meddle=None):
        near, far = await make_stream_pair()
        if meddle is not None:
            middle, (beyond, far) = far, await make_stream_pair()
            self.tasks.append(asyncio.create_task(pump(middle[0], beyond[1], meddle)))
            self.tasks.append(asyncio.create_task(pump(beyond[0], middle[1], lambda data: data)))
        self.asker = Asker(*near, self.asker_tally)
        self.answerer = Answerer("peer", *far, self.answerer_tally, self.dispatcher, self.space)
        self.running = [asyncio.create_task(side.run()) for side in (self.asker, self.answerer)]
        self.tasks += self.running

    def ask(self, name="echo", payload=b"", cap=MAX_FRAME_BYTES):
        return self.asker.request(name, payload, cap)

    @property
    def num_held(self):
        """What is under way on either side, and what is held for it."""
        places = self.dispatcher.num_under_way + self.space._num_all
        return len(self.asker._open) + len(self.answerer._open) + len(self.answerer._tasks) + places

    async def close(self):
        for task in self.tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self.tasks, return_exceptions=True)
        bugs = [o for o in outcomes if isinstance(o, Exception)]
        assert not bugs, bugs
        assert self.num_held == 0
        assert self.space._num_bytes == Counter()


async def pump(reader, writer, meddle):
    """Carry bytes from one stream to another, as `meddle` leaves them; None ends both."""
    try:
        while data := await reader.read(65_536):
            data = meddle(data)
            if data is None:
                break
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.transport.abort()


@pytest.fixture
def link():
    """Makes links; use it as `async with link(handlers...) as one`."""

    @asynccontextmanager
    async def make(*handlers, meddle=None, **limits):
        one = Link(**limits)
        for handler in handlers:
            one.handle(handler.__name__, handler)
        await one.open(meddle)
        try:
            yield one
        finally:
            await one.close()

    return make


@pytest.fixture
def until():
    async def wait(condition, timeout_s=20):
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    return wait


@pytest.fixture
def stream_pair():
    """Makes the two ends of a stream."""
    return make_stream_pair
