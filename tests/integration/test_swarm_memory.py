"""Swarms of whole members over the memory transport, in virtual time: who hears what, whatever happens."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from _swarm import Node, Swarm, write_group

from protocol.refusals import Reason
from protocol.transport import virtual_time
from protocol.transport.memory import Faults

WANT_ALL: dict[str, Any] = {"reserve_groups": 4000, "max_rescore_queue": 4000, "max_author_share": 1.0}


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


async def publish(node: Node, num_groups: int = 4, num_chars: int = 80) -> int:
    """Publish one batch; return how many groups."""
    groups = [write_group(node.rng, num_completions=4, num_chars=num_chars) for _ in range(num_groups)]
    await node.member.publish(groups)
    return num_groups


def published(nodes: list[Node]) -> int:
    return sum(node.status()["groups_published"] for node in nodes)


def shares(nodes: list[Node]) -> list[float]:
    """What part of all others' groups each node has admitted."""
    total = published(nodes)
    return [s["groups_admitted"] / (total - s["groups_published"]) for s in (node.status() for node in nodes)]


def test_two_nodes_exchange_within_a_second():
    async def main() -> None:
        swarm = Swarm()
        first = await swarm.add(**WANT_ALL)
        second = await swarm.add(**WANT_ALL)
        await asyncio.sleep(2)
        await publish(first)
        await publish(second)
        await asyncio.sleep(1)
        for node, other in ((first, second), (second, first)):
            drawn = node.member.sample(10)
            assert len(drawn) == 4
            assert {group.author for group in drawn} == {other.id}
            assert all(0 <= group.age_s <= 1.1 and 0 < sum(group.rewards) < 4 for group in drawn)
            assert node.member.sample(10) == []
            assert node.status()["groups_missing"] == 16
            assert node.status()["warnings"] == []
        await swarm.close()

    simulate(main())


def test_a_node_alone_says_so_and_is_joined_later():
    async def main() -> None:
        swarm = Swarm()
        alone = await swarm.add()
        await asyncio.sleep(20)
        assert alone.status()["state"] == "alone"
        assert alone.status()["warnings"] == [
            "no peers: none is known; others join through one of this node's addresses"
        ]
        await swarm.add()
        await asyncio.sleep(1)
        assert alone.status()["state"] == "joined"
        assert alone.status()["warnings"] == []
        await swarm.close()

    simulate(main())


def test_dead_peers_at_the_start_are_tried_until_one_answers():
    async def main() -> None:
        swarm = Swarm()
        bootstrap = await swarm.add(rescore=None)
        address, identity = bootstrap.address, bootstrap.member.local.identity
        await swarm.remove(bootstrap)
        node = await swarm.add(peers=(address,))
        await asyncio.sleep(300)
        assert node.status()["state"] == "joining"
        [warning] = node.status()["warnings"]
        assert warning == "no peers: none of 1 known addresses answers; learning alone, and trying again"
        await swarm.add(identity=identity, peers=(), rescore=None)
        await asyncio.sleep(60)
        assert node.status()["state"] == "joined"
        assert node.status()["given_peers"] == {address: "joined"}
        await swarm.close()

    simulate(main())


def test_one_live_peer_among_dead_ones_is_enough():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add() for _ in range(4)]
        gone = await swarm.add()
        address = gone.address
        await swarm.remove(gone, kill=True)
        late = await swarm.add(peers=(address, nodes[2].address))
        await asyncio.sleep(30)
        assert late.status()["num_outbound"] >= 3
        await swarm.close()

    simulate(main())


def test_a_late_joiner_gets_what_was_published_before():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add(**WANT_ALL) for _ in range(6)]
        await asyncio.sleep(10)
        for _ in range(5):
            for node in nodes:
                await publish(node)
            await asyncio.sleep(5)
        late = await swarm.add(**WANT_ALL)
        await asyncio.sleep(20)
        assert late.status()["groups_admitted"] == published(nodes) == 120
        await swarm.close()

    simulate(main())


def test_groups_outlive_their_author():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add(**WANT_ALL) for _ in range(4)]
        await asyncio.sleep(10)
        await publish(nodes[3])
        await asyncio.sleep(3)
        await swarm.remove(nodes[3], kill=True)
        late = await swarm.add(**WANT_ALL)
        await asyncio.sleep(30)
        assert late.status()["groups_admitted"] == 4
        assert {group.author for group in late.member.sample(4)} == {nodes[3].id}
        await swarm.close()

    simulate(main())


def test_a_node_pulls_no_more_than_it_wants():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add(reserve_groups=5) for _ in range(6)]
        await asyncio.sleep(10)
        for _ in range(10):
            for node in nodes:
                await publish(node, num_groups=8)
            await asyncio.sleep(5)
        for node in nodes:
            assert node.status()["frames_pulled"] == node.status()["pool_groups"] == 5
            node.member.sample(4)
        await asyncio.sleep(2)
        assert [node.status()["frames_pulled"] for node in nodes] == [9] * 6
        await swarm.close()

    simulate(main())


