"""Networks joined by bridges, in virtual time: all arrives once, as its author signed it, and nothing circles."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from _swarm import Node, Swarm, identity_of, write_group
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.about import NO_MODEL, NodeAbout
from protocol.bridge.channel import Channel, ChannelBroken, memory_channels
from protocol.bridge.side import BridgeSide
from protocol.bridge.store import BridgeStore
from protocol.config import SwarmConfig
from protocol.crawl import Crawled, crawl
from protocol.digests import leaf_of
from protocol.identity import Identity
from protocol.member import Member
from protocol.refusals import Reason
from protocol.requests import AnnounceRequest, Offer, encode_announce_request
from protocol.shards import record_validator
from protocol.signing import sign_announcement, verify_announcement
from protocol.transport import virtual_time
from protocol.transport.memory import Faults, MemoryTransport
from protocol.transport.virtual_time import virtual_clock
from protocol.wire import decode_announcement, encode_frame

WANT_ALL: dict[str, Any] = {"reserve_groups": 400, "max_rescore_queue": 400, "max_author_share": 1.0}
ABOUT = NodeAbout("bootstrap", "swarm-node/0.1.0 bridge", NO_MODEL, ())


class OtherTransport(MemoryTransport):
    """A network that the nodes of the others cannot connect to, by its name."""

    name = "other"


class OtherSwarm(Swarm):
    """Nodes on such a network."""

    transport_class = OtherTransport


def make_side(identity: Identity, swarm: Swarm, channel: Channel, kind: type[MemoryTransport]) -> BridgeSide:
    """Make a side of a bridge that joins a network through two of its nodes."""
    config = SwarmConfig(peers=tuple(node.address for node in swarm.nodes[:2]))
    store = BridgeStore(config.max_store_bytes, config.max_live_batches)
    member = Member(
        identity,
        kind(swarm.network, identity.node_id, record_validator(config.swarm_id)),
        config,
        rescore=None,
        about=lambda: ABOUT,
        state_path=None,
        clock=virtual_clock(),
        rng=random.Random(identity.node_id),
        store=store,
    )
    return BridgeSide(member, store, channel)


class Bridge:
    """Two sides in one process."""

    def __init__(self, identity: Identity, networks: tuple[Swarm, Swarm], names: tuple[type, type]) -> None:
        self.sides = [
            make_side(identity, swarm, channel, kind)
            for swarm, channel, kind in zip(networks, memory_channels(), names, strict=True)
        ]
        self.members = [side.member for side in self.sides]
        self.failing = [asyncio.create_task(side.wait_failed()) for side in self.sides]

    async def start(self) -> "Bridge":
        for side in self.sides:
            await side.start()
        return self

    def crossed(self) -> list[dict[str, Any]]:
        return [side.status()["bridge"] for side in self.sides]

    async def close(self) -> None:
        for task in self.failing:
            assert not task.done(), task.exception()
            task.cancel()
        for side in self.sides:
            await side.close()


async def bridge(seed: int, one: Swarm, other: Swarm, names: tuple[type, type] = (MemoryTransport,) * 2) -> Bridge:
    return await Bridge(identity_of(10_000_000 + seed), (one, other), names).start()


async def networks(num_networks: int, num_nodes: int, **wants: Any) -> list[Swarm]:
    swarms = [Swarm(seed=number + 1) for number in range(num_networks)]
    for swarm in swarms:
        for _ in range(num_nodes):
            await swarm.add(**(wants or WANT_ALL))
    await asyncio.sleep(5)
    return swarms


def nodes_of(swarms: list[Swarm]) -> list[Node]:
    return [node for swarm in swarms for node in swarm.nodes]


async def publish(node: Node, num_groups: int = 3) -> None:
    await node.member.publish([write_group(node.rng, num_completions=4, num_chars=80) for _ in range(num_groups)])


async def close(swarms: list[Swarm], *bridges: Bridge) -> None:
    for one in bridges:
        await one.close()
    for swarm in swarms:
        await swarm.close()


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


async def look(swarm: Swarm) -> list[Crawled]:
    """See a network as a stranger does."""
    identity = identity_of(99_999)
    transport = swarm.transport_class(swarm.network, identity.node_id, lambda *record: True)
    await transport.start()
    try:
        return await crawl(
            transport, identity, "main", [swarm.nodes[0].address], about=ABOUT, clock=virtual_clock(),
            rng=random.Random(0), timeout_s=5, max_nodes=1000,
        )  # fmt: skip
    finally:
        await transport.close()


def check_all_arrived_once(swarms: list[Swarm], num_each: int) -> None:
    """Every node has every group of every other one, and has never been given one twice."""
    nodes = nodes_of(swarms)
    for node in nodes:
        drawn = node.member.sample(1000)
        groups = [(group.author, group.group.task) for group in drawn]
        assert len(set(groups)) == len(groups) == num_each * (len(nodes) - 1)
        assert {author for author, _ in groups} == {other.id for other in nodes} - {node.id}
        status = node.status()
        assert status["frames_pulled"] == len(groups), "no frame crosses to one node twice"
        assert status["num_rejected"] == 0


def test_a_batch_reaches_the_other_network_with_its_authors_signature():
    async def main() -> None:
        swarms = await networks(2, 2)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(5)
        author, far = swarms[0].nodes[1], swarms[1].nodes[0]
        await publish(author)
        await asyncio.sleep(3)
        [root] = far.member.announcements.roots()
        heard = far.member.announcements.get(root)
        assert heard is not None
        assert heard.announcement.author == author.id
        verify_announcement("main", heard.announcement)
        ours = author.member.announcements.get(root)
        assert ours is not None
        assert heard.announcement.encoded == ours.announcement.encoded, "byte for byte"
        assert {group.author for group in far.member.sample(10)} == {author.id}
        latency = far.status()["latency"]["max_s"]
        assert latency is not None
        assert latency < 2
        assert [row["nodes_beyond"] for row in joined.crossed()] == [0, 0], "nodes of one transport would be dialled"
        await close(swarms, joined)

    simulate(main())


@pytest.mark.parametrize(
    ("num_networks", "ends"),
    [
        (2, [(0, 1)]),
        (2, [(0, 1), (0, 1)]),
        (3, [(0, 1), (1, 2), (2, 0)]),
        (3, [(0, 1), (1, 2)]),
        (3, [(0, 1), (1, 2), (2, 0), (0, 1), (2, 1)]),
    ],
    ids=["one", "two between the same", "ring", "chain", "tangle"],
)
def test_everybody_gets_everything_once_whatever_the_bridges_form(num_networks, ends):
    async def main() -> None:
        swarms = await networks(num_networks, 2)
        bridges = [await bridge(n, swarms[a], swarms[b]) for n, (a, b) in enumerate(ends)]
        await asyncio.sleep(10)
        for _ in range(3):
            for node in nodes_of(swarms):
                await publish(node)
            await asyncio.sleep(5)
        await asyncio.sleep(60)
        check_all_arrived_once(swarms, num_each=9)
        told = [row["batches_offered"] for one in bridges for row in one.crossed()]
        await asyncio.sleep(120)
        assert told == [row["batches_offered"] for one in bridges for row in one.crossed()], "nothing circles"
        assert all(row["frames_missed"] == 0 for one in bridges for row in one.crossed())
        await close(swarms, *bridges)

    simulate(main())


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    ends=st.lists(st.sampled_from([(0, 1), (1, 2), (2, 0), (1, 0), (2, 1)]), min_size=1, max_size=4),
    publishers=st.lists(st.integers(0, 5), min_size=1, max_size=4),
)
def test_any_graph_of_bridges_delivers_once_and_comes_to_rest(ends, publishers):
    """A batch reaches every network that is connected to its own, no node twice, and no bridge offers one twice."""

    async def main() -> None:
        swarms = await networks(3, 2)
        bridges = [await bridge(n, swarms[a], swarms[b]) for n, (a, b) in enumerate(ends)]
        await asyncio.sleep(8)
        for number in publishers:
            await publish(nodes_of(swarms)[number], num_groups=2)
            await asyncio.sleep(3)
        await asyncio.sleep(40)
        reach = [reachable(ends, start) for start in range(3)]
        for number, node in enumerate(nodes_of(swarms)):
            heard = [publisher for publisher in publishers if publisher // 2 in reach[number // 2]]
            drawn = node.member.sample(1000)
            assert len({group.group.task for group in drawn}) == len(drawn)
            assert len(drawn) == 2 * sum(publisher != number for publisher in heard)
            assert node.status()["frames_pulled"] == len(drawn)
        for one in bridges:
            for row in one.crossed():
                assert row["batches_offered"] <= len(publishers)
        await close(swarms, *bridges)

    simulate(main())


def reachable(ends: list[tuple[int, int]], start: int) -> set[int]:
    """The networks that bridges connect to one, itself included."""
    found = {start}
    for _ in ends:
        found |= {b for pair in ends for a, b in (pair, pair[::-1]) if a in found}
    return found


def test_bodies_cross_once_and_only_when_somebody_over_there_wants_them():
    async def main() -> None:
        swarms = await networks(2, 2, reserve_groups=0)
        for _ in range(3):
            await swarms[1].add(reserve_groups=4)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(10)
        for _ in range(10):
            await publish(swarms[0].nodes[0], num_groups=4)
            await asyncio.sleep(2)
        await asyncio.sleep(30)
        here, there = joined.crossed()
        kept = sum(node.status()["groups_admitted"] for node in swarms[1].nodes)
        assert kept == 12, "three nodes that keep four groups each, and two that keep none"
        assert there["frames_brought"] == here["frames_fetched"] <= 12 < 40
        assert here["frames_brought"] == 0
        await close(swarms, joined)

    simulate(main())


async def offer(teller: Node, side: BridgeSide, encoded: bytes, held: int = 1) -> None:
    """Announce something to a side of a bridge, as a neighbour does."""
    await teller.transport.request(
        side.member.node_id,
        "announce",
        encode_announce_request(AnnounceRequest((Offer(encoded, held),))),
        max_response_bytes=64,
        timeout_s=5,
    )


def test_what_has_come_across_is_not_offered_back_by_whom_it_was_told_to():
    async def main() -> None:
        swarms = await networks(2, 2)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(10)
        await publish(swarms[0].nodes[0])
        await asyncio.sleep(5)
        far = swarms[1].nodes[0]
        [root] = far.member.announcements.roots()
        batch = far.member.announcements.get(root)
        assert batch is not None
        await offer(far, joined.sides[1], batch.announcement.encoded, batch.all_frames)
        await asyncio.sleep(5)
        assert [row["batches_offered"] for row in joined.crossed()] == [1, 0]
        assert [row["batches_taken"] for row in joined.crossed()] == [0, 1]
        await close(swarms, joined)

    simulate(main())


def test_a_batch_that_is_heard_on_both_sides_at_once_crosses_neither_way():
    async def main() -> None:
        swarms = await networks(2, 2)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(10)
        now_ms = int(swarms[0].network.clock() * 1000)
        encoded = sign_announcement(
            identity_of(77), "main", sequence=now_ms, created_at_ms=now_ms, frames=[b"never asked for"]
        ).encoded
        for swarm in swarms:
            swarm.network.faults = Faults(latency_s=(0.02, 0.02))  # so that both hear it at the same moment
        await asyncio.gather(*(offer(s.nodes[0], side, encoded) for s, side in zip(swarms, joined.sides, strict=True)))
        await asyncio.sleep(5)
        for row in joined.crossed():
            assert (row["batches_known"], row["batches_taken"], row["batches_to_give"]) == (1, 0, 0)
        await close(swarms, joined)

    simulate(main())


def test_a_bridge_that_comes_late_brings_what_was_published_before():
    async def main() -> None:
        swarms = await networks(2, 2)
        for _ in range(4):
            await publish(swarms[0].nodes[0])
        await asyncio.sleep(3)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(30)
        assert [node.status()["groups_admitted"] for node in swarms[1].nodes] == [12, 12]
        await close(swarms, joined)

    simulate(main())


def test_a_group_is_fetched_from_whoever_has_it_when_its_author_is_gone():
    async def main() -> None:
        swarms = await networks(2, 3)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(10)
        late = joined.sides[1]
        author = swarms[0].nodes[0]
        for node in list(swarms[1].nodes):
            await swarms[1].remove(node)
        await publish(author)
        await asyncio.sleep(5)
        await swarms[0].remove(author, kill=True)
        node = await swarms[1].add(peers=(late.member.addresses[0],), **WANT_ALL)
        await asyncio.sleep(40)
        assert node.status()["groups_admitted"] == 3
        await close(swarms, joined)

    simulate(main())


def test_bridges_that_offer_each_other_a_frame_that_nobody_has_do_not_wait_for_each_other():
    took_s: list[float] = []

    def timed(bring: Any) -> Any:
        async def wrapped(*arguments: Any) -> None:
            began_s = asyncio.get_running_loop().time()
            await bring(*arguments)
            took_s.append(asyncio.get_running_loop().time() - began_s)

        return wrapped

    async def main() -> None:
        swarms = await networks(2, 1, reserve_groups=0)
        bridges = [await bridge(number, *swarms) for number in range(2)]
        for side in (side for one in bridges for side in one.sides):
            side.fetching.bring = timed(side.fetching.bring)  # type: ignore[method-assign]
        await asyncio.sleep(20)
        now_ms = int(swarms[0].network.clock() * 1000)
        announcement = sign_announcement(
            identity_of(77), "main", sequence=now_ms, created_at_ms=now_ms, frames=[b"not to be had"]
        )
        await offer(swarms[0].nodes[0], bridges[0].sides[0], announcement.encoded)
        await asyncio.sleep(5)
        one, other = (each.crossed() for each in bridges)
        assert [row["batches_to_give"] for row in (*one, *other)] == [0, 1, 1, 0], "each has it from the other"
        [known] = [side.member.announcements.get(announcement.root) for side in bridges[0].sides[:1]]
        assert known is not None
        assert bridges[1].sides[0].member.node_id in known.holders
        seeker = await swarms[1].add(peers=tuple(each.members[1].addresses[0] for each in bridges), **WANT_ALL)
        await asyncio.sleep(60)
        assert seeker.status()["groups_admitted"] == 0
        assert len(took_s) > 1, "it was looked for"
        assert max(took_s) < 1, "nobody waits for whom waits for him"
        await close(swarms, *bridges)

    simulate(main())


def test_what_is_forged_or_no_group_stops_at_the_bridge_and_its_sender_pays():
    async def main() -> None:
        swarms = await networks(2, 2)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(10)
        hostile, here = swarms[0].nodes[0], joined.members[0]
        good = [encode_frame(write_group(hostile.rng, num_completions=4, num_chars=80)) for _ in range(2)]
        now_ms = int(here.local.clock() * 1000)

        def sign(sequence: int, frames: list[bytes], swarm_id: str = "main") -> bytes:
            return sign_announcement(
                hostile.member.local.identity, swarm_id, sequence=sequence, created_at_ms=now_ms, frames=frames
            ).encoded

        forged = bytearray(sign(now_ms + 1, good))
        forged[3] ^= 1
        no_group = sign(now_ms + 2, [b"no zstd frame at all"])
        batch = decode_announcement(no_group)
        hostile.member.store.add_own(batch.root, [leaf_of(b"no zstd frame at all")], [b"no zstd frame at all"], 2e9)
        for encoded in (bytes(forged), sign(now_ms + 3, good, "another"), no_group):
            await offer(hostile, joined.sides[0], encoded)
        await asyncio.sleep(30)
        refusals = here.local.refusals
        assert refusals[Reason.BAD_SIGNATURE] == 2
        assert refusals[Reason.BAD_COMPRESSION] == 1, "once: it is not asked for again"
        assert here.local.reputation.score(hostile.id, here.local.clock()) < -5
        for node in swarms[1].nodes:
            assert node.status()["num_rejected"] == 0, "nothing of it has crossed"
            assert node.status()["frames_pulled"] == 0
        honest = swarms[0].nodes[1]
        await publish(honest)
        await asyncio.sleep(10)
        assert [node.status()["groups_admitted"] for node in swarms[1].nodes] == [3, 3]
        assert joined.members[1].local.refusals.num_rejected == 0
        await close(swarms, joined)

    simulate(main())


def test_who_looks_at_one_network_sees_the_nodes_of_the_other_and_no_node_dials_them():
    async def main() -> None:
        here, there = Swarm(seed=1), OtherSwarm(seed=2)
        for swarm in (here, there):
            for _ in range(3):
                await swarm.add()
        joined = await bridge(1, here, there, (MemoryTransport, OtherTransport))
        await asyncio.sleep(60)
        for swarm, other in ((here, there), (there, here)):
            found = await look(swarm)
            beyond = {one.record.node_id for one in found if one.is_beyond}
            assert beyond == {node.id for node in other.nodes}
            reached = {one.record.node_id for one in found if one.reachable}
            assert reached == {node.id for node in swarm.nodes} | {joined.members[0].node_id}
            for node in swarm.nodes:
                assert not beyond & {known.record.node_id for known in node.member.directory.nodes()}
                assert node.status()["requests_failed"] == 0
        await close([here, there], joined)

    simulate(main())


def test_a_side_that_is_stuck_ends_the_other_with_the_reason():
    async def never(asker: str, payload: bytes) -> bytes:
        await asyncio.sleep(10**6)
        return b""

    async def main() -> None:
        [swarm] = await networks(1, 1)
        one, other = memory_channels()
        for name in ("announce", "records"):
            other.handle(name, never, max_request_bytes=2**17)
        side = make_side(identity_of(1), swarm, one, MemoryTransport)
        await side.start()
        with pytest.raises(ChannelBroken, match="has not answered for 30 s"):
            await asyncio.wait_for(side.wait_failed(), 60)
        await side.close()
        await swarm.close()

    simulate(main())


def test_a_side_that_is_gone_ends_the_other_with_the_reason():
    async def main() -> None:
        swarms = await networks(2, 1)
        joined = await bridge(1, *swarms)
        await asyncio.sleep(5)
        await joined.sides[1].close()
        with pytest.raises(ChannelBroken, match="hung up"):
            await asyncio.wait_for(joined.failing[0], 5)
        await joined.sides[0].close()
        joined.failing[1].cancel()
        await close(swarms)

    simulate(main())
