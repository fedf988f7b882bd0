"""Every transport is held to this. A new one is added by naming it in `KINDS`.

hivemind and libp2p cannot be in one process: tests marked `libp2p` run in a call of pytest of their own (`make test`).
"""

import asyncio
import functools
import os
import random
import signal
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from protocol.identity import Identity
from protocol.transport import virtual_time
from protocol.transport.base import (
    MAX_BROADCAST_BYTES,
    MAX_FRAME_BYTES,
    MAX_RECORD_VALUE_BYTES,
    Judgement,
    PeerUnreachable,
    RequestRefused,
    RequestTimedOut,
    ResponseTooLarge,
    TransportDown,
    TransportError,
)
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport
from protocol.transport.peer_id import peer_id_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
TIMEOUT_S = 20.0  # for what must succeed, on a busy machine


@dataclass
class Kind:
    """How the suite makes and breaks the transports of one kind. One object lives for one test."""

    folder: object  # where identities are kept
    clock_offset_s: float = 0.0

    name = ""

    def clock(self):
        return time.time() + self.clock_offset_s

    def identity(self):
        return Identity.create(self.folder / f"{len(os.listdir(self.folder))}.pem")


class MemoryKind(Kind):
    name = "memory"
    run = staticmethod(virtual_time.run)
    dead_address = f"/memory/p2p/{peer_id_of('a' * 52)}"
    network = None

    def make(self, validator, **limits):
        if self.network is None:
            self.network = MemoryNetwork(random.Random(0), Faults(latency_s=(0.001, 0.003)), self.clock)
        return MemoryTransport(self.network, self.identity().node_id, validator, **limits)

    async def break_carrier(self, node):
        self.network.kill(node.node_id)
        with pytest.raises(TransportDown):
            await node.lookup(b"key", timeout_s=1)
        self.network.revive(node.node_id)


class HivemindKind(Kind):
    name = "hivemind"
    run = staticmethod(asyncio.run)
    dead_address = f"/ip4/127.0.0.1/tcp/9/p2p/{peer_id_of('a' * 52)}"
    settings = HivemindSettings(
        listen=("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"), nat_port_map=False, auto_nat=False
    )

    def make(self, validator, **limits):
        return HivemindTransport(self.identity(), validator, self.settings, clock=self.clock, **limits)

    async def break_carrier(self, node):
        daemon = node._session.daemon
        self.kill(daemon)
        async with asyncio.timeout(5):  # in which it must be noticed
            while node._session is not None and node._session.daemon is daemon:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        with pytest.raises(TransportDown):
            await node.lookup(b"key", timeout_s=1)
        async with asyncio.timeout(15):
            while node._session is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def kill(self, daemon):
        os.kill(daemon._child.pid, signal.SIGKILL)


class Libp2pKind(HivemindKind):
    name = "libp2p"
    settings = Libp2pSettings(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)

    def make(self, validator, **limits):
        return Libp2pTransport(self.identity(), validator, self.settings, clock=self.clock, **limits)

    def kill(self, daemon):
        async def fail():
            raise RuntimeError("killed by a test")

        thread = daemon._thread
        thread._on_trio(lambda: thread.spawn(fail))


KINDS = {kind.name: kind for kind in (MemoryKind, HivemindKind, Libp2pKind)}


@pytest.fixture(params=["memory", "hivemind", pytest.param("libp2p", marks=pytest.mark.libp2p)])
def kind(request, tmp_path):
    return KINDS[request.param](tmp_path)


def contract(test):
    """Run an async test on the loop that its kind of transport lives on."""

    @functools.wraps(test)
    def run(kind):
        kind.run(test(kind))

    del run.__wrapped__  # pytest would call the coroutine function that it finds there
    return run


def accept_all(key, owner, value, expires_at, now):
    return True


async def echo(asker, request):
    return request


@asynccontextmanager
async def started(kind, *handlers, validator=accept_all, **limits):
    """One node that answers `echo`, and more under the names of the functions given."""
    node = kind.make(validator, **limits)
    for handler in (echo, *handlers):
        node.handle(handler.__name__, handler, max_request_bytes=MAX_FRAME_BYTES)
    await node.start()
    try:
        yield node
    finally:
        await node.close()


