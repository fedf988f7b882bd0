"""The streams of nodes that are joined by pairs of sockets: opened once, kept, closed, opened anew."""

import asyncio

import pytest

from protocol.transport import pace, peer_streams
from protocol.transport.base import PeerUnreachable, TransportDown
from protocol.transport.dispatch import Dispatcher
from protocol.transport.mux import Tally
from protocol.transport.peer_streams import MAX_STREAMS_PER_PEER, PeerStreams


class Nodes:
    """Some nodes, each with its streams; `a` asks, and any can be asked."""

    def __init__(self, stream_pair, names="ab"):
        self.stream_pair = stream_pair
        self.num_opened = 0
        self.may_open = asyncio.Event()
        self.may_open.set()
        self.tallies = {name: Tally() for name in names}
        self.dispatchers = {name: Dispatcher() for name in names}
        self.taking = []
        self.let_go = asyncio.Event()
        for dispatcher in self.dispatchers.values():
            dispatcher.handle("echo", self.echo, 2**20)
            dispatcher.handle("stuck", self.stuck, 2**20)
        self.streams = {
            name: PeerStreams(self.dispatchers[name], self.tallies[name], lambda peer, me=name: self.open(me, peer))
            for name in names
        }

    async def echo(self, asker, request):
        return asker.encode() + request

    async def stuck(self, asker, request):
        await self.let_go.wait()
        return b"free"

    async def open(self, me, peer):
        await self.may_open.wait()
        if peer not in self.streams:
            raise PeerUnreachable(f"nobody is {peer}")
        near, far = await self.stream_pair()
        self.num_opened += 1
        self.taking.append(asyncio.create_task(self.streams[peer].take(me, *far)))
        return near

    def ask(self, peer="b", name="echo", me="a"):
        return self.streams[me].request(peer, name, b"!", 100)

    async def end(self):
        for streams in self.streams.values():
            await streams.end()
        await asyncio.gather(*self.taking)
        for streams, dispatcher in zip(self.streams.values(), self.dispatchers.values(), strict=True):
            assert not streams._tasks
            assert streams.num_taken == 0
            assert dispatcher.num_under_way == 0
            assert dispatcher.failure is None


def in_nodes(names="ab"):
    def wrap(test):
        def run(stream_pair, until, monkeypatch):
            async def main():
                nodes = Nodes(stream_pair, names)
                async with asyncio.timeout(60):
                    await test(nodes, until, monkeypatch)
                    await nodes.end()

            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return wrap


@in_nodes()
async def test_one_stream_serves_all_requests_of_one_side(nodes, until, monkeypatch):
    asked = [nodes.ask() for _ in range(8)]
    assert await asyncio.gather(*asked) == [b"a!"] * 8
    assert await nodes.ask() == b"a!"
    assert nodes.num_opened == 1
    assert await nodes.ask("a", me="b") == b"b!"
    assert nodes.num_opened == 2
    assert nodes.streams["a"].num_own == nodes.streams["a"].num_taken == 1


@in_nodes()
async def test_an_opening_that_fails_fails_all_that_wait_and_is_tried_again(nodes, until, monkeypatch):
    outcomes = await asyncio.gather(*(nodes.ask("c") for _ in range(3)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PeerUnreachable] * 3
    assert nodes.streams["a"].num_own == 0
    nodes.streams["c"] = nodes.streams["b"]
    assert await nodes.ask("c") == b"a!"
    del nodes.streams["c"]


@in_nodes()
async def test_an_opening_ends_when_nobody_waits_for_it(nodes, until, monkeypatch):
    nodes.may_open.clear()
    asking = [asyncio.create_task(nodes.ask()) for _ in range(2)]
    await until(lambda: [own.num_waiting for own in nodes.streams["a"]._own.values()] == [2])
    asking[0].cancel()
    await asyncio.wait({asking[0]})
    nodes.may_open.set()
    assert await asking[1] == b"a!"
    nodes.streams["a"].end_peer("b")
    nodes.may_open.clear()
    asking = asyncio.create_task(nodes.ask())
    await until(lambda: "b" in nodes.streams["a"]._own)
    asking.cancel()
    await asyncio.wait({asking})
    await until(lambda: len(nodes.streams["a"]._tasks) == 1)  # the sweeping alone
    assert nodes.streams["a"].num_own == 0
    nodes.may_open.set()
    assert await nodes.ask() == b"a!"


@in_nodes()
async def test_a_stream_that_has_ended_is_opened_anew(nodes, until, monkeypatch):
    for number in range(1, 4):
        assert await nodes.ask() == b"a!"
        assert nodes.num_opened == number
        nodes.streams["b"]._answerers[0].abort()
        await until(lambda: not nodes.streams["a"].num_own)


@in_nodes()
async def test_a_stream_that_the_peer_closes_costs_no_request(nodes, until, monkeypatch):
    assert await nodes.ask() == b"a!"
    nodes.streams["b"]._answerers[0].close()
    assert await nodes.ask() == b"a!"  # it crosses the closing, and goes another way
    assert nodes.num_opened == 2
    await until(lambda: nodes.streams["b"].num_taken == 1)
    assert nodes.tallies["a"].broken.total() == nodes.tallies["b"].broken.total() == 0


@in_nodes()
async def test_ending_a_peer_fails_what_it_was_asked_and_what_it_asks(nodes, until, monkeypatch):
    asking = [asyncio.create_task(nodes.ask(name="stuck")), asyncio.create_task(nodes.ask("a", "stuck", me="b"))]
    await until(lambda: all(dispatcher.num_under_way == 1 for dispatcher in nodes.dispatchers.values()))
    nodes.streams["a"].end_peer("b")
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PeerUnreachable] * 2
    nodes.may_open.clear()
    asking = asyncio.create_task(nodes.ask())
    await until(lambda: nodes.streams["a"].num_own == 1)
    nodes.streams["a"].end_peer("b")
    with pytest.raises(PeerUnreachable):
        await asking
    nodes.may_open.set()


