"""Relays: a node that nobody can connect to is reached through another one."""

import asyncio

import pytest

from protocol.identity import Identity
from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.peer_id import peer_id_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # hivemind's and torch's own
    pytest.mark.alone,
]
LISTEN = ("/ip4/127.0.0.1/tcp/0",)


async def echo(asker, request):
    return request


async def start(folder, name, **settings):
    """Start a node that is asked for nothing but what it was asked."""
    settings = HivemindSettings(listen=LISTEN, nat_port_map=False, auto_nat=False, **settings)
    identity = Identity.create(folder / f"{name}.pem")
    node = HivemindTransport(identity, lambda key, owner, value, expires_at, now: True, settings)
    node.handle("echo", echo, max_request_bytes=MAX_FRAME_BYTES)
    await node.start()
    return node


async def connect(node, address):
    """Connect as soon as the relay has taken the node behind it."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await node.connect(address, timeout_s=10)
            except PeerUnreachable:
                await asyncio.sleep(0.1)


async def ask(asker, asked, payload):
    """Ask until it is answered, as whoever calls has to: p2pd may reset a stream on a circuit that was just made.

    Seen in one of twenty runs, within 10 ms of the connection, on the first request alone; why is not known.
    """
    async with asyncio.timeout(20):
        while True:
            try:
                return await asker.request(
                    asked.node_id, "echo", payload, max_response_bytes=len(payload), timeout_s=20
                )
            except PeerUnreachable:
                await asyncio.sleep(0.1)


def test_a_node_is_reached_through_the_relay_that_it_trusts(tmp_path):
    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        trusted = relay.addresses[0]
        hidden = await start(
            tmp_path, "hidden", force_reachability="private", auto_relay=True, trusted_relays=(trusted,)
        )
        other = await start(tmp_path, "other")
        address = f"{trusted}/p2p-circuit/p2p/{peer_id_of(hidden.node_id)}"
        assert await connect(other, address) == hidden.node_id
        for asker, asked in ((other, hidden), (hidden, other)):
            assert await ask(asker, asked, bytes(2**20)) == bytes(2**20)
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())
