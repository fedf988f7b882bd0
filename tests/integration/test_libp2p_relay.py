"""Relays of the transport libp2p: a node that nobody can connect to is reached through a peer that can be."""

import asyncio
import socket
import time

import pytest

from protocol.identity import Identity
from protocol.transport.base import MAX_FRAME_BYTES, Judgement, PeerUnreachable, TransportError
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.peer_id import peer_bytes_of, peer_id_of

pytestmark = pytest.mark.libp2p
LISTEN = ("/ip4/127.0.0.1/tcp/0",)
WITHIN_S = 30.0  # for what must happen, on a busy machine


async def echo(asker, request):
    return request


async def start(folder, name, judge=None, **settings):
    settings = Libp2pSettings(**{"listen": LISTEN, "mdns": False, "auto_nat": False, **settings})
    identity = Identity.create(folder / f"{name}.pem")
    node = Libp2pTransport(identity, lambda key, owner, value, expires_at, now: True, settings)
    node.handle("echo", echo, max_request_bytes=MAX_FRAME_BYTES)
    if judge is not None:
        node.hear(judge)
    await node.start()
    return node


async def until(condition, what):
    try:
        async with asyncio.timeout(WITHIN_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {WITHIN_S:g} s") from None


def relayed_addresses(node):
    return [address for address in node.addresses if "/p2p-circuit/" in address]


async def ask(asker, asked, payload=b"hello"):
    return await asker.request(asked.node_id, "echo", payload, max_response_bytes=MAX_FRAME_BYTES, timeout_s=WITHIN_S)


async def until_apart(one, other):
    """Wait until both have noticed that nothing connects them: until then a request may go out on what is gone."""
    async with asyncio.timeout(WITHIN_S):
        for node, peer in ((one, other), (other, one)):
            while peer_bytes_of(peer.node_id) in dict(await node._session.daemon.peers()):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


async def hidden_behind(folder, relay, name="hidden", **settings):
    """A node that is reached through a relay alone."""
    named = {"trusted_relays": (relay.addresses[0],), "force_reachability": "private", "auto_relay": True}
    node = await start(folder, name, **{**named, **settings})
    await until(lambda: relayed_addresses(node), "a place at the relay")
    return node


def test_a_node_is_reached_through_the_relay_that_it_trusts(tmp_path):
    """Requests of any size both ways, and announcements; the relay has the bytes and no stream of the two."""
    heard = []

    def judge(teller, message):
        heard.append((teller, message))
        return Judgement.ACCEPT

    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        hidden = await hidden_behind(tmp_path, relay, judge=judge)
        assert relayed_addresses(hidden) == list(hidden.addresses)
        assert hidden.addresses[0] == f"{relay.addresses[0]}/p2p-circuit/p2p/{peer_id_of(hidden.node_id)}"
        other = await start(tmp_path, "other")
        assert await other.connect(hidden.addresses[0], timeout_s=WITHIN_S) == hidden.node_id
        before = relay.details()["relayed_bytes"]
        for asker, asked in ((other, hidden), (hidden, other)):
            for size in (0, 100_000, 2**20):
                assert await ask(asker, asked, bytes(size)) == bytes(size)
        assert relay.details()["relayed_bytes"] - before > 4 * 2**20
        assert relay.details()["num_relayed_peers"] == relay.details()["num_relayed_circuits"] == 1
        await other.broadcast(b"news")
        await until(lambda: b"news" in [message for _, message in heard], "an announcement")
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())


def test_who_can_be_reached_is_found_out_and_relays_the_others(tmp_path):
    """Nobody says who is what: the two ask each other to try, one is reached, and the other is through it."""

    async def main():
        relay = await start(tmp_path, "relay", auto_nat=True)
        hidden = await start(tmp_path, "hidden", auto_nat=True, auto_relay=True, announce=("/ip4/127.0.0.1/tcp/9",))
        assert [node.details()["reachability"] for node in (relay, hidden)] == ["unknown"] * 2
        await hidden.connect(relay.addresses[0], timeout_s=WITHIN_S)
        for node, state in ((relay, "public"), (hidden, "private")):
            await until(lambda node=node, state=state: node.details()["reachability"] == state, state)
        await until(lambda: relayed_addresses(hidden) == list(hidden.addresses), "a place at the relay alone")
        assert (hidden.details()["num_relays"], relay.details()["num_relays"]) == (1, 0)
        circuit = hidden.addresses[0].rpartition("/p2p/")[0]
        await until(lambda: (circuit,) in relay._session.daemon._told.values(), "the new address at the peer")
        other = await start(tmp_path, "other")
        await other.connect(relay.addresses[0], timeout_s=WITHIN_S)
        assert await ask(other, hidden) == b"hello"  # the DHT knows where it is
        assert relay.details()["num_relayed_circuits"] >= 1  # the DHT may have dialled as well
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())


