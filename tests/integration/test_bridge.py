"""`swarm-node bridge` between two networks of real nodes: everybody learns from everybody, and a bridge ends as one."""

import json
import signal
import time

import psutil
import pytest

from node.control import NoStatus, read_status

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ALONE = ("--set", "network.nat_port_map=false")
NODES = (("a", 0), ("b", 0), ("c", 1), ("d", 1))  # run folder, network


def wait_for(happened, what, processes, timeout_s=120.0):
    """Wait until something has happened, and return it; fail if a process ends or the time is over first."""
    deadline = time.monotonic() + timeout_s
    while not (found := happened()):
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, f"waited too long for: {what}"
        time.sleep(0.05)
    return found


def status(workplace, run_dir):
    """The live status of a node; None while there is none."""
    try:
        found = read_status(workplace.path / run_dir)
    except NoStatus:
        return None
    return found if found["running"] and found["swarm"] else None


@pytest.fixture
def processes():
    """Processes that are killed at the end, if they still run."""
    started = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def address(workplace, processes, run_dir):
    found = wait_for(lambda: status(workplace, run_dir), f"an address of {run_dir}", processes)
    return found["swarm"]["addresses"][0]


def start_bridge(workplace, processes, *arguments):
    process = workplace.start("bridge", *arguments, *ALONE, "--run-dir", "x")
    processes.append(process)
    return process


def both_sides(workplace):
    found = status(workplace, "x")
    return found["sides"] if found and len(found["sides"]) == 2 else None


def both_sides_have_given(workplace):
    """Both sides, once each has offered batches and had frames brought; the second says so once a second."""
    sides = both_sides(workplace)
    given = [side["bridge"]["batches_offered"] and side["bridge"]["frames_brought"] for side in sides or ()]
    return sides if given and all(given) else None


def authors_used(workplace, run_dir):
    found = status(workplace, run_dir)
    return found["swarm"]["authors_sampled"] if found else 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize("transports", [("hivemind", "libp2p")], ids="-".join)
def test_four_nodes_of_two_networks_each_train_on_groups_of_all_three_others(
    workplace, processes, stopped_by, transports
):
    firsts = {}
    for seed, (run_dir, network) in enumerate(NODES, 1):
        _, *arguments = workplace.silo(run_dir, 100_000, "--listen", LOOPBACK, *ALONE, "--seed", str(seed))
        peers = ("--peers", firsts[network]) if network in firsts else ()
        over = ("--transport", transports[network])
        processes.append(workplace.fork("join", *arguments, *over, *peers, "--set", "sapo.num_external=6"))
        if network not in firsts:
            firsts[network] = address(workplace, processes, run_dir)
    sides = [f"{transport}@{firsts[network]}" for network, transport in enumerate(transports)]
    listen = ("--first-listen", LOOPBACK, "--second-listen", LOOPBACK)
    bridge = start_bridge(workplace, processes, *sides, *listen)
    for name, _ in NODES:
        wait_for(lambda name=name: authors_used(workplace, name) == 3, f"three authors in {name}", processes)
    first, second = wait_for(lambda: both_sides_have_given(workplace), "what both sides say of it", processes)
    assert first["node_id"] == second["node_id"], "one identity"
    assert (first["transport"], second["transport"]) == transports
    assert first["num_rejected"] == second["num_rejected"] == 0
    for run_dir, _ in NODES:
        found = status(workplace, run_dir)["swarm"]
        assert found["num_rejected"] == 0
        assert "conflict" not in found["refusals"]
    shown = workplace.run("stats", "--run-dir", "x").stdout
    assert shown.count("groups fetched for the other side") == 2
    seen = json.loads(workplace.run("network", "--run-dir", "a", "--json").stdout)
    assert (seen["num_reachable"], seen["num_beyond"], seen["num_trainers"]) == (3, 2, 4)
    listed = json.loads(workplace.run("peers", "--run-dir", "x", "--json").stdout)
    assert len({peer["node_id"] for peer in listed["peers"]}) == 4
    seconds, out, err = stopped_by(bridge, signal.SIGINT)
    assert (bridge.returncode, "Traceback" in err) == (130, False), err
    assert seconds < 10
    assert out.count("others join it with") == 2


@pytest.mark.timeout(200)
def test_where_one_side_dies_the_other_ends_with_the_reason_and_both_come_back(workplace, processes, stopped_by):
    bridge = start_bridge(workplace, processes, "hivemind", "hivemind")
    node_ids = {side["node_id"] for side in wait_for(lambda: both_sides(workplace), "both sides", processes)}
    addresses = {side["addresses"][0] for side in both_sides(workplace)}
    assert len(node_ids) == 1
    second = next(child for child in psutil.Process(bridge.pid).children() if child.name() != "p2pd")
    second.kill()
    _, err = bridge.communicate(timeout=20)
    assert bridge.returncode == 1
    assert "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("swarm-node: the second side of the bridge (hivemind) ended with status -9; go on with: ")
    assert not read_status(workplace.path / "x")["running"]
    for name in ("swarm.msgpack", "second/swarm.msgpack", "identity"):
        assert (workplace.path / "x" / name).exists(), name

    bridge = start_bridge(workplace, processes)
    again = wait_for(lambda: both_sides(workplace), "both sides again", processes[1:])
    assert {side["node_id"] for side in again} == node_ids
    assert {side["addresses"][0] for side in again} == addresses, "the ports that they had"
    family = psutil.Process(bridge.pid).children(recursive=True)
    bridge.kill()
    bridge.communicate()
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive, "the second side ends with the first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hivemind"], "a bridge has two sides, not 1"),
        ([], "no bridge has run in x: name two sides"),
        (["hivemind", "pigeon"], "network.transport"),
        (["hivemind@127.0.0.1:7000", "hivemind"], "is no address of a node"),
        (["hivemind", "hivemind", "--second-listen", "/ip4/192.0.2.77/tcp/7"], "cannot listen on"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_the_fix(workplace, arguments, message):
    done = workplace.run("bridge", *arguments, *ALONE, "--run-dir", "x")
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert not (workplace.path / "x").exists()
