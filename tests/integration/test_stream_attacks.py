"""Attacks by a peer that writes to a stream what it likes, on every transport that has streams."""

import asyncio
import time
from contextlib import suppress

import pytest

from protocol.identity import Identity
from protocol.transport import pace
from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable, ResponseTooLarge
from protocol.transport.hivemind import STREAM_PROTOCOL, HivemindSettings, HivemindTransport
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.peer_id import peer_bytes_of
from protocol.transport.peer_streams import MAX_STREAMS_PER_PEER

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
LOCAL = ("/ip4/127.0.0.1/tcp/0",)


def over_hivemind(identity):
    settings = HivemindSettings(listen=LOCAL, nat_port_map=False, auto_nat=False)
    return HivemindTransport(identity, lambda *_: True, settings)


def over_libp2p(identity):
    return Libp2pTransport(identity, lambda *_: True, Libp2pSettings(listen=LOCAL, mdns=False))


@pytest.fixture(params=[over_hivemind, pytest.param(over_libp2p, marks=pytest.mark.libp2p)])
def swarm(request, tmp_path):
    """Return a function that starts nodes which know each other and answer `echo`."""

    async def start(count):
        nodes = [request.param(Identity.create(tmp_path / f"{number}.pem")) for number in range(count)]

        async def echo(asker, request):
            return request

        for node in nodes:
            node.handle("echo", echo, max_request_bytes=MAX_FRAME_BYTES)
            await node.start()
            if node is not nodes[0]:
                await node.connect(nodes[0].addresses[0], timeout_s=20)
        return nodes

    return start


def begin(number, size, content=b"", name=b"echo"):
    """A REQUEST that announces a body of so many bytes."""
    head = size.to_bytes(4, "big") + (2**22).to_bytes(4, "big") + bytes([len(name)]) + name + content
    return b"\x01" + number.to_bytes(4, "big") + len(head).to_bytes(2, "big") + head


def frame(kind, number, content=b""):
    return bytes([kind]) + number.to_bytes(4, "big") + len(content).to_bytes(2, "big") + content


def test_streams_that_do_not_keep_to_the_framing(swarm, monkeypatch):
    """Silent, slow, wrong and boundless: each is cut off and counted, and a neighbour notices nothing."""
    monkeypatch.setattr(pace, "GRACE_S", 0.5)

    async def main():
        victim, attacker, neighbour = await swarm(3)
        peer = peer_bytes_of(victim.node_id)

        async def attack(data, every_s=None):
            """Return what comes back until the victim ends the stream."""
            reader, writer = await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL)
            answering = asyncio.create_task(reader.read())
            for piece in [data] if every_s is None else [data[i : i + 10] for i in range(0, len(data), 10)]:
                writer.write(piece)
                if every_s is not None and (await asyncio.wait({answering}, timeout=every_s))[0]:
                    break
            answer = await asyncio.wait_for(answering, 10)
            writer.close()
            return answer

        good = begin(1, 1, b"x")
        attacks = {
            "too_slow": [
                attack(b""),
                attack(good[:5]),
                attack(good[:-1]),
                attack(begin(1, 9999, bytes(2000))),
                attack(begin(1, 9999, bytes(9999)), every_s=0.1),
            ],
            "bad_framing": [
                attack(b"\0" * 7),
                attack(b"\xff" * 50),
                attack(begin(1, 0, name=b"ECHO")),
                attack(begin(1, 0, name=b"")),
                attack(begin(1, 2**32 - 1)),
                attack(begin(1, 4 * 2**20 + 1)),
                attack(begin(1, 9, b"crumb")),
                attack(begin(1, 9, bytes(10))),
                attack(frame(4, 1, bytes(10))),
                attack(frame(2, 1, bytes(10))),
                attack(frame(3, 1)),
                attack(begin(2, 9999, bytes(2000)) + begin(2, 1, b"x")),
                attack(begin(2, 9999, bytes(2000)) + begin(1, 1, b"x")),
                attack(begin(1, 9999, bytes(2000)) + frame(4, 1, bytes(8000))),
                attack(begin(1, 9999, bytes(2000)) + frame(3, 1) + frame(3, 1)),
                attack(begin(1, 9999, bytes(2000)) + frame(3, 1) + frame(4, 1, bytes(2000))),
            ],
            "too_many_requests": [attack(b"".join(begin(n, 9999, bytes(2000)) for n in range(1, 40)))],
        }
        for reason, attempts in attacks.items():
            began = time.monotonic()
            before = victim.broken_streams[reason]
            for attempt in attempts:
                await attempt
                answer = await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5)
                assert answer == b"x"
            assert victim.broken_streams[reason] - before == len(attempts), (reason, victim.broken_streams)
            assert time.monotonic() - began < 20

        # It opens streams and says nothing: each replaces one that it had before.
        many = [await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL) for _ in range(50)]
        async with asyncio.timeout(20):
            while victim.broken_streams["too_many_streams"] < 50 - MAX_STREAMS_PER_PEER:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            while victim._session.streams.num_taken > 1 + MAX_STREAMS_PER_PEER:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5) == b"x"
        for _, writer in many:
            writer.close()
        assert neighbour.broken_streams.total() == 0
        for node in (victim, attacker, neighbour):
            await node.close()

    asyncio.run(main())


