"""Real nodes on the transport libp2p that find each other with no address typed: one network, a namespace for each."""

import subprocess
import sys
import time

import pytest
from _namespaces import NamespaceError, Namespaces
from _processes import LiveSwarm

WITHIN_S = 20.0  # from when they are started; loading torch and the model takes a third of it on an idle machine


def has_learned_from(node, authors):
    """Whether a node knows the others, and has trained on groups of as many authors."""
    rows = [row for row in node.rows() if row["num_external"]]
    peers = {peer["node_id"] for peer in node.swarm()["peers"]}
    return rows and authors <= peers


@pytest.mark.alone
@pytest.mark.timeout(240)
def test_three_nodes_find_each_other_by_mdns_and_train_on_each_others_groups(workplace):
    try:
        network = Namespaces(3, "10.78.0")
    except NamespaceError as error:
        pytest.skip(f"no network namespaces here: {error}")
    _, *arguments = workplace.silo("", 1_000_000)
    arguments = [*arguments[: arguments.index("--run-dir")], "--rounds", "1000000"]
    with network, LiveSwarm(workplace.path) as swarm:
        began_s = time.monotonic()
        nodes = [
            swarm.start(
                f"node{number}",
                "join",
                *arguments,
                "--transport",
                "libp2p",
                "--seed",
                str(number),
                through=("ip", "netns", "exec", name),
            )
            for number, name in enumerate(network.names)
        ]
        ids = {node.swarm()["node_id"] for node in nodes}
        for node in nodes:
            others = ids - {node.swarm()["node_id"]}
            node.wait(lambda node=node, others=others: has_learned_from(node, others), "groups of others", 45.0)
        took_s = time.monotonic() - began_s
        found = [peer["source"] for node in nodes for peer in node.swarm()["peers"]]
        print(f"\nthree nodes trained on each other's groups {took_s:.1f} s after they were started")
        assert "nearby" in found
        assert took_s < WITHIN_S
        assert [node.stop() for node in nodes] == [143] * 3


def test_only_the_transport_that_was_chosen_is_imported(tmp_path):
    program = """
import asyncio, pathlib, sys
from protocol.identity import Identity
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.base import TransportError
assert not {"hivemind", "libp2p"} & set(sys.modules), "named, and not imported"

async def main():
    identity = Identity.create(pathlib.Path(sys.argv[1]))
    listen = ("/ip4/127.0.0.1/tcp/0",)
    one = HivemindTransport(identity, lambda *_: True, HivemindSettings(listen=listen, nat_port_map=False))
    two = Libp2pTransport(identity, lambda *_: True, Libp2pSettings(listen=listen, mdns=False))
    first, second = (one, two) if sys.argv[2] == "hivemind" else (two, one)
    await first.start()
    assert sys.argv[2] in sys.modules
    assert second.name not in sys.modules
    try:
        await second.start()
    except TransportError as error:
        print(error)
    await first.close()

asyncio.run(main())
"""
    for name in ("hivemind", "libp2p"):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / name), name], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "hivemind and libp2p cannot share a process: choose one transport\n"