@asynccontextmanager
async def pair(kind, *handlers, **kwargs):
    """Two nodes, the first of which has connected to the second."""
    async with started(kind, *handlers, **kwargs) as a, started(kind, *handlers, **kwargs) as b:
        await a.connect(b.addresses[0], timeout_s=TIMEOUT_S)
        yield a, b


def ask(asker, peer, payload=b"hello", name="echo", max_response_bytes=MAX_FRAME_BYTES, timeout_s=TIMEOUT_S):
    return asker.request(peer.node_id, name, payload, max_response_bytes=max_response_bytes, timeout_s=timeout_s)


def now_s():
    return asyncio.get_running_loop().time()


# Who is who


@contract
async def test_the_identity_is_the_nodes(kind):
    async with started(kind) as node:
        assert node.name == kind.name
        assert node.addresses
        assert all(address.endswith(f"/p2p/{peer_id_of(node.node_id)}") for address in node.addresses)


@contract
async def test_a_connection_serves_both_ways_and_proves_who_asks(kind):
    askers = []

    async def who(asker, request):
        askers.append(asker)
        return asker.encode()

    async with started(kind, who) as a, started(kind, who) as b:
        for address in b.addresses:
            assert await a.connect(address, timeout_s=TIMEOUT_S) == b.node_id
        assert await ask(a, b, name="who") == a.node_id.encode()
        assert await ask(b, a, name="who") == b.node_id.encode()
    assert askers == [a.node_id, b.node_id]


@contract
async def test_a_peer_of_a_peer_is_found(kind):
    async with started(kind) as a, started(kind) as b, started(kind) as c:
        await a.connect(b.addresses[0], timeout_s=TIMEOUT_S)
        await c.connect(b.addresses[-1], timeout_s=TIMEOUT_S)
        assert await ask(a, c) == b"hello"


@contract
async def test_text_that_is_no_address_is_a_value_error(kind):
    async with started(kind) as node:
        for text in ("", "example.org", "/ip4/1.2.3.4/tcp/1", node.addresses[0][:-5], "/p2p/" + "1" * 52, "/x" * 999):
            with pytest.raises(ValueError, match="address"):
                await node.connect(text, timeout_s=1)
        with pytest.raises(ValueError, match="own"):
            await node.connect(node.addresses[0], timeout_s=1)


@contract
async def test_an_address_where_nobody_listens(kind):
    async with started(kind) as node:
        began_s = now_s()
        with pytest.raises((PeerUnreachable, RequestTimedOut)):
            await node.connect(kind.dead_address, timeout_s=3)
        assert now_s() - began_s < 5


@contract
async def test_an_address_of_another_node_is_not_believed(kind):
    async with started(kind) as a, started(kind) as b:
        other = b.addresses[0].replace(peer_id_of(b.node_id), peer_id_of("a" * 52))
        with pytest.raises((PeerUnreachable, RequestTimedOut)):
            await a.connect(other, timeout_s=3)


@contract
async def test_a_node_that_nobody_knows(kind):
    async with pair(kind) as (a, _):
        for node_id in ("a" * 52, "not a node id"):
            with pytest.raises((PeerUnreachable, RequestTimedOut)):
                await a.request(node_id, "echo", b"", max_response_bytes=10, timeout_s=2)


# Requests and their limits

KIB, MIB = 2**10, 2**20
SIZES = [0, 1, *(size + more for size in (60 * KIB, 64 * KIB, MIB) for more in (-1, 0, 1)), 4 * MIB - 1, 4 * MIB]


@contract
async def test_requests_and_responses_arrive_whole_up_to_the_cap(kind):
    async with pair(kind) as (a, b):
        for size in SIZES:
            payload = random.Random(size).randbytes(size)
            assert await ask(a, b, payload) == payload
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, bytes(4 * MIB + 1))
        assert refusal.value.code == "too_large"


@contract
async def test_a_request_over_the_handlers_cap_is_refused_and_not_handled(kind):
    calls = []

    async def small(asker, request):
        calls.append(len(request))
        return b""

    a, b = kind.make(accept_all), kind.make(accept_all)
    b.handle("small", small, max_request_bytes=100)
    await a.start()
    await b.start()
    await a.connect(b.addresses[0], timeout_s=TIMEOUT_S)
    for size in (101, 100 * KIB, 4 * MIB):
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, bytes(size), name="small")
        assert refusal.value.code == "too_large"
    await ask(a, b, bytes(100), name="small")
    assert calls == [100]
    await a.close()
    await b.close()