@in_nodes()
async def test_streams_that_are_idle_for_long_are_closed(nodes, until, monkeypatch):
    monkeypatch.setattr(peer_streams, "IDLE_S", 0.1)
    asking = asyncio.create_task(nodes.ask(name="stuck"))
    await until(lambda: nodes.dispatchers["b"].num_under_way == 1)
    await asyncio.sleep(0.15)
    nodes.streams["a"]._close_idle_own(0, peer_streams.IDLE_S)
    assert nodes.streams["a"].num_own == 1  # it is needed
    nodes.let_go.set()
    assert await asking == b"free"
    nodes.streams["a"]._close_idle_own(0, peer_streams.IDLE_S)
    assert nodes.streams["a"].num_own == 1  # it was needed a moment ago
    await asyncio.sleep(0.15)
    nodes.streams["a"]._close_idle_own(0, peer_streams.IDLE_S)
    assert nodes.streams["a"].num_own == 0
    await until(lambda: nodes.streams["b"].num_taken == 0)
    assert await nodes.ask() == b"a!"
    assert nodes.tallies["a"].broken.total() == nodes.tallies["b"].broken.total() == 0


@in_nodes("abcdefg")
async def test_of_too_many_own_streams_the_one_that_was_idle_longest_is_closed(nodes, until, monkeypatch):
    monkeypatch.setattr(peer_streams, "MAX_OWN_STREAMS", 3)
    for peer in "bcdbefg":
        assert await nodes.ask(peer) == b"a!"
        assert nodes.streams["a"].num_own <= 3
    assert list(nodes.streams["a"]._own) == ["e", "f", "g"]
    await until(lambda: sum(streams.num_taken for streams in nodes.streams.values()) == 3)


@in_nodes("abcdef")
async def test_of_too_many_streams_of_peers_the_one_that_was_idle_longest_is_closed(nodes, until, monkeypatch):
    monkeypatch.setattr(peer_streams, "MAX_STREAMS", 2)
    stuck = asyncio.create_task(nodes.ask("a", "stuck", me="b"))
    await until(lambda: nodes.dispatchers["a"].num_under_way == 1)
    for me in "cdef":
        assert await nodes.ask("a", me=me) == me.encode() + b"!"
        await until(lambda: nodes.streams["a"].num_taken <= 2)
    assert [answerer.asker for answerer in nodes.streams["a"]._answerers] == ["b", "f"]
    late = asyncio.create_task(nodes.ask("a", "stuck", me="f"))
    await until(lambda: nodes.dispatchers["a"].num_under_way == 2)
    with pytest.raises(PeerUnreachable):  # nobody is idle
        await nodes.ask("a", me="c")
    assert nodes.tallies["a"].broken == {"too_many_streams": 1}
    nodes.let_go.set()
    assert await asyncio.gather(stuck, late) == [b"free"] * 2
    assert await nodes.ask("a", me="c") == b"c!"


@in_nodes()
async def test_a_peer_that_opens_more_streams_loses_its_first(nodes, until, monkeypatch):
    near = [await nodes.open("a", "b") for _ in range(MAX_STREAMS_PER_PEER + 3)]
    await until(lambda: nodes.tallies["b"].broken["too_many_streams"] == 3)
    await until(lambda: nodes.streams["b"].num_taken == MAX_STREAMS_PER_PEER)
    for reader, _ in near[:3]:
        assert await reader.read() == b""
    for _, writer in near:
        writer.transport.abort()


@in_nodes()
async def test_a_peer_that_closes_every_stream_is_unreachable(nodes, until, monkeypatch):
    monkeypatch.setattr(pace, "GRACE_S", 0.1)

    async def take(peer, reader, writer):
        await reader.read(1)
        writer.write(bytes.fromhex("07 00000000 0000"))
        await reader.read()
        writer.transport.abort()

    nodes.streams["b"].take = take
    with pytest.raises(PeerUnreachable, match="closes"):
        await nodes.ask()
    assert nodes.num_opened == peer_streams.NUM_ATTEMPTS


@in_nodes()
async def test_what_fails_while_a_stream_is_opened_reaches_who_asks(nodes, until, monkeypatch):
    async def down(me, peer):
        raise TransportDown("p2pd has ended")

    nodes.open = down
    with pytest.raises(TransportDown):
        await nodes.ask()
    assert nodes.dispatchers["a"].failure is None


@in_nodes()
async def test_a_bug_in_the_work_of_a_stream_is_loud(nodes, until, monkeypatch):
    async def buggy(me, peer):
        raise KeyError("bug")

    nodes.open = buggy
    with pytest.raises(KeyError):
        await nodes.ask()
    assert isinstance(nodes.dispatchers["a"].failure, KeyError)
    nodes.dispatchers["a"].failure = None