def test_a_peer_that_asks_for_much_and_reads_nothing(swarm, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.5)
    monkeypatch.setattr(pace, "MIN_BYTES_PER_S", 64 * 2**20)

    async def main():
        victim, attacker, neighbour = await swarm(3)
        peer = peer_bytes_of(victim.node_id)
        before = victim.traffic.bytes_out
        reader, writer = await attacker._session.daemon.open_stream(peer, STREAM_PROTOCOL)
        reader._transport.pause_reading()
        with suppress(ConnectionError):  # a slow transport is cut off while it still sends
            for number in range(1, 9):
                writer.write(begin(number, 2**20, bytes(60_000)))
                for size in [60_000] * 16 + [2**20 - 17 * 60_000]:
                    writer.write(frame(4, number, bytes(size)))
                await writer.drain()
        for _ in range(50):
            assert await neighbour.request(victim.node_id, "echo", b"x", max_response_bytes=1, timeout_s=5) == b"x"
        async with asyncio.timeout(20):
            while not victim.broken_streams["too_slow"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert victim.traffic.bytes_out - before < 8 * 2**20  # the rest was never sent, and is not kept
        writer.transport.abort()
        for node in (victim, attacker, neighbour):
            await node.close()

    asyncio.run(main())


def test_responses_that_do_not_keep_to_the_framing(swarm):
    """A peer answers what it likes: nothing beyond the cap is kept, and the asker hears one kind of error."""

    async def main():
        asker, liar = await swarm(2)
        answers = {
            frame(2, 1, (2**32 - 1).to_bytes(4, "big")): PeerUnreachable,
            frame(2, 1, (101).to_bytes(4, "big")): ResponseTooLarge,
            frame(2, 1, (101).to_bytes(4, "big") + bytes(101)): PeerUnreachable,
            frame(2, 1, (9).to_bytes(4, "big") + bytes(10)): PeerUnreachable,
            frame(2, 1, (9).to_bytes(4, "big") + b"abc"): PeerUnreachable,
            frame(2, 2, bytes(4)): PeerUnreachable,
            frame(4, 1, b"abc"): PeerUnreachable,
            frame(5, 1, b"\x03Bad!"): PeerUnreachable,
            frame(5, 1, b"\x03bad\xff\xff"): PeerUnreachable,
            frame(6, 1): PeerUnreachable,
            frame(7, 2): PeerUnreachable,
            b"\xff" * 9: PeerUnreachable,
            b"": PeerUnreachable,
        }
        for answer, expected in answers.items():

            async def lie(asker, reader, writer, answer=answer):
                await reader.read(5)
                writer.write(answer)
                await writer.drain()
                await asyncio.wait({asyncio.create_task(reader.read())}, timeout=0 if answer == b"" else 5)
                writer.close()

            liar._session.streams.take = lie
            with pytest.raises(expected) as error:
                await asker.request(liar.node_id, "echo", b"", max_response_bytes=100, timeout_s=5)
            assert type(error.value) is expected, answer
            asker._session.streams.end_peer(liar.node_id)
        await asker.close()
        await liar.close()

    asyncio.run(main())
