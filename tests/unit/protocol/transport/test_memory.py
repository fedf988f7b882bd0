import asyncio
import random

import pytest

from protocol.identity import node_id_of
from protocol.transport import virtual_time
from protocol.transport.base import (
    PeerUnreachable,
    Record,
    RequestRefused,
    RequestTimedOut,
    TransportDown,
)
from protocol.transport.framing import ANSWER_OVERHEAD_BYTES, REQUEST_OVERHEAD_BYTES
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport
from protocol.transport.memory_network import NUM_REPLICAS
from protocol.transport.virtual_time import virtual_clock

CLEAN = Faults(latency_s=(0.01, 0.01))


def node_id(number):
    return node_id_of(number.to_bytes(32, "big"))


def accept_all(key, owner, value, expires_at, now):
    return True


async def nodes(count, faults=CLEAN, seed=0, handler=None, **kwargs):
    network = MemoryNetwork(random.Random(seed), faults, virtual_clock())
    transports = [MemoryTransport(network, node_id(number), accept_all, **kwargs) for number in range(count)]

    async def echo(asker, request):
        return request

    for transport in transports:
        transport.handle("echo", handler or echo, max_request_bytes=2**20)
        await transport.start()
    return network, transports


def ask(asker, peer, payload=b"hello", timeout_s=5.0):
    return asker.request(peer.node_id, "echo", payload, max_response_bytes=2**20, timeout_s=timeout_s)


def in_virtual_time(test):
    def run(*args, **kwargs):
        return virtual_time.run(test(*args, **kwargs))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_virtual_time
async def test_latency_is_paid_there_and_back():
    _, (a, b) = await nodes(2)
    loop = asyncio.get_running_loop()
    assert await ask(a, b) == b"hello"
    assert loop.time() == pytest.approx(0.02)


@in_virtual_time
async def test_bandwidth_is_shared_by_the_messages_of_a_node():
    _, (a, b) = await nodes(2, Faults(latency_s=(0, 0), bandwidth_bytes_per_s=1000))
    await asyncio.gather(*(a.request(b.node_id, "echo", b"x" * 980, max_response_bytes=0, timeout_s=60)
                           for _ in range(3)), return_exceptions=True)  # fmt: skip
    # Three requests of 1,000 bytes leave in turn; the header of each answer takes 11 ms of the peer's own uplink.
    assert asyncio.get_running_loop().time() == pytest.approx(3.011)


@in_virtual_time
async def test_every_byte_is_counted_on_both_sides():
    _, (a, b) = await nodes(2)
    await ask(a, b, b"x" * 100)
    there, back = REQUEST_OVERHEAD_BYTES + len("echo") + 100, ANSWER_OVERHEAD_BYTES + 100
    assert (a.traffic.bytes_out, a.traffic.bytes_in) == (there, back)
    assert (b.traffic.bytes_out, b.traffic.bytes_in) == (back, there)
    assert (a.traffic.num_requests_out, b.traffic.num_requests_in) == (1, 1)
    assert (a.traffic.num_requests_in, b.traffic.num_requests_out) == (0, 0)


@in_virtual_time
async def test_loss_ends_in_a_timeout_at_the_given_rate():
    _, (a, b) = await nodes(2, Faults(loss=0.2))
    outcomes = await asyncio.gather(*(ask(a, b) for _ in range(400)), return_exceptions=True)
    refused = [o for o in outcomes if isinstance(o, RequestRefused)]
    assert {o.code for o in refused} <= {"busy"}
    outcomes = [await_one for await_one in outcomes if not isinstance(await_one, RequestRefused)]
    lost = sum(isinstance(o, RequestTimedOut) for o in outcomes)
    assert all(o == b"hello" or isinstance(o, RequestTimedOut) for o in outcomes)
    assert lost > 0


@in_virtual_time
async def test_loss_is_at_the_given_rate():
    _, (a, b) = await nodes(2, Faults(loss=0.2))
    lost = 0
    for _ in range(1000):
        try:
            await ask(a, b)
        except RequestTimedOut:
            lost += 1
    assert lost == pytest.approx(1000 * (1 - 0.8**2), abs=60)  # four standard deviations


@in_virtual_time
async def test_a_partition_lets_nothing_across_until_it_heals():
    network, (a, b, c) = await nodes(3)
    network.partition([a.node_id, b.node_id], [c.node_id])
    assert await ask(a, b) == b"hello"
    for one, other in ((a, c), (c, b)):
        with pytest.raises(RequestTimedOut):
            await ask(one, other)
    network.heal()
    assert await ask(c, a) == b"hello"


@in_virtual_time
async def test_a_partition_stops_what_is_under_way():
    network, (a, b) = await nodes(2)
    asking = asyncio.create_task(ask(a, b))
    await asyncio.sleep(0.015)  # the response has left
    network.partition([a.node_id], [b.node_id])
    with pytest.raises(RequestTimedOut):
        await asking