@contract
async def test_a_response_over_the_askers_cap_is_not_read(kind):
    async with pair(kind) as (a, b):
        for size in (100, 1 * MIB):
            assert len(await ask(a, b, bytes(size), max_response_bytes=size)) == size
            before = a.traffic.bytes_in
            with pytest.raises(ResponseTooLarge):
                await ask(a, b, bytes(size), max_response_bytes=size - 1)
            assert a.traffic.bytes_in - before < size


@contract
async def test_a_name_that_has_no_handler(kind):
    async with pair(kind) as (a, b):
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, name="nothing")
        assert refusal.value.code == "unknown_name"
        for name in ("", "Upper", "a" * 33, "a-b", "é"):
            with pytest.raises(ValueError, match="name"):
                await ask(a, b, name=name)


@contract
async def test_a_refusal_says_why(kind):
    async def picky(asker, request):
        raise RequestRefused("not_today", "because " + request.decode())

    async with pair(kind, picky) as (a, b):
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, "of Ünicode".encode(), name="picky")
        assert (refusal.value.code, refusal.value.detail) == ("not_today", "because of Ünicode")
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, "ü".encode() * 500, name="picky")
        assert refusal.value.detail == ("because " + "ü" * 500)[:200]


@contract
async def test_requests_side_by_side_do_not_mix(kind):
    async def slowly(asker, request):
        await asyncio.sleep(random.Random(request).random() / 20)
        return request

    async with pair(kind, slowly) as (a, b):
        payloads = [random.Random(number).randbytes(50_000) for number in range(8)]
        there = [ask(a, b, payload, name="slowly") for payload in payloads]
        back = [ask(b, a, payload, name="slowly") for payload in payloads]
        assert await asyncio.gather(*there, *back) == payloads * 2


class Stuck:
    """A handler that answers when it is let go, and notes what became of it."""

    def __init__(self):
        self.num_running = self.num_cancelled = 0
        self.free = asyncio.Event()

    async def stuck(self, asker, request):
        self.num_running += 1
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        return b"free"

    async def until(self, condition):
        async with asyncio.timeout(TIMEOUT_S):
            while not condition(self):  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@contract
async def test_a_peer_that_does_not_answer_is_timed_out_and_let_go(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck) as (a, b):
        began_s = now_s()
        with pytest.raises(RequestTimedOut):
            await ask(a, b, name="stuck", timeout_s=0.3)
        assert 0.29 < now_s() - began_s < 3
        await handler.until(lambda h: h.num_cancelled == 1)
        assert handler.num_running == 0


@contract
async def test_cancelling_a_request_frees_what_it_held(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck, max_requests=2) as (a, b):
        for _ in range(5):
            asking = [asyncio.create_task(ask(a, b, name="stuck")) for _ in range(2)]
            await handler.until(lambda h: h.num_running == 2)
            for task in asking:
                task.cancel()
            await handler.until(lambda h: h.num_running == 0)
        assert handler.num_cancelled == 10
        assert await ask(a, b) == b"hello"


@contract
async def test_one_asker_has_only_so_many_places(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck, max_requests_per_asker=3) as (a, b), started(kind) as c:
        await c.connect(b.addresses[0], timeout_s=TIMEOUT_S)
        asking = [asyncio.create_task(ask(a, b, name="stuck")) for _ in range(3)]
        await handler.until(lambda h: h.num_running == 3)
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b)
        assert refusal.value.code == "busy"
        assert await ask(c, b) == b"hello"
        handler.free.set()
        assert await asyncio.gather(*asking) == [b"free"] * 3
        assert await ask(a, b) == b"hello"


@contract
async def test_all_askers_together_have_only_so_many_places(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck, max_requests=2) as (a, b), started(kind) as c:
        await c.connect(b.addresses[0], timeout_s=TIMEOUT_S)
        asking = [asyncio.create_task(ask(node, b, name="stuck")) for node in (a, c)]
        await handler.until(lambda h: h.num_running == 2)
        for node in (a, c):
            with pytest.raises(RequestRefused) as refusal:
                await ask(node, b)
            assert refusal.value.code == "busy"
        handler.free.set()
        assert await asyncio.gather(*asking) == [b"free"] * 2


# Bugs, departures


