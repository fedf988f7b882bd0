"""QUIC of the transport libp2p: nodes that listen on nothing else connect, ask each other and hear announcements."""

import asyncio

import pytest

from protocol.identity import Identity
from protocol.transport.base import MAX_FRAME_BYTES, Judgement
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport

pytestmark = pytest.mark.libp2p
WITHIN_S = 30.0


async def echo(asker, request):
    return request


def test_two_nodes_with_quic_alone_ask_and_hear_each_other(tmp_path):
    heard = {}

    async def start(name):
        settings = Libp2pSettings(listen=("/ip4/127.0.0.1/udp/0/quic-v1",), mdns=False, auto_nat=False)
        identity = Identity.create(tmp_path / f"{name}.pem")
        node = Libp2pTransport(identity, lambda key, owner, value, expires_at, now: True, settings)
        node.handle("echo", echo, max_request_bytes=MAX_FRAME_BYTES)
        heard[name] = asyncio.Event()

        def judge(teller, message):
            heard[name].set()
            return Judgement.ACCEPT

        node.hear(judge)
        await node.start()
        return node

    async def main():
        a, b = await start("a"), await start("b")
        assert all("/quic-v1/" in address for node in (a, b) for address in node.addresses)
        assert await a.connect(b.addresses[0], timeout_s=WITHIN_S) == b.node_id
        for number in range(300):
            asker, asked = (a, b) if number % 2 else (b, a)
            payload = bytes([number % 256]) * (100_000 if number % 100 == 0 else 10)
            answer = await asker.request(
                asked.node_id, "echo", payload, max_response_bytes=len(payload), timeout_s=WITHIN_S
            )
            assert answer == payload
        for teller, name in ((a, "b"), (b, "a")):
            await teller.broadcast(f"news for {name}".encode())
            await asyncio.wait_for(heard[name].wait(), WITHIN_S)
        for node in (a, b):
            await node.close()

    asyncio.run(main())