def test_who_comes_from_elsewhere_than_it_says_cannot_be_reached(tmp_path):
    """As behind a router: no peer tries an address of somebody else."""

    async def main():
        peer = await start(tmp_path, "peer", auto_nat=True, force_reachability="public")
        routed = await start(tmp_path, "routed", auto_nat=True, announce=("/ip4/192.0.2.1/tcp/7000",))
        await routed.connect(peer.addresses[0], timeout_s=WITHIN_S)
        await until(lambda: routed.details()["reachability"] == "private", "a verdict")
        assert not relayed_addresses(routed)  # it has not asked for that
        for node in (peer, routed):
            await node.close()

    asyncio.run(main())


def test_a_relay_connects_nobody_who_has_not_asked_for_it(tmp_path):
    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        plain, other = await start(tmp_path, "plain"), await start(tmp_path, "other")
        await plain.connect(relay.addresses[0], timeout_s=WITHIN_S)
        address = f"{relay.addresses[0]}/p2p-circuit/p2p/{peer_id_of(plain.node_id)}"
        with pytest.raises(PeerUnreachable, match="the relay refuses: no reservation"):
            await other.connect(address, timeout_s=WITHIN_S)
        for node in (relay, plain, other):
            await node.close()

    asyncio.run(main())


def test_who_cannot_be_reached_itself_does_not_relay(tmp_path):
    async def main():
        relay = await start(tmp_path, "relay")  # nobody has told it that it can be
        hidden = await start(
            tmp_path, "hidden", auto_relay=True, force_reachability="private", trusted_relays=(relay.addresses[0],)
        )
        other = await start(tmp_path, "other")
        await until(lambda: hidden._session.daemon.circuits._refused, "a refusal")
        assert hidden.details()["num_relays"] == relay.details()["num_relayed_peers"] == 0
        address = f"{relay.addresses[0]}/p2p-circuit/p2p/{peer_id_of(hidden.node_id)}"
        with pytest.raises(PeerUnreachable, match="the relay refuses: permission denied"):
            await other.connect(address, timeout_s=WITHIN_S)
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())


def test_a_circuit_ends_with_its_bytes_or_its_time_and_is_made_anew(tmp_path, monkeypatch):
    from protocol.transport import libp2p_relay

    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        hidden = await hidden_behind(tmp_path, relay)
        other = await start(tmp_path, "other")
        await other.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        monkeypatch.setattr(libp2p_relay, "CIRCUIT_BYTES", 300_000)
        await other.disconnect(hidden.node_id)
        await other.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        assert await ask(other, hidden, bytes(50_000)) == bytes(50_000)
        with pytest.raises(PeerUnreachable):
            await ask(other, hidden, bytes(400_000))
        assert await ask(other, hidden) == b"hello"
        monkeypatch.undo()
        monkeypatch.setattr(libp2p_relay, "CIRCUIT_S", 0.5)
        await other.disconnect(hidden.node_id)
        await other.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        await until(lambda: relay.details()["num_relayed_circuits"] == 0, "the end of the circuit")
        assert len(await relay._session.daemon.peers()) == 2  # what ended is the circuit alone
        await until_apart(hidden, other)
        monkeypatch.undo()
        assert await ask(other, hidden) == b"hello"
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())


