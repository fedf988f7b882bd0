"""Real nodes over real sockets: they train on each other's groups, are killed and come back, and tell what they do."""

import json
import signal
import socket
import time

import pytest

from node.control import NoStatus, read_status
from protocol.identity import Identity
from protocol.transport.peer_id import peer_id_of

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
HEARD_AGAIN_WITHIN_S = 15.0  # from when it listens; loading torch and the model before takes 5 s on an idle machine


def wait_for(process, happened, what, timeout_s=90.0):
    """Wait until something has happened; fail if the process ends or the time is over first. Returns what it was."""
    deadline = time.monotonic() + timeout_s
    while not (found := happened()):
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited too long for: {what}"
        time.sleep(0.05)
    return found


@pytest.fixture
def nodes(workplace):
    """Return a function that starts nodes; those that still run at the end are killed."""
    started = []

    def start(*arguments, begin=workplace.start):
        process = begin(*arguments, PYTHONUNBUFFERED="1")
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def join(workplace, run_dir, rounds, *more):
    """Arguments of a node that joins, with the model and the questions of the workplace."""
    _, *arguments = workplace.silo(run_dir, rounds, "--listen", LOOPBACK, "--set", "checkpoint.interval_s=5")
    return ["join", *arguments, *more]


def status(workplace, run_dir):
    """The live status of a node; None while there is none."""
    try:
        found = read_status(workplace.path / run_dir)
    except NoStatus:
        return None
    return found if found["running"] and found["swarm"] else None


def address(workplace, process, run_dir):
    return wait_for(process, lambda: status(workplace, run_dir), "an address")["swarm"]["addresses"][0]


def num_external(workplace, run_dir, after=0):
    return sum(row["num_external"] for row in workplace.rows(run_dir) if row["round"] > after)


def with_peer(workplace, run_dir, node_id):
    """Whether a node is connected to another one."""
    found = status(workplace, run_dir)
    return found is not None and node_id in {peer["node_id"] for peer in found["swarm"]["peers"]}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "transport", [pytest.param("hivemind", marks=pytest.mark.alone), pytest.param("libp2p", marks=pytest.mark.soak)]
)
def test_two_nodes_train_on_each_others_groups_one_is_killed_and_comes_back(workplace, nodes, stopped_by, transport):
    carried = ("--transport", transport)
    first = nodes(*join(workplace, "a", 100_000, "--seed", "1", *carried))
    peers = address(workplace, first, "a")
    second = nodes(*join(workplace, "b", 100_000, "--seed", "2", "--peers", peers, *carried))
    for process, run_dir in ((first, "a"), (second, "b")):
        wait_for(process, lambda run_dir=run_dir: num_external(workplace, run_dir) > 12, f"groups for {run_dir}")
    node_id = status(workplace, "b")["swarm"]["node_id"]

    check_what_is_shown(workplace, peers, carried)

    second.kill()
    second.communicate()
    at_kill = len(workplace.rows("a"))
    second = nodes("join", "--run-dir", "b", "--resume", "--listen", LOOPBACK)
    wait_for(second, lambda: status(workplace, "b"), "the killed node to listen")
    began = time.monotonic()
    admitted = status(workplace, "a")["swarm"]["batches_heard"]
    wait_for(second, lambda: with_peer(workplace, "b", status(workplace, "a")["swarm"]["node_id"]), "the link")
    wait_for(second, lambda: status(workplace, "a")["swarm"]["batches_heard"] > admitted, "a batch of the killed node")
    assert time.monotonic() - began < HEARD_AGAIN_WITHIN_S
    assert with_peer(workplace, "a", node_id), "it has the identity that it had"
    assert len(workplace.rows("a")) > at_kill, "the other went on meanwhile"
    refusals = status(workplace, "a")["swarm"]["refusals"]
    assert not {"conflict", "replayed"} & refusals.keys(), "no sequence number is used twice"
    resumed = len(workplace.rows("b"))
    wait_for(second, lambda: num_external(workplace, "b", resumed) > 10, "groups for the node that came back")

    seconds, _, err = stopped_by(second, signal.SIGTERM)
    assert (second.returncode, "Traceback" in err) == (143, False)
    assert seconds < 10
    assert "swarm-node join --run-dir b --resume" in err
    assert "not running: as it was at" in workplace.run("stats", "--run-dir", "b").stdout

    last = len(workplace.rows("b"))
    alone = workplace.run("silo", "--run-dir", "b", "--resume", "--rounds", str(last + 3))
    assert alone.returncode == 0, alone.stderr
    assert num_external(workplace, "b", last) == 0
    assert [row["num_local"] for row in workplace.rows("b")[last:]] == [8, 8, 8]
    third = nodes("join", "--run-dir", "b", "--resume", "--rounds", "100000", "--listen", LOOPBACK)
    wait_for(third, lambda: num_external(workplace, "b", last + 3) > 10, "groups after a time alone")
    assert status(workplace, "b")["swarm"]["node_id"] == node_id
    for process in (first, third):
        assert stopped_by(process, signal.SIGINT)[0] < 10
        assert process.returncode == 130


