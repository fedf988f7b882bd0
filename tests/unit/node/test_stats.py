"""What is shown of a node and of a swarm, from data as a member gives it."""

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from node.addresses import AddressError, best_address, checked_peers, expand_listen
from node.bridge import bridge_status
from node.network import describe_network, network_view
from node.stats import peers_table, size, stats_view
from node.status import build_status, warnings_of
from protocol.crawl import Crawled
from protocol.messages import NodeRecord

NODE = "a" * 52
PEER = {
    "node_id": "b" * 52,
    "direction": "out",
    "rtt_ms": 12.34,
    "since_s": 61.0,
    "heard_s": 1.0,
    "role": "trainer",
    "model": "tiny",
    "software": "swarm-node/9",
    "reputation": 2.5,
    "source": "given",
}
COUNTERS = (
    "bytes_in bytes_out requests_in requests_out requests_failed transport_restarts batches_published batches_heard "
    "batches_admitted batches_relayed announcements_duplicate groups_published groups_admitted groups_sampled "
    "groups_missing pool_groups pool_reserve pool_bytes rescore_queue num_ignored"
)
SWARM = dict.fromkeys(COUNTERS.split(), 5) | {
    "node_id": NODE,
    "swarm_id": "main",
    "state": "joined",
    "transport": "hivemind",
    "transport_details": {},
    "addresses": ["/ip4/127.0.0.1/tcp/1/p2p/x", "/ip4/192.0.2.7/udp/1/quic-v1/p2p/x", "/ip4/192.0.2.7/tcp/1/p2p/x"],
    "num_peers": 1,
    "num_outbound": 1,
    "num_inbound": 0,
    "num_known_nodes": 4,
    "num_rejected": 2,
    "refusals": {"bad_signature": 2, "duplicate": 3},
    "staleness": {"p50_s": 1.25},
    "peers": [PEER],
    "warnings": [],
}
TRAINING = {
    "model": "tiny",
    "tasks": "chain_sum",
    "round": 12,
    "rounds": 40,
    "phase": "update",
    "num_local_wanted": 4,
    "num_external_wanted": 4,
    "pass_at_1_heldout": 0.25,
    "num_window_rounds": 12,
    "reward_own_mean": 0.5,
    "reward_external_mean": 0.75,
    "external_share": 0.48,
    "full_rounds_share": 0.9,
    "round_s": 0.1,
    "tokens_per_s": 100.0,
    "elapsed_s": 3.0,
}