@contract
async def test_a_bug_in_a_handler_is_loud(kind):
    async def buggy(asker, request):
        raise KeyError("bug")

    async with pair(kind, buggy) as (a, b):
        failing = asyncio.create_task(b.wait_failed())
        await asyncio.sleep(0)
        assert await ask(a, b) == b"hello"
        assert not failing.done()
        with pytest.raises(RequestRefused) as refusal:
            await ask(a, b, name="buggy")
        assert refusal.value.code == "handler_failed"
        with pytest.raises(KeyError, match="bug"):
            await asyncio.wait_for(failing, TIMEOUT_S)


@contract
async def test_a_response_that_is_too_large_to_be_sent_is_a_bug(kind):
    async def huge(asker, request):
        return bytes(MAX_FRAME_BYTES + 1)

    async with pair(kind, huge) as (a, b):
        with pytest.raises(RequestRefused):
            await ask(a, b, name="huge")
        with pytest.raises(ValueError, match="4194304"):
            await asyncio.wait_for(b.wait_failed(), TIMEOUT_S)


@contract
async def test_a_disconnected_peer_stays_out_until_it_is_connected_to_again(kind):
    async with pair(kind) as (a, b):
        await a.disconnect(b.node_id)
        for asker, peer in ((a, b), (b, a)):
            with pytest.raises(PeerUnreachable):
                await ask(asker, peer)
        with pytest.raises((PeerUnreachable, RequestTimedOut)):
            await b.connect(a.addresses[0], timeout_s=3)
        await a.connect(b.addresses[0], timeout_s=TIMEOUT_S)
        assert await ask(a, b) == await ask(b, a) == b"hello"


@contract
async def test_disconnecting_ends_what_the_peer_was_asking(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck) as (a, b):
        asking = asyncio.create_task(ask(a, b, name="stuck"))
        await handler.until(lambda h: h.num_running == 1)
        await b.disconnect(a.node_id)
        with pytest.raises(PeerUnreachable):
            await asking
        assert handler.num_running == 0


@contract
async def test_closing_ends_what_is_under_way_on_both_sides(kind):
    handler = Stuck()
    async with pair(kind, handler.stuck) as (a, b):
        asking = [asyncio.create_task(ask(a, b, name="stuck")), asyncio.create_task(ask(b, a, name="stuck"))]
        await handler.until(lambda h: h.num_running == 2)
        await a.close()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [TransportDown, PeerUnreachable]
        await handler.until(lambda h: h.num_running == 0)


@contract
async def test_a_closed_transport_says_so_and_closes_once(kind):
    async with pair(kind) as (a, b):
        await a.close()
        await a.close()
        with pytest.raises(TransportDown):
            await ask(a, b)
        with pytest.raises(TransportDown):
            await a.connect(b.addresses[0], timeout_s=1)
        with pytest.raises(TransportDown):
            await a.lookup(b"key", timeout_s=1)
        with pytest.raises(TransportDown):
            await a.store(b"key", b"value", kind.clock() + 60)
        with pytest.raises((PeerUnreachable, RequestTimedOut)):
            await ask(b, a, timeout_s=3)


@contract
async def test_a_transport_starts_once_and_learns_its_handlers_before(kind):
    async with started(kind) as node:
        with pytest.raises(RuntimeError):
            await node.start()
        with pytest.raises(RuntimeError):
            node.handle("late", echo, max_request_bytes=1)
    fresh = kind.make(accept_all)
    fresh.handle("echo", echo, max_request_bytes=1)
    for name, cap in (("echo", 1), ("Not a name", 1), ("large", MAX_FRAME_BYTES + 1)):
        with pytest.raises(ValueError, match=r"handler|name|most"):
            fresh.handle(name, echo, max_request_bytes=cap)
    with pytest.raises(TransportDown):
        await fresh.request("a" * 52, "echo", b"", max_response_bytes=1, timeout_s=1)
    await fresh.close()


