"""p2pd as a process: killed, hung, orphaned, started where its port is taken; clocks that are wrong."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path

import psutil
import pytest

from protocol.identity import Identity
from protocol.transport.base import PeerUnreachable, RequestRefused, RequestTimedOut, TransportDown, TransportError
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.peer_id import node_id_of_peer, peer_id_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
LOCAL = "/ip4/127.0.0.1/tcp/0"
PEER = Path(__file__).with_name("hivemind_peer.py")


class Peer:
    """A `hivemind_peer.py` process."""

    def __init__(self, key: Path, *listen: str, temporary: Path, clock_error_s: float = 0):
        self.process = subprocess.Popen(
            [sys.executable, PEER, key, str(clock_error_s), *(listen or (LOCAL,))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PEER.parents[2]), "TMPDIR": str(temporary)},
        )

    @cached_property
    def first_line(self):
        return self.process.stdout.readline().strip()  # read late, so that two that are made in a row start together

    @property
    def addresses(self):
        return self.first_line.split()

    @property
    def node_id(self):
        return node_id_of_peer(self.addresses[0].rsplit("/", 1)[1])

    def tell(self, line):
        assert self.first_line
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def end(self):
        assert self.first_line
        out, err = self.process.communicate(timeout=30)
        return out, err, self.process.returncode


@pytest.fixture
def temporary():
    """Where peers put what is temporary: a short path, since sockets have no others."""
    with tempfile.TemporaryDirectory(prefix="sn-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def peers(tmp_path, temporary):
    made = []

    def make(name, *listen, clock_error_s=0):
        made.append(Peer(tmp_path / name, *listen, temporary=temporary, clock_error_s=clock_error_s))
        return made[-1]

    yield make
    for peer in made:
        if peer.process.poll() is None:
            peer.process.kill()
        peer.process.communicate()


def until(condition, timeout_s):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def test_a_killed_node_frees_its_ports_and_returns_as_itself(peers):
    a, b = peers("a"), peers("b", LOCAL, "/ip4/127.0.0.1/udp/0/quic-v1")
    address, node_id = b.addresses[0], b.node_id
    assert a.tell(f"connect {address}") == node_id
    daemon = psutil.Process(int(b.tell("daemon")))
    assert daemon.is_running()
    b.process.kill()
    listen = [part.split("/p2p/")[0] for part in b.addresses]
    began = time.monotonic()
    again = peers("b", *listen)
    assert again.addresses == b.addresses
    until(lambda: a.tell(f"ask {node_id}") == "hello", 15)
    assert time.monotonic() - began < 15
    assert not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE


def test_a_daemon_that_hangs_is_replaced(peers):
    a, b = peers("a"), peers("b")
    assert a.tell(f"connect {b.addresses[0]}") == b.node_id
    assert b.tell(f"ask {a.node_id}") == "hello"
    daemon = b.tell("daemon")
    assert b.tell("stop_daemon") == "stopped"
    until(lambda: b.tell("daemon") not in (daemon, "down"), 30)
    until(lambda: b.tell(f"ask {a.node_id}") == "hello", 15)
    assert not psutil.pid_exists(int(daemon))


def test_nothing_is_printed_and_nothing_is_left_behind(peers, temporary):
    a, b = peers("a"), peers("b")
    assert a.tell(f"connect {b.addresses[0]}") == b.node_id
    assert a.tell("store hello") == "2"
    assert b.tell("lookup") == "hello"
    daemon = int(b.tell("daemon"))
    os.kill(daemon, signal.SIGKILL)
    until(lambda: b.tell("daemon") not in (str(daemon), "down"), 15)
    assert a.tell(f"connect /ip4/127.0.0.1/tcp/9/p2p/{peer_id_of('a' * 52)}").startswith("PeerUnreachable: ")
    assert a.end() == ("", "", 0)
    assert b.end() == ("", "", 0)
    assert list(temporary.iterdir()) == []


def test_clocks_that_differ_by_two_seconds_work(peers):
    a, early, late = peers("a"), peers("early", clock_error_s=-2), peers("late", clock_error_s=2)
    assert a.tell(f"connect {early.addresses[0]}") == early.node_id
    assert late.tell(f"connect {a.addresses[0]}") == a.node_id
    assert [peer.tell(f"store of_{name}") for name, peer in (("a", a), ("early", early), ("late", late))] == ["3"] * 3
    assert [peer.tell("lookup") for peer in (a, early, late)] == ["of_a of_early of_late"] * 3


def test_clocks_that_differ_by_five_minutes_are_named(peers):
    a, slow, fast = peers("a"), peers("slow", clock_error_s=-300), peers("fast", clock_error_s=300)
    for asker, peer, side in (
        (a, slow, "behind"), (slow, a, "ahead of"), (a, fast, "ahead of"), (fast, a, "behind"),
    ):  # fmt: skip
        expected = f"ClockSkewed: the peer's clock is 300 s {side} this node's: set the one that is wrong"
        while "dial backoff" in (answer := asker.tell(f"connect {peer.addresses[0]}")):
            time.sleep(1)  # a ping back met the peer hanging up: libp2p then dials it no more for some seconds
        assert answer.startswith(expected)
    assert [peer.tell("store alone") for peer in (a, slow, fast)] == ["1"] * 3  # all live on


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_port_that_is_taken_is_one_line_with_the_fix(peers, kind):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == "tcp":
            taken.listen()
        port = taken.getsockname()[1]
        address = f"/ip4/127.0.0.1/tcp/{port}" if kind == "tcp" else f"/ip4/127.0.0.1/udp/{port}/quic-v1"
        peer = peers("a", LOCAL, address)
        expected = f"TransportError: cannot listen on {address}: Address already in use; stop what uses the port"
        assert peer.first_line.startswith(expected)
        assert peer.end() == ("", "", 0)


def transport(folder, **settings):
    settings = HivemindSettings(**{"listen": (LOCAL,), "nat_port_map": False, "auto_nat": False, **settings})
    identity = Identity.load_or_create(folder / "identity.pem")
    return HivemindTransport(identity, lambda key, owner, value, expires_at, now: True, settings)


@pytest.mark.parametrize(
    "listen",
    [(), ("localhost:7000",), ("/ip4/127.0.0.1/tcp/70000",), ("/ip4/127.0.0.300/tcp/0",), ("/ip6/127.0.0.1/tcp/0",),
     ("/ip4/127.0.0.1/udp/0/quic",), ("/ip4/203.0.113.7/tcp/0",)],
)  # fmt: skip
def test_where_nobody_can_listen(tmp_path, listen, monkeypatch):
    monkeypatch.setattr("protocol.transport.ports._PORT_TIMEOUT_S", 0.1)
    with pytest.raises(TransportError, match="listen") as error:
        asyncio.run(transport(tmp_path, listen=listen).start())
    assert "\n" not in str(error.value)


def test_settings_that_p2pd_refuses_are_one_line(tmp_path):
    with pytest.raises(TransportError, match="p2pd does not start") as error:
        asyncio.run(transport(tmp_path, trusted_relays=("/ip4/1.2.3.4",), auto_relay=True).start())
    assert "\n" not in str(error.value)


def test_relay_settings_and_announced_addresses_reach_p2pd(tmp_path):
    async def main():
        node = transport(tmp_path, announce=("/ip4/198.51.100.7/tcp/7000",), auto_relay=True, relay=True)
        await node.start()
        command = psutil.Process(node._session.daemon._child.pid).cmdline()
        addresses = node.addresses
        await node.close()
        return command, addresses, node.node_id

    command, addresses, node_id = asyncio.run(main())
    assert {"-autoRelay=1", "-relay=1", "-natPortMap=0", "-autonat=0"} <= set(command)
    assert addresses == (f"/ip4/198.51.100.7/tcp/7000/p2p/{peer_id_of(node_id)}",)


def test_dead_bootstraps_do_not_keep_a_node_from_starting(tmp_path):
    async def main():
        a, b = transport(tmp_path / "a"), transport(tmp_path / "b")
        await a.start()
        for port in (9, 11):
            with pytest.raises((PeerUnreachable, RequestTimedOut)):
                await a.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id_of('a' * 52)}", timeout_s=3)
        assert await a.store(b"key", b"alone", time.time() + 60) == 1
        await b.start()
        await a.connect(b.addresses[0], timeout_s=10)
        assert await a.store(b"key", b"together", time.time() + 62) == 2
        await a.close()
        await b.close()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asyncio.run(main())


def test_requests_under_way_fail_when_the_daemon_is_killed(tmp_path):
    async def main():
        a, b = transport(tmp_path / "a"), transport(tmp_path / "b")

        async def stuck(asker, request):
            await asyncio.Event().wait()

        b.handle("stuck", stuck, max_request_bytes=10)
        await a.start()
        await b.start()
        await a.connect(b.addresses[0], timeout_s=10)
        asking = [
            asyncio.create_task(a.request(b.node_id, "stuck", b"", max_response_bytes=0, timeout_s=30)) for _ in "123"
        ]
        async with asyncio.timeout(10):
            while b._dispatcher.num_under_way < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        killed_at = time.monotonic()
        os.kill(a._session.daemon._child.pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(outcome, TransportDown) for outcome in outcomes), outcomes
        assert time.monotonic() - killed_at < 5
        await a.close()  # in the middle of the restart
        await b.close()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    asyncio.run(main())


def test_many_requests_over_one_connection_leave_nothing_behind(tmp_path):
    """More than the streams that libp2p lets one connection have, answered and refused."""

    async def main():
        a, b = transport(tmp_path / "a"), transport(tmp_path / "b")

        async def even(asker, request):
            if request[0] % 2:
                raise RequestRefused("odd")
            return request

        b.handle("even", even, max_request_bytes=10)
        await a.start()
        await b.start()
        await a.connect(b.addresses[0], timeout_s=10)
        processes = [psutil.Process(), *(psutil.Process(node._session.daemon._child.pid) for node in (a, b))]
        before = [process.num_fds() for process in processes]
        for number in range(1000):
            with contextlib.suppress(RequestRefused):
                await a.request(b.node_id, "even", bytes([number % 256]), max_response_bytes=1, timeout_s=10)
        async with asyncio.timeout(10):
            while not b._session.streams._answerers[0].is_idle:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        after = [process.num_fds() for process in processes]
        await a.close()
        await b.close()
        return before, after

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    before, after = asyncio.run(main())
    assert all(late <= early + 10 for early, late in zip(before, after, strict=True)), (before, after)


def test_it_runs_on_the_callers_loop_and_on_uvloop(tmp_path):
    uvloop = pytest.importorskip("uvloop")

    async def main():
        node = transport(tmp_path)
        await node.start()
        stored = await node.store(b"key", b"value", time.time() + 60)
        await node.close()
        return stored, type(asyncio.get_running_loop()).__module__

    assert asyncio.run(main()) == (1, "asyncio.unix_events")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == (1, "uvloop")
