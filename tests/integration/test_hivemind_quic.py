"""QUIC: a connection serves more requests, and for longer, than it has streams."""

import asyncio
import time

import pytest

from protocol.identity import Identity
from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused
from protocol.transport.hivemind import HivemindSettings, HivemindTransport

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
QUIC, TCP = "/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"


async def even(asker, request):
    if request[0] % 2:
        raise RequestRefused("odd")
    return request


async def two(folder, *listen):
    nodes = []
    for name in "ab":
        settings = HivemindSettings(listen=listen, nat_port_map=False, auto_nat=False)
        identity = Identity.create(folder / f"{name}.pem")
        nodes.append(HivemindTransport(identity, lambda key, owner, value, expires_at, now: True, settings))
        nodes[-1].handle("even", even, max_request_bytes=MAX_FRAME_BYTES)
        await nodes[-1].start()
    return nodes


async def connections(node):
    """Where the daemon has met its peers."""
    return sorted(str(address) for _, addresses in await node._session.daemon.peers() for address in addresses)


async def exchange(a, b, number, size=1):
    payload = bytes([number % 256]) * size
    try:
        return await a.request(b.node_id, "even", payload, max_response_bytes=size, timeout_s=10) == payload
    except RequestRefused as refusal:
        return refusal.code == "odd" and number % 2 == 1


def test_thousands_of_requests_over_one_quic_connection(tmp_path):
    """More than seven times as many as the streams that p2pd lets it have, answered and refused, both ways."""

    async def main():
        a, b = await two(tmp_path, QUIC)
        await a.connect(b.addresses[0], timeout_s=20)
        before = await connections(a)
        assert len(before) == 1
        assert "/quic-v1" in before[0]
        for first in range(0, 2400, 8):
            asked = [exchange(*((a, b) if number % 3 else (b, a)), number) for number in range(first, first + 8)]
            assert all(await asyncio.gather(*asked))
        assert await connections(a) == before
        assert a.broken_streams.total() == b.broken_streams.total() == 0
        await a.close()
        await b.close()

    asyncio.run(main())


@pytest.mark.soak
@pytest.mark.parametrize("listen", [(QUIC,), (TCP, QUIC)], ids=["quic", "both"])
def test_a_connection_lives_for_minutes(tmp_path, listen):
    """180 s of small and large requests, records of the DHT, and pauses, over the connection that was made."""

    async def main():
        a, b = await two(tmp_path, *listen)
        await a.connect(b.addresses[-1], timeout_s=20)
        before, began, number, longest_s = await connections(a), time.monotonic(), 0, 0.0
        expires_at = time.time() + 60
        while time.monotonic() - began < 180:
            for _ in range(50):
                number += 1
                asked = time.monotonic()
                assert await exchange(a, b, number, size=300_000 if number % 10 == 0 else 100)
                assert await exchange(b, a, number)
                longest_s = max(longest_s, time.monotonic() - asked)
            expires_at += 5
            assert await a.store(b"key", b"value", expires_at) == 2
            await asyncio.sleep(0.5 if number % 500 else 5)
        assert 2 * number > 2000
        assert longest_s < 5
        if listen == (QUIC,):
            assert await connections(a) == before
        assert a.broken_streams.total() == b.broken_streams.total() == 0
        assert a.traffic.num_restarts == b.traffic.num_restarts == 0
        await a.close()
        await b.close()

    asyncio.run(main())
