"""Peers that lie, flood and replay, against whole members over the memory transport."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from _attacker import Attacker, attack
from _swarm import Node, Swarm, write_group

from protocol.digests import leaf_of
from protocol.messages import SharedCompletion, SharedGroup
from protocol.signing import sign_announcement
from protocol.transport import virtual_time
from protocol.transport.base import RequestRefused, TransportError
from protocol.wire import encode_frame

WANT_ALL: dict[str, Any] = {"reserve_groups": 4000, "max_rescore_queue": 4000, "max_author_share": 1.0}


def simulate(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


def short_groups(rng: random.Random, num: int) -> list[SharedGroup]:
    return [write_group(rng, num_completions=4, num_chars=80) for _ in range(num)]


def test_ten_thousand_bad_announcements_none_admitted_and_each_counted():
    async def main() -> None:
        swarm = Swarm()
        generous = {"max_announcements_per_s": 1e6, "max_newcomers_per_s": 1e6, "min_reputation": -1e9}
        victim = await swarm.add(**WANT_ALL, **generous)
        honest = await swarm.add(**WANT_ALL, **generous)
        attacker, thief = await attack(swarm), await attack(swarm, 10_001)
        await asyncio.sleep(5)
        await honest.member.publish(short_groups(honest.rng, 4))
        await asyncio.sleep(2)
        known = honest.member.announcements.get(honest.member.store.roots()[0])
        assert known is not None
        assert await attacker.link(victim.id)
        frames = [encode_frame(group) for group in short_groups(swarm.rng, 1)]
        before = Counter(victim.status()["refusals"])
        admitted = victim.status()["groups_admitted"]
        rng, expected = random.Random(3), Counter[str]()
        batches: list[bytes] = []
        for number in range(10_000):
            kind = number % 6
            if kind == 0:  # signed by nobody
                made = attacker.make(frames).encoded
                batches.append(rng.randbytes(64) + made[64:])
                expected["bad_signature"] += 1
            elif kind == 1:  # one bit of the signed part flipped, where it stays a record
                whole = attacker.make(frames)
                made = bytearray(whole.encoded)
                made[whole.encoded.rindex(whole.root) + rng.randrange(32)] ^= 1 << rng.randrange(8)
                batches.append(bytes(made))
                expected["bad_signature"] += 1
            elif kind == 2:  # heard before
                batches.append(known.announcement.encoded)
                expected["duplicate"] += 1
            elif kind == 3:  # made for another swarm
                batches.append(attacker.make(frames, swarm_id="other").encoded)
                expected["bad_signature"] += 1
            elif kind == 4:  # another author's, signed by the thief
                body = known.announcement.encoded[64:]
                batches.append(thief.identity.sign(b"announcement", b"\x04main" + body) + body)
                expected["bad_signature"] += 1
            else:  # from the future, and from long ago
                batches.append(
                    attacker.make(frames, age_s=-61 - rng.random() * 1e6 if number % 12 == 5 else 601).encoded
                )
                expected["future" if number % 12 == 5 else "stale"] += 1
        for start in range(0, len(batches), 100):
            await attacker.announce(victim.id, batches[start : start + 100])
        await asyncio.sleep(10)
        assert Counter(victim.status()["refusals"]) - before == expected
        assert victim.status()["groups_admitted"] == admitted == 4
        assert attacker.num_pulled == thief.num_pulled == 0
        await swarm.close()

    simulate(main())


def test_a_liar_is_banned_soon_and_costs_little():
    async def main() -> None:
        swarm = Swarm()
        victim = await swarm.add(**WANT_ALL)
        attacker = await attack(swarm)
        await asyncio.sleep(1)
        assert await attacker.link(victim.id)
        forged = [bytes(64) + attacker.make([b"frame"]).encoded[64:] for _ in range(50)]
        await attacker.announce(victim.id, forged)
        assert victim.status()["num_banned"] == 1
        assert victim.status()["refusals"]["bad_signature"] <= 5
        for name in ("hello", "announce", "peers", "pull"):
            try:
                await attacker.transport.request(victim.id, name, b"", max_response_bytes=4096, timeout_s=2)
            except TransportError:
                continue
            raise AssertionError(f"{name} was answered")
        await swarm.close()

    simulate(main())


def test_wrong_bytes_cost_the_holder_and_never_the_author():
    async def main() -> None:
        swarm = Swarm()
        victim = await swarm.add(**WANT_ALL)
        author = await swarm.add(**WANT_ALL)
        attacker = await attack(swarm)
        await asyncio.sleep(3)
        assert await attacker.link(victim.id)
        for sequence in range(6):  # both hold it, and either may be asked
            frames = [encode_frame(group) for group in short_groups(swarm.rng, 8)]
            now_s = swarm.network.clock()
            made = sign_announcement(
                author.member.local.identity, "main", sequence=sequence, created_at_ms=int(now_s * 1000), frames=frames
            )
            author.member.store.add_own(made.root, [leaf_of(frame) for frame in frames], frames, now_s + 600)
            attacker.batches[made.root] = [frame[:-1] + bytes([frame[-1] ^ 1]) for frame in frames]
            await attacker.announce(victim.id, [made.encoded])
            await asyncio.sleep(2)
        now_s = swarm.network.clock()
        assert victim.status()["groups_admitted"] == 48
        assert victim.status()["refusals"]["wrong_digest"] == victim.status()["num_rejected"] > 0
        assert victim.member.local.reputation.score(attacker.identity.node_id, now_s) < 0
        assert victim.member.local.reputation.score(author.id, now_s) > 0
        await swarm.close()

    simulate(main())


def test_what_an_author_signed_and_no_node_takes_costs_the_author():
    async def main() -> None:
        swarm = Swarm()
        victim = await swarm.add(**WANT_ALL)
        attacker = await attack(swarm)
        await asyncio.sleep(1)
        assert await attacker.link(victim.id)
        unknown = [write_group(swarm.rng, num_completions=2, num_chars=40, source="my/own") for _ in range(3)]
        equal = SharedGroup(short_groups(swarm.rng, 1)[0].task, (SharedCompletion("#1", True),) * 4)
        twice = short_groups(swarm.rng, 1)
        harmless = [encode_frame(group) for group in (*unknown, equal, *twice, *twice)]
        await attacker.announce(victim.id, [attacker.make(harmless).encoded])
        await asyncio.sleep(3)
        assert victim.status()["refusals"] == {"duplicate": 1, "unknown_task": 3, "uninformative": 1}
        assert victim.status()["groups_admitted"] == 1
        assert victim.status()["num_rejected"] == 0
        await attacker.announce(victim.id, [attacker.make([b"no frame", b"\x28\xb5\x2f\xfd" + bytes(20)]).encoded])
        await asyncio.sleep(3)
        assert victim.status()["num_rejected"] == 2
        assert victim.member.local.reputation.score(attacker.identity.node_id, swarm.network.clock()) < -3
        await swarm.close()

    simulate(main())


def test_a_slow_holder_delays_nobody():
    async def main() -> None:
        async def admitted_after(slow: bool) -> tuple[int, float]:
            swarm = Swarm(seed=5)
            victim = await swarm.add(reserve_groups=8)
            authors = [await swarm.add(reserve_groups=8) for _ in range(4)]
            attackers = [await attack(swarm, 10_000 + number) for number in range(6)] if slow else []
            await asyncio.sleep(10)

            async def crawl(asker: str, payload: bytes) -> bytes:
                await asyncio.sleep(3600)
                raise RequestRefused("busy")

            for attacker in attackers:
                attacker.transport._dispatcher._handlers["pull"] = (crawl, 4096)
                assert await attacker.link(victim.id)
            sampled = 0
            for _ in range(40):
                for attacker in attackers:
                    frames = [encode_frame(group) for group in short_groups(swarm.rng, 8)]
                    with contextlib.suppress(RequestRefused):  # who never answers is a neighbour no more
                        await attacker.announce(victim.id, [attacker.make(frames).encoded])
                for author in authors:
                    await author.member.publish(short_groups(author.rng, 4))
                await asyncio.sleep(5)
                sampled += len(victim.member.sample(4))
            await swarm.close()
            return sampled, 0.0

        (alone, _), (beside, _) = await admitted_after(False), await admitted_after(True)
        assert alone >= 0.95 * 160
        assert beside >= alone / 1.2

    simulate(main())


def measure_answers(nodes: Sequence[Node], askers: set[str]) -> list[float]:
    """Collect the CPU seconds of every request that one of `askers` has answered from now on."""
    spent_s: list[float] = []
    for node in nodes:
        dispatcher = node.transport._dispatcher

        async def timed(asker: str, name: str, payload: bytes, real: Any = dispatcher.answer) -> bytes:
            start_s = time.process_time()
            try:
                return await real(asker, name, payload)
            finally:
                if asker in askers:
                    spent_s.append(time.process_time() - start_s)

        dispatcher.answer = timed  # type: ignore[method-assign]
    return spent_s


@pytest.mark.no_cover
def test_two_hundred_throwaway_identities_get_a_quarter_of_any_batch():
    async def main() -> None:
        swarm = Swarm()
        config = {"reserve_groups": 10}
        honest = [await swarm.add(**config) for _ in range(8)]
        drawn: list[list[Any]] = []

        async def round_of_all() -> None:
            for node in honest:
                drawn.append(node.member.sample(8))
                await node.member.publish(short_groups(node.rng, 8))

        for _ in range(70):
            await asyncio.sleep(10)
            await round_of_all()
        sybils = [await attack(swarm, 20_000 + number) for number in range(200)]
        names = {sybil.identity.node_id for sybil in sybils}
        linked: list[tuple[Attacker, str]] = []
        for sybil in sybils:
            for node in honest:
                try:
                    if await sybil.link(node.id):
                        linked.append((sybil, node.id))
                except RequestRefused:
                    continue
        drawn.clear()
        spent_s = measure_answers(honest, names)
        pulled, start_s = sum(node.status()["frames_pulled"] for node in honest), asyncio.get_running_loop().time()
        for _ in range(30):
            for sybil, victim in linked:
                # Useful groups: the worst case, since nothing but who says it tells them from honest ones.
                frames = [encode_frame(group) for group in short_groups(swarm.rng, 4)]
                try:
                    await sybil.announce(victim, [sybil.make(frames).encoded])
                except TransportError:
                    continue
            await asyncio.sleep(5)
            await round_of_all()
        sizes = [len(batch) for batch in drawn]
        assert max(sum(group.author in names for group in batch) for batch in drawn) <= 2  # of 8
        assert sum(sizes) >= 0.9 * 8 * len(drawn)
        # What a node pays: seconds of CPU for what the sybils ask, and groups that it re-scores.
        seconds = asyncio.get_running_loop().time() - start_s
        assert sum(spent_s) / len(honest) < 0.1 * seconds
        assert sum(node.status()["frames_pulled"] for node in honest) - pulled <= 1.1 * sum(sizes) + 10 * len(honest)
        await swarm.close()

    simulate(main())


def test_clocks_that_are_minutes_off_are_told_so():
    async def main() -> None:
        swarm = Swarm()
        first = await swarm.add()
        close = [await swarm.add(clock_offset_s=offset_s) for offset_s in (-2.0, 2.0)]
        far = [await swarm.add(clock_offset_s=offset_s, peers=(first.address,)) for offset_s in (-300.0, 300.0)]
        await asyncio.sleep(60)
        for node in close:
            assert node.status()["num_peers"] == 2
            assert node.status()["warnings"] == []
            await node.member.publish(short_groups(node.rng, 2))
        await asyncio.sleep(5)
        assert first.status()["groups_admitted"] == 4
        for node, side in zip(far, ("behind", "ahead of"), strict=True):
            assert node.status()["state"] == "joining"
            [warning] = [line for line in node.status()["warnings"] if "refuse this node for its clock" in line]
            assert f"your clock is 300 s {side} mine: set it" in warning
        assert first.status()["refusals"]["clock_skew"] >= 2
        assert first.status()["num_rejected"] == 0
        await swarm.close()

    simulate(main())


def test_nodes_of_another_swarm_are_refused_by_name():
    async def main() -> None:
        swarm = Swarm()
        first = await swarm.add(peers=())
        other = await swarm.add(peers=(first.address,), swarm_id="other")
        await asyncio.sleep(20)
        assert first.status()["num_peers"] == other.status()["num_peers"] == 0
        assert (
            "this is swarm 'main', you are of 'other': set --swarm-id" in other.status()["given_peers"][first.address]
        )
        await swarm.close()

    simulate(main())