@contract
async def test_what_carries_the_bytes_dies_and_comes_back(kind):
    async with pair(kind) as (a, b):
        addresses = b.addresses
        await kind.break_carrier(b)
        assert b.traffic.num_restarts == 1
        assert b.addresses == addresses

        async def within_15_s(work):
            async with asyncio.timeout(15):
                while True:
                    with suppress(TransportError):
                        if await work():
                            return
                    await asyncio.sleep(0.05)

        await within_15_s(lambda: ask(a, b, timeout_s=5))
        await within_15_s(lambda: ask(b, a, timeout_s=5))
        expires_at = kind.clock() + 60

        async def both_hold():
            nonlocal expires_at
            expires_at += 1
            return await b.store(b"key", b"after", expires_at) == 2

        await within_15_s(both_hold)
        assert [record.value for record in await a.lookup(b"key", timeout_s=5)] == [b"after"]


@contract
async def test_every_byte_is_counted(kind):
    async with pair(kind) as (a, b):
        before_a, before_b = a.traffic, b.traffic
        await ask(a, b, bytes(100_000))
        await ask(b, a, bytes(10))
        header = 7 + 9 + len("echo") + 7 + 4  # of a request and of an answer; a large body has more of the 7
        for node, before in ((a, before_a), (b, before_b)):
            after = node.traffic
            assert after.num_requests_in - before.num_requests_in == 1
            assert after.num_requests_out - before.num_requests_out == 1
            for num_bytes in (after.bytes_in - before.bytes_in, after.bytes_out - before.bytes_out):
                assert 100_010 + header <= num_bytes < 101_500  # the rest is the DHT's own upkeep


# Broadcasts


class Ears:
    """What a node hears, and what it says of it."""

    def __init__(self):
        self.heard = []
        self.judgement = Judgement.ACCEPT

    def judge(self, teller, message):
        self.heard.append((teller, message))
        return self.judgement

    async def until(self, num):
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.heard) < num:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def chain(kind):
    """Three nodes, each connected to the next, with what they hear; None where the transport has no broadcasts."""
    nodes, ears = [kind.make(accept_all) for _ in range(3)], [Ears() for _ in range(3)]
    for node, each in zip(nodes, ears, strict=True):
        node.hear(each.judge)
        await node.start()
    try:
        if not nodes[0].broadcasts:
            with pytest.raises(NotImplementedError):
                await nodes[0].broadcast(b"hello")
            yield None
            return
        for node, other in ((nodes[0], nodes[1]), (nodes[2], nodes[1])):
            await node.connect(other.addresses[0], timeout_s=TIMEOUT_S)
        await nodes[2].disconnect(nodes[0].node_id)  # the DHT has made them meet
        async with asyncio.timeout(TIMEOUT_S):
            while True:  # until the topic knows of everybody
                await nodes[0].broadcast(b"are you there?")
                await asyncio.sleep(0.1)
                if ears[2].heard:
                    break
                for each in ears:
                    each.judgement = Judgement.ACCEPT
                await nodes[1].broadcast(random.randbytes(8))
        for each in ears:
            each.heard.clear()
        yield nodes, ears
    finally:
        for node in nodes:
            await node.close()


@contract
async def test_what_is_accepted_is_passed_on_and_heard_once(kind):
    async with chain(kind) as swarm:
        if swarm is None:
            return
        nodes, ears = swarm
        for number in range(5):
            await nodes[0].broadcast(b"news %d" % number)
        await ears[2].until(5)
        assert [message for _, message in ears[1].heard] == [b"news %d" % number for number in range(5)]
        assert {teller for teller, _ in ears[1].heard} == {nodes[0].node_id}
        assert {teller for teller, _ in ears[2].heard} == {nodes[1].node_id}
        await nodes[1].broadcast(b"news 3")  # said again, by another: it is known
        await nodes[1].broadcast(b"more")
        await ears[2].until(6)
        assert [message for _, message in ears[2].heard][-1] == b"more"
        assert not ears[0].heard or ears[0].heard == [(nodes[1].node_id, b"more")]


@pytest.mark.parametrize("judgement", [Judgement.IGNORE, Judgement.REJECT])
def test_what_is_not_accepted_is_not_passed_on(kind, judgement):
    async def run():
        async with chain(kind) as swarm:
            if swarm is None:
                return
            nodes, ears = swarm
            ears[1].judgement = judgement
            await nodes[0].broadcast(b"no")
            await ears[1].until(1)
            ears[1].judgement = Judgement.ACCEPT
            await nodes[0].broadcast(b"yes")
            await ears[2].until(1)
            assert [message for _, message in ears[2].heard] == [b"yes"]

    kind.run(run())


