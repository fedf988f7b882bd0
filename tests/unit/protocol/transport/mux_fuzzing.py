"""Hostile bytes for the framing of requests and for the two sides of a stream; a run of it by itself.

`python mux_fuzzing.py NUM SEED` gives the parser, an answerer and an asker NUM changed frames each, and prints, as
JSON, what became of them and by how much the process has grown.
"""

import asyncio
import json
import random
import resource
import sys
from collections import Counter

from protocol.transport.answering import Answerer, AnswerSpace
from protocol.transport.asking import Asker, NotTaken
from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused, TransportError
from protocol.transport.dispatch import Dispatcher
from protocol.transport.framing import (
    ANSWER,
    BODY,
    CANCEL,
    CANCELLED,
    CLOSING,
    REFUSAL,
    REQUEST,
    BrokenStream,
    FrameParser,
    answer_head,
    frame_bytes,
    refusal_bytes,
    request_head,
)
from protocol.transport.mux import Tally

FRAMES_PER_STREAM = 20


class Nowhere(asyncio.Transport):
    """A socket that takes everything."""

    def __init__(self):
        super().__init__()
        self.is_closed = False
        self.num_bytes = 0

    def write(self, data):
        self.num_bytes += len(data)

    def is_closing(self):
        return self.is_closed

    def abort(self):
        self.is_closed = True

    close = abort


def stream():
    """A reader that is fed by hand, and a writer to nowhere."""
    reader, transport = asyncio.StreamReader(), Nowhere()
    protocol = asyncio.StreamReaderProtocol(reader)
    protocol.connection_made(transport)
    return reader, asyncio.StreamWriter(transport, protocol, reader, asyncio.get_running_loop())


def asked(number, rng):
    """A frame that an asker may send."""
    kind = rng.choice([REQUEST, REQUEST, REQUEST, BODY, CANCEL])
    if kind == REQUEST:
        size = rng.choice([0, 1, 1024, 5000, 300_000, MAX_FRAME_BYTES])
        piece = bytes(rng.choice([size, 1024]) if size < 6000 else 1024)
        name = rng.choice(["echo", "refuse", "nobody"])
        return frame_bytes(kind, number, request_head(name, size, rng.choice([0, 10, MAX_FRAME_BYTES])) + piece)
    return frame_bytes(kind, rng.randrange(1, number + 1), bytes(1024) if kind == BODY else b"")


def answered(number, rng):
    """A frame that an answerer may send."""
    kind = rng.choice([ANSWER, ANSWER, REFUSAL, BODY, CANCELLED, CLOSING])
    if kind == ANSWER:
        size = rng.choice([0, 1, 1024, 5000, MAX_FRAME_BYTES])
        return frame_bytes(kind, number, answer_head(size) + bytes(min(size, 1024)))
    if kind == REFUSAL:
        return refusal_bytes(number, RequestRefused("busy", "later"))
    return frame_bytes(kind, number, bytes(1024) if kind == BODY else b"")


def changed(data, rng):
    """Most frames are as they should be, so that what is not comes in every state."""
    kind = rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5])
    at = rng.randrange(min(len(data), 24))
    if kind == 0:
        return data
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 3:
        return data[: rng.randrange(len(data))]
    if kind == 4:
        return data[:at] + b"\xff" * 4 + data[at + 4 :]
    return rng.randbytes(rng.randrange(1, 40))


def parse(num, rng):
    """Feed parsers that live for a few frames each."""
    outcomes = Counter()
    for first in range(0, num, FRAMES_PER_STREAM):
        parser = FrameParser()
        for number in range(1, 1 + min(FRAMES_PER_STREAM, num - first)):
            try:
                outcomes["frames"] += len(list(parser.feed(changed(asked(number, rng), rng))))
            except BrokenStream as broken:
                outcomes[broken.reason] += 1
                parser = FrameParser()
    return outcomes


async def echo(asker, request):
    return request


async def refuse(asker, request):
    raise RequestRefused("no", "never")


async def attack_answerer(num, rng):
    """Send changed requests, a few on each stream, until it ends."""
    tally, space, dispatcher = Tally(), AnswerSpace(), Dispatcher()
    dispatcher.handle("echo", echo, MAX_FRAME_BYTES)
    dispatcher.handle("refuse", refuse, 5000)
    num_frames = 0
    while num_frames < num:
        reader, writer = stream()
        running = asyncio.create_task(Answerer("peer", reader, writer, tally, dispatcher, space).run())
        number = 0
        for _ in range(FRAMES_PER_STREAM):
            if running.done():
                break
            num_frames += 1
            number += rng.choice([0, 1, 1, 1, 1, 1, 7])
            reader.feed_data(changed(asked(max(1, number), rng), rng))
            await asyncio.sleep(0)
        reader.feed_eof()
        await running
        assert space._num_all == dispatcher.num_under_way == 0
    return {"frames": num_frames, "requests": tally.num_requests_in, **tally.broken}


async def attack_asker(num, rng):
    """Answer a few requests with changed frames."""
    tally, outcomes, num_frames = Tally(), Counter(), 0
    while num_frames < num:
        reader, writer = stream()
        asker = Asker(reader, writer, tally)
        running = asyncio.create_task(asker.run())
        asking = [asyncio.create_task(asker.request("echo", b"", 5000)) for _ in range(5)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asking[2].cancel()
        for _ in range(FRAMES_PER_STREAM):
            if running.done():
                break
            num_frames += 1
            reader.feed_data(changed(answered(rng.randrange(1, 7), rng), rng))
            await asyncio.sleep(0)
        reader.feed_eof()
        await running
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            assert not isinstance(outcome, Exception) or isinstance(outcome, TransportError | NotTaken), outcome
            outcomes[type(outcome).__name__] += 1
        assert asker.is_idle
    return {"frames": num_frames, **outcomes, **tally.broken}


def peak_bytes():
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main():
    num, seed = int(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    before = peak_bytes()
    found = {
        "parser": parse(num, rng),
        "answerer": asyncio.run(attack_answerer(num, rng)),
        "asker": asyncio.run(attack_asker(num, rng)),
    }
    print(json.dumps({"growth_bytes": peak_bytes() - before, "outcomes": found}))


if __name__ == "__main__":
    main()
