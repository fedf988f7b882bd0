"""`kill -9` of any node of a swarm in the middle of a round, the bootstrap included.

The others go on; the killed node comes back as who it was, with every round that it had finished, and is heard.
"""

import itertools
import random
import socket
import threading
import time

import pytest
from _processes import LiveSwarm

HEARD_WITHIN_S = 15.0  # from the start of its process until another node has an answer or a request of it
TRAINERS = ("one", "two", "three")
EXACT = ("round", "reward_mean", "loss", "num_local", "num_external", "elapsed_s")


class Pace:
    """Notes, all the time, when each node has finished a round: its metrics grow by a line."""

    def __init__(self, nodes):
        self._nodes, self._ends = nodes, threading.Event()
        self.grew_at_s = {node.name: [] for node in nodes}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self):
        sizes = {}
        while not self._ends.wait(0.05):
            for node in self._nodes:
                if (size := node.metrics_bytes()) != sizes.get(node.name):
                    sizes[node.name] = size
                    self.grew_at_s[node.name].append(time.monotonic())

    def longest_gap_s(self, name, since_s):
        """The longest time that a node has gone without finishing a round."""
        times = [since_s, *(at_s for at_s in self.grew_at_s[name] if at_s > since_s), time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))

    def end(self):
        self._ends.set()
        self._thread.join()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def heard_since(nodes, node_id, since_s):
    """Whether one of the nodes has heard this one, as it asked or answered, since then."""
    for node in nodes:
        status = node.status()
        silent_s = time.monotonic() - since_s
        peers = status["swarm"]["peers"] if status else ()
        if any(peer["node_id"] == node_id and peer["heard_s"] < silent_s for peer in peers):
            return True
    return False


def identity(node):
    return node.swarm()["node_id"]


def survive(tmp_path, transport, victims, rng, arguments, max_gap_s):
    """Kill one after another; return how long each took to be heard, and to give a group, from its process's start."""
    heard_after_s, gave_after_s, gaps_s = [], [], []
    with LiveSwarm(tmp_path) as swarm:
        listen = {name: ("--listen", f"/ip4/127.0.0.1/tcp/{free_port()}") for name in ("boot", *TRAINERS)}
        begin = ("bootstrap", "--transport", transport)
        boot = swarm.start("boot", *begin, *listen["boot"])
        peers = boot.swarm()["addresses"][0]
        trainers = []
        for seed, name in enumerate(TRAINERS):
            settings = ("--seed", str(seed), "--rounds", "1000000", "--set", "checkpoint.interval_s=3")
            settings = (*settings, "--transport", transport)
            trainers.append(swarm.start(name, "join", *listen[name], "--peers", peers, *settings, *arguments))
        for node in trainers:
            node.wait(lambda node=node: sum(row["num_external"] for row in node.rows()) > 12, "groups of others")
        ids = {name: identity(node) for name, node in swarm.nodes.items()}
        pace = Pace(trainers)
        try:
            for name in victims:
                time.sleep(rng.uniform(0.2, 3.0))  # any moment of a round, a write or a checkpoint
                node = swarm.nodes[name]
                others = [other for other in swarm.nodes.values() if other is not node]
                node.kill()
                killed_s, before = time.monotonic(), node.rows()
                node.start(*(begin if node is boot else ("join", "--resume")), *listen[name])
                node.wait(lambda: heard_since(others, ids[name], node.started_at_s), "being heard")  # noqa: B023
                heard_after_s.append(time.monotonic() - node.started_at_s)
                assert identity(node) == ids[name]
                if node is not boot:
                    node.wait(lambda: node.swarm()["frames_served"], "a group that is taken from it")  # noqa: B023
                    gave_after_s.append(time.monotonic() - node.started_at_s)
                    node.wait(lambda: len(node.rows()) > len(before) + 2, "rounds")  # noqa: B023
                    check_continued(before, node.rows())
                gaps = [pace.longest_gap_s(other.name, killed_s) for other in others if other in trainers]
                gaps_s.append(max(gaps))
                print(
                    f"{name:<6} heard after {heard_after_s[-1]:5.1f} s"
                    + (f", gives after {gave_after_s[-1]:5.1f} s" if node is not boot else "")
                    + f"; longest round of the others {max(gaps):.1f} s"
                )
                assert max(gaps) < max_gap_s, "the others never stop training"
        finally:
            pace.end()
        for node in swarm.nodes.values():
            refusals = node.swarm()["refusals"]
            assert not {"conflict", "bad_signature", "bad_schema", "wrong_digest"} & refusals.keys(), refusals
        assert [node.stop() for node in swarm.nodes.values()] == [143] * 4
        assert not any("Traceback" in node.log.read_text() for node in swarm.nodes.values())
    print(
        f"{len(victims)} kills: heard after {min(heard_after_s):.1f} to {max(heard_after_s):.1f} s from the start "
        f"of the process; the others' longest round took {max(gaps_s):.1f} s"
    )
    assert max(heard_after_s) < HEARD_WITHIN_S


def check_continued(before, after):
    """No round that was finished is lost or changed, none comes twice, and none is missing."""
    assert [row["round"] for row in after] == list(range(1, len(after) + 1))
    assert [[row[name] for name in EXACT] for row in after[: len(before)]] == [
        [row[name] for name in EXACT] for row in before
    ]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("transport", ["hivemind", "libp2p"])
def test_twenty_kills_of_any_node(tmp_path, transport):
    rng = random.Random(20)
    victims = ["boot", *TRAINERS] * 5
    rng.shuffle(victims)
    print()
    survive(tmp_path, transport, victims, rng, ["--model", "tiny", "--set", "evaluation.num_items=0"], max_gap_s=5.0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "transport", [pytest.param("hivemind", marks=pytest.mark.alone), pytest.param("libp2p", marks=pytest.mark.soak)]
)
def test_a_bootstrap_and_a_node_are_killed(workplace, transport):
    _, *arguments = workplace.silo("", 1)
    at = arguments.index("--run-dir")
    del arguments[at : at + 4]  # the folder and the rounds
    survive(workplace.path, transport, ["boot", "one"], random.Random(2), arguments, max_gap_s=5.0)
