"""A peer that does its worst over the real transport, against a real node that learns: nothing that it sends is
executed, nothing grows beyond its cap, and the node's rounds take as long as they did."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from _processes import LiveSwarm

pytestmark = pytest.mark.no_cover
PEER = Path(__file__).with_name("hostile_node.py")
MAX_SLOWDOWN = 1.2
MAX_NODE_GROWTH_BYTES = 96 * 2**20  # a few bodies of 4 MiB, sent or arriving, and what malloc keeps of them
MAX_P2PD_GROWTH_BYTES = 160 * 2**20  # it holds up to 16 MiB for each of eight streams that are not read as fast as sent
MIB = 2**20


class HostilePeer:
    """A `hostile_node.py` process, linked to the victim."""

    def __init__(self, transport, key, victim, proof):
        self.process = subprocess.Popen(
            [sys.executable, PEER, transport, key, victim.swarm()["addresses"][0], proof],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(PEER.parents[2]), "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout.readline() == "linked\n"

    def attack(self):
        self.process.stdin.write("attack\n")
        self.process.stdin.flush()

    def end(self):
        out, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return Counter(json.loads(out))

    def kill(self):
        self.process.kill()
        self.process.wait()


def memory(node):
    return {kind: process.memory_info().rss for kind, process in node.family() if kind != "helper"}


def pace(node, seconds):
    """How many rounds a node finishes in this time, how long they take in all, and the most memory that it has."""
    first, most, end_s = len(node.rows()), Counter(), time.monotonic() + seconds
    while time.monotonic() < end_s:
        time.sleep(0.2)
        most |= Counter(memory(node))
    rows = node.rows()[first:]
    return len(rows), sum(row["round_s"] for row in rows), most


def withstand(folder, transport, num_peers, window_s):
    """Let peers attack one after another, each with its own identity; return how much longer a round takes with one."""
    proof = folder / "executed"
    rounds, seconds, counts = Counter(), Counter(), Counter()
    arguments = ["--model", "tiny", "--rounds", "1000000", "--set", "evaluation.num_items=0", "--transport", transport]
    with LiveSwarm(folder) as swarm:
        victim, other = swarm.join(["victim", "other"], *arguments)
        victim.wait(lambda: sum(row["num_external"] for row in victim.rows()) > 12, "groups of the other")
        before, most = memory(victim), Counter()
        for number in range(num_peers):
            hostile = HostilePeer(transport, folder / f"hostile-{number}", victim, proof)
            try:
                for kind in ("quiet", "attacked"):
                    if kind == "attacked":
                        hostile.attack()
                    num, took_s, memory_of_window = pace(victim, window_s)
                    rounds[kind] += num
                    seconds[kind] += took_s
                    most |= memory_of_window
                counts += hostile.end()
            finally:
                hostile.kill()
        status = victim.swarm()
        assert victim.process.poll() is None
        assert [node.stop() for node in (victim, other)] == [143, 143]
    assert not proof.exists(), "something that it sent was executed"
    round_s = {kind: seconds[kind] / rounds[kind] for kind in rounds}
    growth = {kind: most[kind] - before[kind] for kind in before}
    print(
        f"\na round takes {round_s['quiet']:.3f} s, and {round_s['attacked']:.3f} s under attack "
        f"({round_s['attacked'] / round_s['quiet']:.2f} times as long), {dict(rounds)} rounds\n"
        f"memory grows by at most {', '.join(f'{most / MIB:.0f} MiB ({kind})' for kind, most in growth.items())}\n"
        f"attacks: {dict(counts)}\nrefused by the victim: {status['refusals']}, banned: {status['num_banned']}"
    )
    assert min(counts[kind] for kind in ("code for a scorer", "false answers and rewards", "bodies of 1 GB")) > 0
    assert status["num_rejected"] > 0
    assert growth.pop("node") < MAX_NODE_GROWTH_BYTES
    assert all(most < MAX_P2PD_GROWTH_BYTES for most in growth.values()), growth
    assert bool(growth) == (transport == "hivemind")  # libp2p is in the node
    return round_s["attacked"] / round_s["quiet"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["hivemind", pytest.param("libp2p", marks=pytest.mark.soak)])
def test_a_hostile_peer_has_nothing_executed_and_makes_nothing_grow(tmp_path, transport):
    withstand(tmp_path, transport, 1, 5.0)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("transport", ["hivemind", "libp2p"])
def test_a_hostile_peer_slows_nobodys_rounds(tmp_path, transport):
    assert withstand(tmp_path, transport, 4, 15.0) < MAX_SLOWDOWN