@contract
async def test_a_broadcast_that_is_too_large_is_refused(kind):
    async with chain(kind) as swarm:
        if swarm is None:
            return
        nodes, ears = swarm
        with pytest.raises(ValueError, match=str(MAX_BROADCAST_BYTES)):
            await nodes[0].broadcast(bytes(MAX_BROADCAST_BYTES + 1))
        largest = random.Random(0).randbytes(MAX_BROADCAST_BYTES)
        await nodes[0].broadcast(largest)
        await ears[2].until(1)
        assert [message for _, message in ears[2].heard] == [largest]


@contract
async def test_a_judge_that_fails_is_a_bug(kind):
    async with chain(kind) as swarm:
        if swarm is None:
            return
        nodes, ears = swarm
        del ears[1].judgement
        await nodes[0].broadcast(b"hello")
        with pytest.raises(AttributeError):
            await asyncio.wait_for(nodes[1].wait_failed(), TIMEOUT_S)


# Records


@contract
async def test_a_record_is_found_by_others_under_its_owner(kind):
    async with pair(kind) as (a, b):
        expires_at = kind.clock() + 60
        assert await a.store(b"key", b"one", expires_at) == 2
        assert await b.store(b"key", b"two", expires_at + 1) == 2
        assert await b.store(b"other key", b"three", expires_at) == 2
        for node in (a, b):
            found = {
                record.owner: (record.value, record.expires_at) for record in await node.lookup(b"key", timeout_s=5)
            }
            assert found == {a.node_id: (b"one", expires_at), b.node_id: (b"two", expires_at + 1)}
        assert await a.lookup(b"no such key", timeout_s=5) == []


@contract
async def test_a_record_replaces_its_owners_earlier_one_and_expires(kind):
    async with pair(kind) as (a, b):
        await a.store(b"key", b"old", kind.clock() + 60)
        await a.store(b"key", b"new", kind.clock() + 90)
        assert [record.value for record in await b.lookup(b"key", timeout_s=5)] == [b"new"]
        kind.clock_offset_s = 89
        assert len(await b.lookup(b"key", timeout_s=5)) == 1
        kind.clock_offset_s = 91
        assert await b.lookup(b"key", timeout_s=5) == []


@contract
async def test_a_node_alone_holds_its_own_record(kind):
    async with started(kind) as node:
        assert await node.store(b"key", b"value", kind.clock() + 60) == 1
        assert [record.value for record in await node.lookup(b"key", timeout_s=5)] == [b"value"]


@contract
async def test_the_validator_is_asked_by_the_owner_and_by_who_looks(kind):
    def no_lies(key, owner, value, expires_at, now):
        assert key == b"key"
        return value != b"lie" and now < expires_at

    async with started(kind) as liar, started(kind, validator=no_lies) as honest:
        await honest.connect(liar.addresses[0], timeout_s=TIMEOUT_S)
        with pytest.raises(ValueError, match="validator"):
            await honest.store(b"key", b"lie", kind.clock() + 60)
        await liar.store(b"key", b"lie", kind.clock() + 60)
        assert await honest.lookup(b"key", timeout_s=5) == []
        await liar.store(b"key", b"truth", kind.clock() + 70)
        assert [record.value for record in await honest.lookup(b"key", timeout_s=5)] == [b"truth"]


@contract
async def test_a_record_has_a_largest_size(kind):
    async with pair(kind) as (a, b):
        with pytest.raises(ValueError, match="1024"):
            await a.store(b"key", bytes(MAX_RECORD_VALUE_BYTES + 1), kind.clock() + 60)
        largest = random.Random(0).randbytes(MAX_RECORD_VALUE_BYTES)
        assert await a.store(b"key", largest, kind.clock() + 60) == 2
        assert [record.value for record in await b.lookup(b"key", timeout_s=5)] == [largest]


@contract
async def test_many_owners_share_a_key(kind):
    async with started(kind) as first:
        others = [kind.make(accept_all) for _ in range(5)]
        for node in others:
            await node.start()
            await node.connect(first.addresses[0], timeout_s=TIMEOUT_S)
        for number, node in enumerate(others):
            assert await node.store(b"key", bytes([number]), kind.clock() + 60) == 6
        for node in (first, *others):
            assert {record.owner for record in await node.lookup(b"key", timeout_s=5)} == {o.node_id for o in others}
        for node in others:
            await node.close()