@in_virtual_time
async def test_a_killed_node_is_unreachable_and_knows_it():
    network, (a, b) = await nodes(2)
    network.kill(b.node_id)
    with pytest.raises(PeerUnreachable):
        await ask(a, b)
    with pytest.raises(TransportDown):
        await ask(b, a)
    network.revive(b.node_id)
    assert await ask(a, b) == await ask(b, a) == b"hello"
    assert b.traffic.num_restarts == 1


@in_virtual_time
async def test_killing_a_node_ends_its_requests_and_its_answers():
    ended = []

    async def slow(asker, request):
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            ended.append(asker)
            raise

    network, (a, b) = await nodes(2, handler=slow)
    asking = [asyncio.create_task(ask(a, b, timeout_s=50)), asyncio.create_task(ask(b, a, timeout_s=50))]
    await asyncio.sleep(1)
    network.kill(b.node_id)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(o) for o in outcomes] == [PeerUnreachable, TransportDown]
    await asyncio.sleep(1)
    assert sorted(ended) == sorted([a.node_id, b.node_id])
    assert asyncio.get_running_loop().time() < 5


@in_virtual_time
async def test_duplication_reaches_the_handler_twice_and_the_asker_once():
    seen = []

    async def count(asker, request):
        seen.append(request)
        return request

    _, (a, b) = await nodes(2, Faults(duplication=1.0), handler=count)
    assert await ask(a, b) == b"hello"
    await asyncio.sleep(10)
    assert seen == [b"hello"] * 2


@in_virtual_time
async def test_corruption_changes_one_byte():
    _, (a, b) = await nodes(2, Faults(corruption=1.0))
    payload = bytes(1000)
    spoilt = [await ask(a, b, payload) for _ in range(20)]
    assert all(len(s) == 1000 and 1 <= sum(byte != 0 for byte in s) <= 2 for s in spoilt)  # there and back


@in_virtual_time
async def test_reordering_lets_later_messages_overtake():
    order = []

    async def note(asker, request):
        order.append(request)
        return b""

    _, (a, b) = await nodes(2, Faults(latency_s=(0.01, 0.01), reordering=0.3, reordering_s=2.0), handler=note)
    sent = [bytes([number]) for number in range(8)]
    await asyncio.gather(*(ask(a, b, payload) for payload in sent))
    assert sorted(order) == sent
    assert order != sent


@in_virtual_time
async def test_records_survive_the_death_of_some_replicas_and_not_of_all():
    network, transports = await nodes(40)
    now = virtual_clock()()
    assert await transports[0].store(b"key", b"value", now + 120) == NUM_REPLICAS
    expected = [Record(transports[0].node_id, b"value", now + 120)]
    holders = [t for t in transports if b"key" in t._records]
    asker = next(t for t in transports if t not in holders)
    for holder in holders[1:]:
        network.kill(holder.node_id)
    assert await asker.lookup(b"key", timeout_s=5) == expected
    network.kill(holders[0].node_id)
    assert await asker.lookup(b"key", timeout_s=5) == []


@in_virtual_time
async def test_a_partition_parts_the_dht():
    network, transports = await nodes(40)
    left, right = transports[:20], transports[20:]
    network.partition([t.node_id for t in left], [t.node_id for t in right])
    now = virtual_clock()()
    await left[0].store(b"key", b"left", now + 120)
    await right[0].store(b"key", b"right", now + 120)
    assert [r.value for r in await left[1].lookup(b"key", timeout_s=5)] == [b"left"]
    assert [r.value for r in await right[1].lookup(b"key", timeout_s=5)] == [b"right"]
    network.heal()
    await left[0].store(b"key", b"left again", now + 160)
    await right[0].store(b"key", b"right again", now + 160)
    assert {r.value for r in await left[1].lookup(b"key", timeout_s=5)} == {b"left again", b"right again"}


@in_virtual_time
async def test_a_closed_node_may_come_back_as_another_transport():
    network, (a, b) = await nodes(2)
    again = MemoryTransport(network, b.node_id, accept_all)
    with pytest.raises(ValueError, match="close"):
        await again.start()
    await b.close()
    await again.start()
    assert await a.connect(again.addresses[0], timeout_s=1) == b.node_id


def history(seed):
    async def main():
        _, transports = await nodes(20, Faults(loss=0.1, duplication=0.1, corruption=0.1, reordering=0.1), seed=seed)
        rng, lines = random.Random(1), []

        async def one():
            asker, peer = rng.sample(transports, 2)
            try:
                outcome = await ask(asker, peer, rng.randbytes(10))
            except (RequestTimedOut, RequestRefused) as error:
                outcome = str(error)
            lines.append((asyncio.get_running_loop().time(), outcome))

        await asyncio.gather(*(one() for _ in range(300)))
        return lines

    return virtual_time.run(main())


def test_one_seed_is_one_history():
    assert history(1) == history(1)
    assert history(1) != history(2)