@pytest.mark.no_cover
def test_a_partition_of_sixteen_is_forgotten_half_a_minute_after_it_heals():
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add(**WANT_ALL) for _ in range(16)]
        await asyncio.sleep(20)

        async def rounds(num: int) -> None:
            for _ in range(num):
                for node in nodes:
                    await publish(node, num_groups=2)
                await asyncio.sleep(5)

        await rounds(2)
        swarm.network.partition([node.id for node in nodes[:8]], [node.id for node in nodes[8:]])
        await rounds(12)
        parted = shares(nodes)
        assert max(parted) < 0.7
        swarm.network.heal()
        await asyncio.sleep(30)
        assert min(shares(nodes)) >= 0.99
        await swarm.close()

    simulate(main())


def test_most_arrives_while_messages_are_lost_repeated_and_overtaken():
    async def main() -> None:
        swarm = Swarm(faults=Faults(loss=0.05, duplication=0.1, reordering=0.1))
        nodes = [await swarm.add(**WANT_ALL) for _ in range(8)]
        await asyncio.sleep(20)
        for _ in range(6):
            for node in nodes:
                await publish(node)
            await asyncio.sleep(5)
        await asyncio.sleep(40)
        assert min(shares(nodes)) >= 0.99
        for node in nodes:
            assert node.status()["num_rejected"] == 0
        await swarm.close()

    simulate(main())


def test_flipped_bytes_are_refused_and_what_was_meant_arrives_nevertheless():
    async def main() -> None:
        swarm = Swarm(faults=Faults(corruption=0.02))
        nodes = [await swarm.add(**WANT_ALL) for _ in range(8)]
        await asyncio.sleep(20)
        for _ in range(6):
            for node in nodes:
                await publish(node)
            await asyncio.sleep(5)
        await asyncio.sleep(60)
        texts = {node.id: set[str]() for node in nodes}
        for node in nodes:
            for group in node.member.sample(4000):
                texts[group.author].update(completion.text for completion in group.group.completions)
        assert min(shares(nodes)) >= 0.95
        assert all(len(found) <= 6 * 4 * 4 for found in texts.values())  # nothing that nobody wrote
        assert sum(node.status()["num_rejected"] for node in nodes) > 0
        await swarm.close()

    simulate(main())


def test_outbound_neighbours_come_from_several_sources():
    async def main() -> None:
        swarm = Swarm()
        first = await swarm.add()
        for _ in range(29):
            await swarm.add(peers=(first.address,))
        await asyncio.sleep(60)
        for node in swarm.nodes[1:]:
            sources = {link.source for link in node.member.neighbours.outbound()}
            assert len(node.member.neighbours.outbound()) >= 3
            assert len(sources) >= 2
            assert len(node.member.neighbours.inbound()) <= 16
        await swarm.close()

    simulate(main())


def test_state_survives_a_restart(tmp_path):
    async def main() -> None:
        swarm = Swarm()
        nodes = [await swarm.add(**WANT_ALL) for _ in range(4)]
        node = await swarm.add(state_path=tmp_path / "swarm.state", **WANT_ALL)
        await asyncio.sleep(10)
        for other in nodes:
            await publish(other)
        await publish(node)
        await asyncio.sleep(5)
        used = node.member.sample(6)
        left = {group.key for group in node.member.pool.entries()}
        scores = {other.id: node.member.local.reputation.score(other.id, node.member.local.clock()) for other in nodes}
        sequence = node.member._sequence
        identity = node.member.local.identity
        await swarm.remove(node)
        again = await swarm.add(identity=identity, peers=(), state_path=tmp_path / "swarm.state", **WANT_ALL)
        await asyncio.sleep(20)
        assert again.status()["num_outbound"] >= 3  # through peers that it remembers alone
        assert {group.key for group in again.member.pool.entries()} == left
        drawn = again.member.sample(100)
        assert len(drawn) == 10
        texts = {group.group.completions[0].text for group in used}
        assert not texts & {group.group.completions[0].text for group in drawn}
        for other_id, score in scores.items():
            assert again.member.local.reputation.score(other_id, again.member.local.clock()) > 0.9 * score > 0
        await publish(again)
        assert again.member._sequence > sequence
        await asyncio.sleep(5)
        assert all(other.member.local.refusals[Reason.CONFLICT] == 0 for other in nodes)
        await swarm.close()

    simulate(main())


