import random
from collections import Counter

from protocol.directory import GIVEN, MAX_FAILURES, REMEMBERED, Directory
from protocol.messages import NodeRecord


def record(node_id: str, created_at_s: float = 1000.0) -> NodeRecord:
    return NodeRecord(
        (1, 0), node_id, "memory", (f"/memory/p2p/{node_id}",), int(created_at_s * 1000), "trainer", "s", "m", (), 0,
        b"", node_id.encode(),
    )  # fmt: skip


def make(max_nodes: int = 64) -> Directory:
    return Directory(max_nodes=max_nodes, own_id="me", rng=random.Random(0))


def test_a_newer_record_replaces_an_older_one_and_nobody_knows_himself():
    directory = make()
    assert directory.add(record("a", 1000), "x", 1000)
    assert not directory.add(record("a", 2000), "y", 2000)
    assert not directory.add(record("a", 1500), "y", 2000)
    known = directory.get("a")
    assert known is not None
    assert (known.record.created_at_ms, known.sources) == (2_000_000, ["x", "y"])
    assert not directory.add(record("me"), "x", 1000)
    assert len(directory) == 1


def test_one_source_fills_a_quarter_at_most():
    directory = make()
    for number in range(20):
        directory.add(record(f"honest {number}"), f"friend {number % 5}", 1000)
    for number in range(5000):
        directory.add(record(f"sybil {number}"), "flooder", 1000)
    names = Counter(known.record.node_id.split()[0] for known in directory.nodes())
    assert names == {"honest": 20, "sybil": 16}


def test_the_table_is_bounded_and_reached_nodes_stay():
    directory = make()
    directory.add(record("friend"), "x", 1000)
    directory.reached("friend", 1000)
    for number in range(1000):
        directory.add(record(f"node {number}"), f"source {number}", 1000)
    assert len(directory) == 64
    assert "friend" in directory


def test_the_source_is_drawn_before_the_node():
    directory = make()
    for number in range(16):
        directory.add(record(f"sybil {number}"), "flooder", 1000)
    directory.add(record("honest 1"), "friend", 1000)
    directory.add(record("honest 2"), "dht/0", 1000)
    chosen = dict[str, str]()
    for _ in range(3):
        drawn = directory.choose(1000, exclude=chosen, chosen=chosen)
        assert drawn is not None
        chosen[drawn[0].record.node_id] = drawn[1]
    assert set(chosen.values()) == {"flooder", "friend", "dht/0"}
    assert {"honest 1", "honest 2"} < chosen.keys()


def test_names_that_tell_of_each_other_have_one_root():
    directory = make(1024)
    directory.add(record("friend"), GIVEN, 1000)
    directory.add(record("friend's friend"), "friend", 1000)
    directory.add(record("caller"), "caller", 1000)
    for number in range(100):
        directory.add(record(f"sybil {number}"), f"dht/{number % 2}", 1000)
        directory.add(record(f"sybil {number}'s"), f"sybil {number}", 1000)  # a hundred sources more
    directory.add(record("friend's friend"), "sybil 0", 1000)  # what is told later changes nothing
    chosen = dict[str, str]()
    for _ in range(6):
        drawn = directory.choose(1000, exclude=chosen, chosen=chosen)
        assert drawn is not None
        chosen[drawn[0].record.node_id] = drawn[1]
    assert {"friend", "friend's friend", "caller"} < chosen.keys()
    assert Counter(map(directory.root_of, chosen)) == {GIVEN: 2, "came": 1, "dht": 3}
    assert directory.root_of("nobody") == ""


def test_a_flood_is_not_much_knowledge():
    directory = make(1024)
    for number in range(200):
        directory.add(record(f"sybil {number}"), "flooder", 1000)
    assert directory.num_known_widely(8) == 8
    for number in range(20):
        directory.add(record(f"node {number}"), f"friend {number % 5}", 1000)
    assert directory.num_known_widely(8) == 8 + 20


def test_nodes_that_fail_are_tried_again_ever_later_and_then_forgotten():
    directory = make()
    directory.add(record("a"), "x", 0)
    directory.add(record("b"), REMEMBERED, 0)
    for node_id in ("a", "b"):
        directory.failed(node_id, 0)
    assert directory.choose(9, exclude=(), chosen={}) is None
    assert directory.choose(10, exclude=(), chosen={}) is not None
    for _ in range(MAX_FAILURES - 1):
        for node_id in ("a", "b"):
            directory.failed(node_id, 10)
    assert "a" not in directory
    assert "b" in directory  # what is on disk may be all that there is
    assert directory.tell(9, 10, exclude="", near=()) == []
    directory.reached("b", 20)
    assert [r.node_id for r in directory.tell(9, 20, exclude="", near=())] == ["b"]
    assert directory.tell(9, 20, exclude="b", near=()) == []


def test_what_nobody_has_heard_of_for_long_is_forgotten():
    directory = make()
    directory.add(record("old"), "x", 1000)
    directory.add(record("neighbour"), "x", 1000)
    directory.add(record("fresh"), "x", 2000)
    directory.expire(2500, keep=["neighbour"])
    assert {known.record.node_id for known in directory.nodes()} == {"neighbour", "fresh"}


def test_those_reached_last_are_remembered_first():
    directory = make()
    for number in range(10):
        directory.add(record(f"node {number}"), "x", 1000)
    for number in (3, 7):
        directory.reached(f"node {number}", 1000 + number)
    assert [r.node_id for r in directory.worth_remembering(2)] == ["node 7", "node 3"]


def test_half_of_what_is_told_are_the_nodes_own_neighbours():
    directory = Directory(max_nodes=1000, own_id="me", rng=random.Random(0))
    for number in range(200):
        directory.add(record(f"crowd {number}", 10), "teller", 10)
    for name in ("a", "b", "c", "d", "e"):
        directory.add(record(name, 10), name, 10)
    told = [r.node_id for r in directory.tell(8, 20, exclude="a", near={"a", "b", "c", "d", "e"})]
    assert set(told[:4]) == {"b", "c", "d", "e"}
    assert len(told) == len(set(told)) == 8
    assert len(directory.tell(64, 20, exclude="a", near={"b"})) == 64