def test_a_circuit_that_is_cut_in_the_middle_of_a_write_leaves_the_connections_that_carry_it(tmp_path, monkeypatch):
    """They carry other circuits, and what their ends say to the relay."""
    from protocol.transport import libp2p_relay
    from protocol.transport.libp2p_wire import Connection

    async def be_busy():
        time.sleep(3)  # noqa: ASYNC251  # nobody reads there meanwhile: the relay cannot go on writing

    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        hidden = await hidden_behind(tmp_path, relay)
        network = relay._session.daemon._network
        before = [connection for connections in network.connections.values() for connection in connections]
        raw = before[0].muxed_conn.secured_conn.conn.read_writer.read_write_closer
        raw.stream.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        other = await start(tmp_path, "other")
        await other.connect(relay.addresses[0], timeout_s=WITHIN_S)
        before = [connection for connections in network.connections.values() for connection in connections]
        assert all(type(connection.muxed_conn) is Connection for connection in before)
        monkeypatch.setattr(libp2p_relay, "CIRCUIT_S", 2)
        await other.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        monkeypatch.undo()
        busy = asyncio.create_task(hidden._session.daemon._thread.call(be_busy))
        with pytest.raises(PeerUnreachable):
            await ask(other, hidden, bytes(2**20))
        await busy
        await until_apart(hidden, other)
        assert await ask(other, hidden, bytes(2**20)) == bytes(2**20)
        for asker, asked in ((relay, hidden), (hidden, relay), (other, relay)):
            assert await ask(asker, asked, bytes(2**20)) == bytes(2**20)
        assert [one for connections in network.connections.values() for one in connections] == before
        assert not any(connection.is_closed for connection in before)
        for node in (relay, hidden, other):
            await node.close()

    asyncio.run(main())


def test_places_and_circuits_are_bounded(tmp_path, monkeypatch):
    from protocol.transport import libp2p_relay

    async def main():
        relay = await start(tmp_path, "relay", force_reachability="public")
        hidden = await hidden_behind(tmp_path, relay)
        monkeypatch.setattr(libp2p_relay, "MAX_RESERVATIONS", 1)
        late = await start(
            tmp_path, "late", auto_relay=True, force_reachability="private", trusted_relays=(relay.addresses[0],)
        )
        await until(lambda: late._session.daemon.circuits._refused, "a refusal")
        assert (late.details()["num_relays"], relay.details()["num_relayed_peers"]) == (0, 1)
        monkeypatch.setattr(libp2p_relay, "MAX_CIRCUITS_PER_PEER", 1)
        one, two = await start(tmp_path, "one"), await start(tmp_path, "two")
        await one.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        with pytest.raises(PeerUnreachable, match="the relay refuses: resource limit exceeded"):
            await two.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        assert await ask(one, hidden) == b"hello"
        await one.disconnect(hidden.node_id)
        await until(lambda: relay.details()["num_relayed_circuits"] == 0, "the end of the circuit")
        await two.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        for node in (relay, hidden, late, one, two):
            await node.close()

    asyncio.run(main())


def test_when_a_relay_is_gone_another_is_asked(tmp_path):
    """What a node tells others are the relays that it is connected to now."""

    async def main():
        relays = [await start(tmp_path, f"relay{number}", force_reachability="public") for number in range(2)]
        hidden = await start(tmp_path, "hidden", auto_relay=True, force_reachability="private")
        for relay in relays:
            await hidden.connect(relay.addresses[0], timeout_s=WITHIN_S)
        await until(lambda: len(relayed_addresses(hidden)) == 2, "places at both relays")
        await relays[0].close()
        await until(lambda: len(relayed_addresses(hidden)) == 1, "the end of one place")
        assert relayed_addresses(hidden)[0].startswith(relays[1].addresses[0])
        other = await start(tmp_path, "other")
        await other.connect(hidden.addresses[0], timeout_s=WITHIN_S)
        assert await ask(other, hidden) == b"hello"
        for node in (relays[1], hidden, other):
            await node.close()

    asyncio.run(main())


@pytest.mark.parametrize("address", ["192.0.2.1:7000", "/ip4/192.0.2.1/tcp/7000", "CIRCUIT"])
def test_what_is_no_relays_address_is_said_at_the_start(tmp_path, address):
    relay = f"/ip4/192.0.2.1/tcp/7000/p2p/{peer_id_of('a' * 52)}"
    address = f"{relay}/p2p-circuit/p2p/{peer_id_of('a' * 52)}" if address == "CIRCUIT" else address
    with pytest.raises(TransportError, match="not the address of a relay"):
        asyncio.run(start(tmp_path, "node", auto_relay=True, trusted_relays=(address,)))