def test_after_a_crash_nothing_is_used_again_and_numbers_still_grow(tmp_path):
    async def main() -> None:
        swarm = Swarm()
        other = await swarm.add(**WANT_ALL)
        node = await swarm.add(state_path=tmp_path / "swarm.state", save_s=5, **WANT_ALL)
        await asyncio.sleep(10)
        await publish(other)
        await asyncio.sleep(12)
        saved = (tmp_path / "swarm.state").read_bytes()  # with an unused pool
        assert len(node.member.sample(4)) == 4
        await publish(node)
        sequence, identity = node.member._sequence, node.member.local.identity
        await swarm.remove(node, kill=True)
        (tmp_path / "swarm.state").write_bytes(saved)  # what a kill would have left
        swarm.network.revive(identity.node_id)
        again = await swarm.add(identity=identity, peers=(), state_path=tmp_path / "swarm.state", **WANT_ALL)
        await asyncio.sleep(20)
        assert again.member.sample(4) == []
        await publish(again)
        assert again.member._sequence > sequence
        await swarm.close()

    simulate(main())


def test_a_node_that_is_killed_again_and_again_takes_no_number_twice(tmp_path):
    async def main() -> None:
        swarm = Swarm()
        other = await swarm.add(**WANT_ALL)
        sequences, settings = list[int](), {**WANT_ALL, "state_path": tmp_path / "swarm.state", "save_s": 30}
        node = await swarm.add(**settings)
        await publish(node)
        await asyncio.sleep(40)  # it has saved once
        for _ in range(3):
            await publish(node)
            sequences.append(node.member._sequence)
            await asyncio.sleep(3)
            identity, saved = node.member.local.identity, (tmp_path / "swarm.state").read_bytes()
            await swarm.remove(node, kill=True)
            (tmp_path / "swarm.state").write_bytes(saved)  # what a kill would have left
            swarm.network.revive(identity.node_id)
            node = await swarm.add(identity=identity, peers=(other.address,), **settings)
            await asyncio.sleep(5)
        assert sequences == sorted(set(sequences))
        assert other.status()["refusals"].get("conflict", 0) == 0
        await swarm.close()

    simulate(main())


def test_a_node_that_is_killed_right_after_its_first_links_comes_back_to_them(tmp_path):
    async def main() -> None:
        swarm, path = Swarm(), tmp_path / "swarm.state"
        node = await swarm.add(state_path=path, save_s=3600)
        await asyncio.sleep(20)  # as a bootstrap waits for the first that comes
        others = {(await swarm.add(peers=(node.address,))).member.node_id for _ in range(2)}
        await asyncio.sleep(5)
        identity, saved = node.member.local.identity, path.read_bytes()
        await swarm.remove(node, kill=True)
        path.write_bytes(saved)  # what a kill would have left
        swarm.network.revive(identity.node_id)
        again = await swarm.add(identity=identity, peers=(), state_path=path, save_s=3600)
        await asyncio.sleep(3)  # the others have not tried to find it again by then
        assert set(again.member.neighbours.ids) == others
        await swarm.close()

    simulate(main())


def test_a_verifier_with_a_bug_stops_its_node_and_no_other():
    async def main() -> None:
        async def buggy(group: object) -> Any:
            raise KeyError("no such task")

        swarm = Swarm()
        good = await swarm.add(**WANT_ALL)
        bad = await swarm.add(rescore=buggy, **WANT_ALL)
        await asyncio.sleep(3)
        await publish(good)
        with pytest.raises(KeyError, match="no such task"):
            await asyncio.wait_for(bad.member.wait_failed(), 5)
        assert [type(error) for error in swarm.failures] == [KeyError]
        swarm.failures.clear()
        await swarm.close()

    simulate(main())


def test_a_bootstrap_relays_and_pulls_nothing():
    async def main() -> None:
        swarm = Swarm()
        bootstrap = await swarm.add(rescore=None)
        nodes = [await swarm.add(peers=(bootstrap.address,), **WANT_ALL) for _ in range(3)]
        await asyncio.sleep(10)
        for node in nodes:
            await publish(node)
        await asyncio.sleep(5)
        assert min(shares(nodes)) == 1.0
        assert bootstrap.status()["frames_pulled"] == bootstrap.status()["pool_groups"] == 0
        assert all(peer["role"] == "trainer" for peer in bootstrap.status()["peers"])
        await swarm.close()

    simulate(main())


@pytest.mark.no_cover
def test_membership_alone_costs_little():
    """Nothing is published: what is left is the directory, greetings, pings and the search for groups."""

    async def main(num_nodes: int) -> float:
        swarm = Swarm()
        nodes = [await swarm.add() for _ in range(num_nodes)]
        await asyncio.sleep(180)  # they know one another by then
        before = sum(node.transport.traffic.bytes_in for node in nodes)
        await asyncio.sleep(600)
        spent = sum(node.transport.traffic.bytes_in for node in nodes) - before
        await swarm.close()
        return spent / num_nodes / 10

    found: dict[int, float] = {}
    for num_nodes in (8, 100):

        async def measure(num_nodes: int = num_nodes) -> None:
            found[num_nodes] = await main(num_nodes)

        simulate(measure())
    assert found[8] < 3_000, found  # bytes per node and minute
    assert found[100] < 6_000, found
