"""A real bridge between honest nodes, while hostile peers of one network flood it, and others pull from the other side.

What honest nodes publish crosses, what is hostile crosses no faster than a bridge passes on authors that it does not
know, and both processes stay as large as they were.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from _bridge_flood import CrossingNode, Floods, FurtherNode, HonestNodes
from _processes import LOOPBACK, LiveNode, LiveSwarm

pytestmark = pytest.mark.no_cover
TRANSPORTS = ("hivemind", "libp2p")
NODES = (CrossingNode, FurtherNode)
MIN_CROSSED = 0.95
ARRIVES_WITHIN_S = 10.0
BURST_S = 30.0  # of the quota that authors without a record share
MIB = 2**20


@dataclass(frozen=True)
class Flood:
    """How much, and against what. Counts of peers, and seconds."""

    num_honest: int  # of each network
    publish_every_s: float
    num_flooding: int
    flood_every_s: float  # two batches of each of them; the others attack as often
    num_pulling: int
    known_after_s: float  # of peace, in which honest authors become known
    lead_s: float  # of flood, in which what the quota has saved up is used
    measured_s: float
    max_growth_bytes: int  # of any process of the bridge
    settings: dict[str, Any] = field(default_factory=dict)  # of every honest node, and the bridge


# A tenth of the quota, and records in seconds: what takes ten minutes is over soon.
QUICK = {"max_newcomers_per_s": 2.0, "probation_s": 2.0, "min_useful_groups": 2, "repair_s": 0.7}
SHORT = Flood(2, 0.5, 4, 0.4, 1, 4.5, 2.0, 4.0, 16 * MIB, QUICK)


@dataclass
class Seen:
    """What a run has shown. Indices are of sides."""

    seconds: float  # from when it was measured until the nodes were asked
    nodes: list[list[dict[str, Any]]]
    crossed: list[float]  # share of the groups of honest authors that every node beyond could learn from
    before: Counter[str]  # bytes by process
    most: Counter[str]
    status: dict[str, Any]
    done: list[Counter[str]]  # by those who flood, and those who pull


def memory(bridge: LiveNode) -> Counter[str]:
    """Resident memory of both sides and their daemons."""
    found, first = Counter[str](), psutil.Process(bridge.process.pid)
    for process in (first, *first.children(recursive=True)):
        kind = "p2pd" if process.name() == "p2pd" else "first side" if process == first else "second side"
        found[kind] += process.memory_info().rss
    return found


def share_crossed(authors, others, begin_s: float, end_s: float) -> float:
    """Which share of what these published within a time the nodes of the other network have."""
    pairs = [
        ((author["rank"], number) in other["admitted"])
        for author in authors
        for number, at_s in author["published"].items()
        if begin_s <= at_s < end_s
        for other in others
    ]
    return sum(pairs) / len(pairs)


def watch(bridge: LiveNode, networks: list[HonestNodes], floods: list[Floods], flood: Flood) -> Seen:
    """Let them attack, and measure."""
    time.sleep(flood.known_after_s)
    before = memory(bridge)
    for one in floods:
        one.attack(flood.flood_every_s)
    time.sleep(flood.lead_s)
    began_s, most = time.time(), Counter[str]()
    while time.time() < began_s + flood.measured_s:
        time.sleep(0.25)
        most |= memory(bridge)
    ended_s = time.time()
    while True:
        nodes = [network.all_do("seen", 20, since_s=began_s) for network in networks]
        shares = [share_crossed(nodes[side], nodes[1 - side], began_s, ended_s) for side in (0, 1)]
        if min(shares) == 1 or time.time() > ended_s + ARRIVES_WITHIN_S:
            break
        time.sleep(0.5)
    done = [one.counts() for one in floods]
    return Seen(time.time() - began_s, nodes, shares, before, most, bridge.status(), done)


def run(folder, hostile_side: int, flood: Flood) -> Seen:
    """Join two networks of honest nodes by a bridge, and let hostile peers of one flood it."""
    networks: list[HonestNodes] = []
    floods: list[Floods] = []
    sets = [text for name, value in flood.settings.items() for text in ("--set", f"swarm.{name}={value}")]
    with LiveSwarm(folder) as swarm:
        try:
            for kind, transport in zip(NODES, TRANSPORTS, strict=True):
                networks.append(HonestNodes(kind, transport, flood.num_honest, **flood.settings))
            sides = [f"{name}@{nodes.address}" for name, nodes in zip(TRANSPORTS, networks, strict=True)]
            listen = ("--first-listen", LOOPBACK, "--second-listen", LOOPBACK, "--set", "network.nat_port_map=false")
            bridge = swarm.start("bridge", "bridge", *sides, *listen, *sets)
            bridge.wait(lambda: len((bridge.status() or {"sides": ()})["sides"]) == 2, "both sides")
            for nodes in networks:
                nodes.all_do("publish_from_now_on", 10, every_s=flood.publish_every_s)
            own = [side["addresses"][0] for side in bridge.status()["sides"]]
            attacks = ["flood"] * flood.num_flooding + ["replay", "forge", "oversize"]
            victims = [own[hostile_side], networks[hostile_side].address]
            floods.append(Floods(TRANSPORTS[hostile_side], attacks, victims))
            floods.append(Floods(TRANSPORTS[1 - hostile_side], ["pull"] * flood.num_pulling, [own[1 - hostile_side]]))
            seen = watch(bridge, networks, floods, flood)
        finally:
            for one in (*floods, *networks):
                one.__exit__()
        assert bridge.stop() == 143, "both sides were alive, and have ended as they should"
        assert "Traceback" not in bridge.log.read_text()
    return seen


def withstand(folder, hostile_side: int, flood: Flood) -> None:
    seen = run(folder, hostile_side, flood)
    honest = {node["node_id"] for node in seen.nodes[hostile_side]}
    everybody = honest | {node["node_id"] for node in seen.nodes[1 - hostile_side]}
    heard = [Counter(node["heard"]) for node in seen.nodes[1 - hostile_side]]
    num_hostile = max(sum(num for author, num in one.items() if author not in everybody) for one in heard)
    num_honest = max(sum(one[author] for author in honest) for one in heard)
    growth = {kind: (seen.most[kind] - size) / MIB for kind, size in seen.before.items()}
    print(
        f"\nflood from {TRANSPORTS[hostile_side]}, {flood.measured_s:g} s: {dict(seen.done[0])}; "
        f"beyond: {dict(seen.done[1])}\n"
        f"groups of honest authors that crossed: {seen.crossed[0]:.1%} from {TRANSPORTS[0]}, "
        f"{seen.crossed[1]:.1%} from {TRANSPORTS[1]}\n"
        f"batches that crossed: {num_hostile / seen.seconds:.1f} hostile and {num_honest / seen.seconds:.1f} honest "
        f"a second: {num_honest / (num_honest + num_hostile):.0%} honest\n"
        f"memory: {', '.join(f'{kind} {mib:+.1f} MiB' for kind, mib in growth.items())}"
    )
    for side in seen.status["sides"]:
        print(f"{side['transport']}: {side['bridge']}, refused {side['refusals']}, banned {side['num_banned']}")
    assert min(seen.done[0][name] for name in ("junk", "replays", "forged", "oversize", "bodies never given")) > 0
    assert seen.done[1]["bodies pulled"] > 0
    assert min(seen.crossed) >= MIN_CROSSED
    assert num_hostile <= flood.settings.get("max_newcomers_per_s", 20.0) * (seen.seconds + BURST_S)
    assert seen.done[0]["junk"] > 2 * num_hostile, "most of it does not cross"
    assert max(growth.values()) <= flood.max_growth_bytes / MIB, growth


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "hostile_side", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.alone)], ids=TRANSPORTS
)
def test_honest_groups_cross_a_bridge_that_is_flooded(tmp_path, hostile_side):
    withstand(tmp_path, hostile_side, SHORT)