def drawn(renderable):
    console = Console(file=io.StringIO(), width=160, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_a_running_member_shows_everything_that_the_issue_of_a_swarm_is():
    text = drawn(stats_view(build_status("join", "runs/x", time.time() - 62, TRAINING, SWARM)))
    for part in (
        "join · runs/x  running for 1:02",
        "12 of 40",
        "own 0.500   of others 0.750",
        "48% of groups   nothing missing in 90% of rounds",
        "/ip4/192.0.2.7/tcp/1/p2p/x",
        "1 (1 chosen, 0 came in), 4 nodes known",
        "2 held against somebody, 5 not",
        "bad_signature 2  duplicate 3",
        "older than 1.2 s",
        "12.3 ms",
        "+2.5",
    ):
        assert part in text, part


def test_a_silo_a_bootstrap_and_one_that_has_ended_are_shown_as_what_they_are():
    alone = build_status("silo", "runs/x", time.time(), TRAINING | {"num_external_wanted": 0}, None)
    text = drawn(stats_view(alone))
    assert "from others" not in text
    assert "peers" not in text
    bootstrap = drawn(stats_view(build_status("bootstrap", "runs/b", time.time(), None, SWARM)))
    assert "reward" not in bootstrap
    assert "relayed" in bootstrap
    ended = alone | {"running": False, "taken_at": time.time() - 3661}
    assert "1:01:01 ago" in drawn(stats_view(ended))
    assert "not running: as it was at" in drawn(stats_view(ended))


def test_a_bridge_is_shown_with_both_its_sides_and_the_peers_of_both():
    crossed = (
        "batches_offered batches_taken batches_known frames_fetched frames_missed frames_brought bytes_brought "
        "batches_to_give nodes_beyond"
    )
    first = SWARM | {"bridge": dict.fromkeys(crossed.split(), 7), "warnings": ["few peers"]}
    second = first | {"transport": "libp2p", "peers": [PEER | {"node_id": "e" * 52}], "warnings": ["the clock is off"]}
    status = bridge_status(Path("runs/b"), time.time(), first, second)
    assert status["warnings"] == ["hivemind: few peers", "libp2p: the clock is off"]
    text = drawn(stats_view(status))
    for part in ("joined over hivemind", "joined over libp2p", "7 groups fetched for the other side", "eeeeeeee"):
        assert part in text, part
    assert text.count("7 nodes beyond") == 2
    assert bridge_status(Path("runs/b"), time.time(), first, None)["sides"] == [first], "the second one still starts"


def test_warnings_name_what_to_look_at():
    assert warnings_of(TRAINING, SWARM) == []
    assert warnings_of(TRAINING, None) == []
    [line] = warnings_of(TRAINING | {"full_rounds_share": 0.3}, SWARM)
    assert line.startswith("in 70% of the last rounds groups from others were missing")
    [line] = warnings_of(TRAINING, SWARM | {"num_rejected": 11})
    assert "11 things that no honest node sends" in line
    assert warnings_of(None, SWARM | {"warnings": ["the clock is off"]}) == ["the clock is off"]


def test_peers_and_sizes():
    assert "bbbbbbbbbbbbbbbb" in drawn(peers_table([PEER, PEER | {"rtt_ms": None}]))
    assert [size(number) for number in (0, 1023, 1024, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]


def record(node_id, role="trainer", model="tiny", tasks=("chain_sum",), rate=60):
    return NodeRecord((1, 0), node_id, "memory", (), 1_000_000, role, "swarm-node/9", model, tasks, rate, b"", b"")


def test_a_network_adds_up_what_answers_and_lists_the_rest():
    found = [
        Crawled(record("c" * 52, rate=999), False, None),
        Crawled(record("a" * 52), True, 3.0),
        Crawled(record("b" * 52, model="big", tasks=("chain_sum", "products")), True, 4.0),
        Crawled(record("d" * 52, role="bootstrap", model="none", tasks=(), rate=0), True, 5.0),
    ]
    network = describe_network(found, "main", now_s=1010.0)
    assert (network["num_nodes"], network["num_reachable"], network["num_trainers"]) == (4, 3, 2)
    assert network["rollouts_per_minute"] == 120
    assert network["models"] == {"tiny": 1, "big": 1}
    assert network["tasks"] == {"chain_sum": 2, "products": 1}
    assert [node["node_id"][0] for node in network["nodes"]] == ["d", "a", "b", "c"]
    assert network["nodes"][0]["record_age_s"] == 10.0
    text = drawn(network_view(network))
    for part in ("4 known, 3 answer, 2 of these learn", "120 completions a minute", "tiny (1)", "no answer", "3 ms"):
        assert part in text, part


def test_a_network_counts_nodes_beyond_a_bridge_and_says_over_what_they_are_reached():
    found = [
        Crawled(record("c" * 52, rate=30), False, None, is_beyond=True),
        Crawled(record("a" * 52), True, 3.0),
        Crawled(record("b" * 52), False, None),
    ]
    network = describe_network(found, "main", now_s=1010.0)
    assert (network["num_nodes"], network["num_reachable"], network["num_beyond"]) == (3, 1, 1)
    assert (network["num_trainers"], network["rollouts_per_minute"]) == (2, 90)
    assert [node["node_id"][0] for node in network["nodes"]] == ["a", "c", "b"]
    text = drawn(network_view(network))
    assert "3 known, 1 answer, 1 are beyond a bridge, 2 of these learn" in text
    assert [part in text for part in ("memory", "no answer")] == [True, True]


def test_addresses_as_people_type_them():
    peer = "12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"
    one, two = f"/ip4/192.0.2.1/tcp/7000/p2p/{peer}", f"/dns4/example.org/udp/7000/quic-v1/p2p/{peer}"
    assert checked_peers([f"{one}, {two}", "", one]) == [one, two, one]
    for wrong in ("192.0.2.1:7000", "/ip4/192.0.2.1/tcp/7000", one[:-1], one.lstrip("/")):
        with pytest.raises(AddressError, match=r"is no address of a node: it looks like /ip4/"):
            checked_peers([wrong])
    assert expand_listen(["7000", "/ip4/127.0.0.1/tcp/1,/ip4/127.0.0.1/tcp/2"]) == [
        "/ip4/0.0.0.0/tcp/7000",
        "/ip4/127.0.0.1/tcp/1",
        "/ip4/127.0.0.1/tcp/2",
    ]
    with pytest.raises(AddressError, match=r"cannot listen on 'localhost:7': write it like /ip4/"):
        expand_listen(["localhost:7"])
    assert best_address(SWARM["addresses"]) == "/ip4/192.0.2.7/tcp/1/p2p/x"
    assert best_address(SWARM["addresses"][:1]) == "/ip4/127.0.0.1/tcp/1/p2p/x"