def check_what_is_shown(workplace, peers, carried):
    """What stats, peers and network say of the two."""
    shown = json.loads(workplace.run("stats", "--run-dir", "a", "--json").stdout)
    assert (shown["schema_version"], shown["running"], shown["command"]) == (1, True, "join")
    assert shown["training"]["num_external_wanted"] == 4
    assert shown["swarm"]["groups_published"] > 0
    text = workplace.run("stats", "--run-dir", "a").stdout
    for part in ("running for", "from others", "published", "admitted", shown["swarm"]["node_id"][:16]):
        assert part in text, part
    listed = json.loads(workplace.run("peers", "--run-dir", "a", "--json").stdout)
    assert [peer["model"] for peer in listed["peers"]] == ["model"]
    socket_path = workplace.path / "a" / "control.sock"
    assert socket_path.stat().st_mode & 0o777 == 0o600
    by_socket = json.loads(workplace.run("stats", "--socket", str(socket_path), "--json").stdout)
    assert by_socket["pid"] == shown["pid"]
    found = json.loads(workplace.run("network", "--peers", peers, *carried, "--json").stdout)
    assert (found["num_nodes"], found["num_reachable"], found["num_trainers"]) == (2, 2, 2)
    assert found["models"] == {"model": 2}
    assert {node["node_id"] for node in found["nodes"]} == {
        status(workplace, name)["swarm"]["node_id"] for name in ("a", "b")
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(300)
def test_all_bootstraps_dead_at_the_start_is_one_line_and_then_it_joins_without_a_restart(workplace, nodes, stopped_by):
    identity = Identity.create(workplace.path / "boot" / "identity")
    listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    dead = f"{listen}/p2p/{peer_id_of(identity.node_id)}"
    node = nodes(*join(workplace, "run", 100_000, "--peers", dead), begin=workplace.fork)
    wait_for(node, lambda: len(workplace.rows("run")) > 20, "rounds alone")
    wait_for(node, lambda: "learning alone" in node.out(), "the line that says so")
    boot = nodes("bootstrap", "--run-dir", "boot", "--listen", listen)
    wait_for(node, lambda: with_peer(workplace, "run", identity.node_id), "the bootstrap")
    rounds = len(workplace.rows("run"))
    wait_for(node, lambda: len(workplace.rows("run")) > rounds + 5, "more rounds")
    wait_for(node, lambda: "joined" in node.out(), "the line that says so")
    _, out, err = stopped_by(node, signal.SIGTERM)
    assert "Traceback" not in err
    lines = [line for line in out.splitlines() if "alone" in line or "joined" in line]
    assert len(lines) == 2, lines
    assert lines[0].startswith("the peer given does not answer")
    assert lines[1] == "joined the swarm: 1 peer"
    _, out, err = stopped_by(boot, signal.SIGTERM)
    assert boot.returncode == 143
    assert "swarm-node join --peers " + dead in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peers", "127.0.0.1:7000"], "--peers '127.0.0.1:7000' is no address of a node: it looks like /ip4/"),
        (["--peers", "/ip4/127.0.0.1/tcp/7000/p2p/12D3KooWnonsense"], "is no address of a node"),
        (["--listen", "localhost"], "cannot listen on 'localhost': write it like"),
        (["--transport", "memory"], "'memory' is not one of 'hivemind', 'libp2p'"),
        (["--num-external", "-1"], "sapo.num_external = -1 (--num-external)"),
        (["--swarm-id", "x" * 65], "swarm_id"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_fix(workplace, more, message):
    arguments = [part for part in join(workplace, "run", 3) if part != LOOPBACK and part != "--listen"]
    done = workplace.run(*arguments, *more)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not (workplace.path / "run" / "metrics.jsonl").exists()
