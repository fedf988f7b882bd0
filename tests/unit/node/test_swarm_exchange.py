"""Whole nodes in one process: they exchange groups over the memory transport, in virtual time."""

import asyncio
import random
import threading
import time
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config import RunConfig
from node.metrics import read_rows
from node.swarm_exchange import SwarmExchange
from protocol import member as member_module
from protocol.about import NodeAbout
from protocol.admission import Rescored
from protocol.config import SwarmConfig
from protocol.identity import Identity
from protocol.member import Member
from protocol.messages import TaskRef
from protocol.shards import record_validator
from protocol.transport import virtual_time
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport
from protocol.transport.virtual_time import virtual_clock
from swarm.types import Completion, RolloutGroup, Segment, Task

ROUND_S = 0.5  # of virtual time
CONFIG = RunConfig.model_validate(
    {
        "rounds": 60,
        "sapo": {"num_local": 4, "num_external": 4},
        "evaluation": {"num_items": 0},
        "checkpoint": {"interval_s": 1e9},
    }
)


class Judge:
    """An answer is right if it is 0 or 1, as in the other tests of nodes."""

    def __init__(self, error=None, most=None):
        """`most`: completions of a group that it looks at."""
        self.error, self.most, self.closed = error, most, False

    async def __call__(self, group):
        if self.error is not None:
            raise self.error
        taken = group.completions[: self.most]
        rewards = tuple(float(one.text in "01") for one in taken)
        completions = tuple(Completion(n, (7,), (), (), "stop") for n in range(len(rewards)))
        texts = tuple(one.text for one in taken)
        own = RolloutGroup(Task(group.task, "?"), (9,), completions, texts, rewards)
        return Rescored("scored", rewards, len(set(rewards)) > 1, own)

    async def wait_ready(self):
        pass

    async def close(self):
        self.closed = True


class PacedExchange(SwarmExchange):
    """Lets virtual time pass in every round, which the work of threads does not."""

    async def sample(self, num_groups):
        await asyncio.sleep(ROUND_S)
        return await super().sample(num_groups)


class Swarm:
    """Some nodes, each with a run folder of its own."""

    def __init__(self, harness):
        self.clock = virtual_clock()
        self.network = MemoryNetwork(random.Random(0), Faults(latency_s=(0.001, 0.01)), self.clock)
        self._harness = harness
        self.first_address = None
        self.identities = {}

    def run(self, name, *, peers=None, judge=None, config=CONFIG):
        """Return a harness whose node joins through the first one."""
        identity = self.identities.setdefault(name, Identity(Ed25519PrivateKey.generate()))
        run = self._harness(name, config=config)
        run.judge = judge or Judge()
        given = peers if peers is not None else ((self.first_address,) if self.first_address else ())

        async def make_member(rescore, about):
            transport = MemoryTransport(self.network, identity.node_id, record_validator("main"))
            run.member = Member(
                identity,
                transport,
                SwarmConfig(peers=given, reserve_groups=8),
                rescore=rescore,
                about=about,
                state_path=run.path / "swarm.msgpack",
                clock=self.clock,
                rng=random.Random(name),
            )
            return run.member

        def on_started(member):
            self.first_address = self.first_address or member.addresses[0]

        run.exchange = PacedExchange(
            make_member,
            lambda parts: run.judge,
            config.sapo,
            NodeAbout("trainer", "test", "number", ("numbers",)),
            note=run.display.note,
            on_started=on_started,
        )
        return run

    async def start(self, name, **settings):
        """Return a harness whose exchange runs, and nothing else."""
        run = self.run(name, **settings)
        run.path.mkdir()
        await run.exchange.start()
        run.exchange.attach(None)
        return run


def test_two_nodes_train_on_each_others_groups_and_publish_those_that_teach(harness):
    async def main():
        swarm = Swarm(harness)
        runs = [swarm.run("a")]
        tasks = [asyncio.ensure_future(runs[0].node().run())]
        await asyncio.sleep(1)
        runs.append(swarm.run("b"))
        tasks.append(asyncio.ensure_future(runs[1].node().run()))
        await asyncio.sleep(20)
        status = runs[0].exchange.status()
        await asyncio.gather(*tasks)
        return runs, status

    runs, status = virtual_time.run(main())
    assert [peer["node_id"] for peer in status["peers"]] == [runs[1].member.node_id]
    assert status["groups_published"] > 0
    for run in runs:
        rows = read_rows(run.folder.metrics)
        assert len(rows) == 60
        assert sum(row["num_external"] for row in rows) > 50
        assert all(row["num_local"] + min(row["num_external"], 4) == 8 for row in rows)
        assert all(row["num_external"] <= 4 + row["num_groups_zero_advantage"] for row in rows)
        assert all(row["num_external_missing"] == max(0, 4 - row["num_external"]) for row in rows)
        assert sum(row["num_admitted"] for row in rows) >= sum(row["num_external"] for row in rows)
        assert sum(row["bytes_in"] for row in rows) > 1000
        assert max(row["num_peers"] for row in rows) == 1
        assert any(row["reward_external_mean"] for row in rows)
        assert run.judge.closed
        assert "joined the swarm: 1 peer" in run.display.notes
    assert runs[0].exchange.about().rollouts_per_minute > 0


def written(index):
    """A group of which half of the completions are right."""
    completions = tuple(Completion(n, (n,), (-0.5,), (), "stop") for n in range(4))
    task = Task(TaskRef("numbers", "0" * 32, 0, index), "?")
    return RolloutGroup(task, (1,), completions, ("0", "1", "7", "8"), (1.0, 1.0, 0.0, 0.0))


def test_what_comes_before_the_model_is_loaded_waits_and_is_judged_then(harness):
    async def main():
        swarm = Swarm(harness)
        early = swarm.run("early")
        early.path.mkdir()
        await early.exchange.start()
        early.exchange.attach(None)
        late = swarm.run("late")
        late.path.mkdir()
        await late.exchange.start()
        loaded, loading = early.exchange, late.exchange
        await asyncio.sleep(5)
        await loaded.publish([written(index) for index in range(3)])
        await asyncio.sleep(5)
        before = loading.status()
        assert await loading.sample(4) == []
        loading.attach(None)
        await asyncio.sleep(1)
        groups = await loading.sample(4)
        for exchange in (loading, loaded):
            await exchange.close()
        return before, groups, late.judge.closed

    before, groups, closed = virtual_time.run(main())
    assert (before["num_peers"], before["frames_under_way"], before["groups_admitted"]) == (1, 3, 0)
    assert [group.rewards for group in groups] == [(1.0, 1.0, 0.0, 0.0)] * 3
    assert closed


def with_right(index, num_right, num=32):
    """A group of which so many completions are right."""
    group = written(index)
    texts = ("0",) * num_right + ("7",) * (num - num_right)
    return replace(
        group, completions=group.completions[:1] * num, texts=texts, rewards=tuple(float(t == "0") for t in texts)
    )


@pytest.mark.parametrize("sampling", ["uniform", "value"])
def test_groups_are_drawn_by_what_they_teach_where_that_is_wanted(harness, sampling):
    sapo = CONFIG.sapo.model_copy(update={"sampling": sampling, "uniform_share": 0.0})
    config = CONFIG.model_copy(update={"sapo": sapo})

    async def main():
        swarm = Swarm(harness)
        giver, taker = await swarm.start("giver"), await swarm.start("taker", config=config)
        await asyncio.sleep(5)
        drawn = []
        for number in range(20):
            await taker.exchange.publish([with_right(10_000 + number, 0)])
            await giver.exchange.publish([with_right(100 * number + index, 1 + 15 * (index % 2)) for index in range(8)])
            await asyncio.sleep(5)
            drawn += await taker.exchange.sample(2)
            await taker.exchange.sample(100)
        for run in (taker, giver):
            await run.exchange.close()
        return [sum(group.rewards) for group in drawn]

    drawn = virtual_time.run(main())
    share_of_half_right = sum(one == 16 for one in drawn) / len(drawn)
    assert len(drawn) == 40
    # By value 0.99 against 0.11 each: nine in ten. By chance a half, with a deviation below 0.1.
    assert (share_of_half_right > 0.75) == (sampling == "value")


def test_a_group_with_more_completions_than_this_node_takes_counts_by_those_that_it_takes(harness):
    async def main():
        swarm = Swarm(harness)
        giver, taker = await swarm.start("giver"), await swarm.start("taker", judge=Judge(most=4))
        await asyncio.sleep(5)
        await giver.exchange.publish([with_right(1, 2)])
        await asyncio.sleep(5)
        groups = await taker.exchange.sample(4)
        for run in (taker, giver):
            await run.exchange.close()
        return groups

    assert [group.rewards for group in virtual_time.run(main())] == [(1.0, 1.0, 0.0, 0.0)]


def test_leaving_before_the_model_is_loaded_waits_for_nothing(harness):
    async def main():
        run = Swarm(harness).run("mine")
        run.path.mkdir()
        await run.exchange.start()
        await run.exchange.close()
        return run.judge.closed

    assert not virtual_time.run(main())


def test_a_node_that_is_cut_off_learns_alone_and_comes_back_without_a_restart(harness):
    async def main():
        swarm = Swarm(harness)
        config = CONFIG.model_copy(update={"rounds": 300})
        a = swarm.run("a", config=config)
        tasks = [asyncio.ensure_future(a.node().run())]
        await asyncio.sleep(1)
        b = swarm.run("b", config=config)
        tasks.append(asyncio.ensure_future(b.node().run()))
        await asyncio.sleep(15)
        before = len(b.display.rounds)
        swarm.network.partition([a.member.node_id], [b.member.node_id])
        await asyncio.sleep(60)
        apart = len(b.display.rounds)
        swarm.network.heal()
        await asyncio.gather(*tasks)
        return b, before, apart

    b, before, apart = virtual_time.run(main())
    assert apart - before > 115, "half a second a round: nothing has waited for the peer"
    rows = read_rows(b.folder.metrics)
    assert sum(row["num_external"] for row in rows[apart - 40 : apart]) == 0
    assert all(row["num_local"] == 8 for row in rows[apart - 40 : apart])
    assert sum(row["num_external"] for row in rows[-60:]) > 60
    said = [note for note in b.display.notes if "swarm" in note or "alone" in note]
    assert said == [
        "joined the swarm: 1 peer",
        said[1],
        "back in the swarm: 1 peer",
    ]
    assert said[1].startswith("no peer is left")


def test_a_node_whose_peers_do_not_answer_learns_alone_until_one_does(harness):
    async def main():
        swarm = Swarm(harness)
        late = Identity(Ed25519PrivateKey.generate())
        swarm.identities["late"] = late
        probe = MemoryTransport(swarm.network, late.node_id, record_validator("main"))
        await probe.start()
        address = probe.addresses[0]
        await probe.close()
        early = swarm.run("early", peers=(address,), config=CONFIG.model_copy(update={"rounds": 200}))
        tasks = [asyncio.ensure_future(early.node().run())]
        await asyncio.sleep(15)
        alone = len(early.display.rounds)
        tasks.append(asyncio.ensure_future(swarm.run("late", peers=()).node().run()))
        await asyncio.gather(*tasks)
        return early, alone

    early, alone = virtual_time.run(main())
    assert alone > 25
    lines = [note for note in early.display.notes if "alone" in note or "joined" in note]
    assert len(lines) >= 2
    assert lines[0].startswith("the peer given does not answer")
    assert lines[1] == "joined the swarm: 1 peer"


def test_nothing_is_published_where_that_is_not_wanted(harness):
    async def main():
        swarm = Swarm(harness)
        quiet = CONFIG.model_copy(update={"sapo": CONFIG.sapo.model_copy(update={"publish": "none"})})
        run = swarm.run("quiet", config=quiet)
        await run.node().run()
        return run

    assert virtual_time.run(main()).exchange.status()["groups_published"] == 0


def test_a_verifier_that_has_a_bug_stops_the_node_with_its_error(harness):
    async def main():
        swarm = Swarm(harness)
        good = swarm.run("good")
        task = asyncio.ensure_future(good.node().run())
        await asyncio.sleep(5)
        with pytest.raises(ZeroDivisionError):
            await swarm.run("bad", judge=Judge(ZeroDivisionError("a bug"))).node().run()
        await task
        return good

    assert virtual_time.run(main()).display.rounds[-1] == 60


def test_a_restarted_node_keeps_its_identity_and_never_uses_a_sequence_number_again(harness):
    async def main():
        swarm = Swarm(harness)
        other = swarm.run("other", config=CONFIG.model_copy(update={"rounds": 200}))
        task = asyncio.ensure_future(other.node().run())
        await asyncio.sleep(1)
        first = swarm.run("mine")
        node = first.node()
        running = asyncio.ensure_future(node.run())
        await asyncio.sleep(15)
        sequence = first.member._sequence
        node.stop()
        await running
        again = swarm.run("mine", config=CONFIG.model_copy(update={"rounds": 90}))
        await again.node().run()
        await task
        return first, again, sequence, other

    first, again, sequence, other = virtual_time.run(main())
    assert again.member.node_id == first.member.node_id
    assert again.member._sequence > sequence > 0
    assert "conflict" not in other.exchange.status()["refusals"]
    assert "replayed" not in other.exchange.status()["refusals"]
    rows = read_rows(again.folder.metrics)
    assert len(rows) == 90
    assert sum(row["num_external"] for row in rows[-20:]) > 20, "it was heard again, and heard others"


def test_leaving_waits_for_a_write_that_is_under_way(tmp_path, monkeypatch):
    began, may_end, writes = threading.Event(), threading.Event(), []

    def slow_write(path, swarm_id, state):
        writes.append("begun")
        if writes.count("begun") == 2:  # the first is that of the start
            began.set()
            assert may_end.wait(60)
        writes.append("ended")

    monkeypatch.setattr(member_module, "write_state", slow_write)

    async def main():
        identity = Identity(Ed25519PrivateKey.generate())
        network = MemoryNetwork(random.Random(0))
        member = Member(
            identity,
            MemoryTransport(network, identity.node_id, record_validator("main")),
            SwarmConfig(save_s=0.01),
            rescore=None,
            about=lambda: NodeAbout("bootstrap", "test", "none", ()),
            state_path=tmp_path / "swarm.msgpack",
            clock=time.time,
            rng=random.Random(0),
        )
        await member.start()
        await asyncio.to_thread(began.wait, 60)
        closing = asyncio.ensure_future(member.close())
        for _ in range(200):  # turns of the loop: nothing but the write keeps the member
            await asyncio.sleep(0)
        assert writes == ["begun", "ended", "begun"]
        may_end.set()
        await closing

    asyncio.run(main())
    assert writes == ["begun", "ended"] * 3


def test_a_batch_says_which_versions_of_the_policy_wrote_it(harness):
    def written_by(index, *segments):
        completions = tuple(Completion(n, (n, n), (-0.5,) * 2, segments, "stop") for n in range(4))
        return replace(written(index), completions=completions)

    async def main():
        giver = await Swarm(harness).start("giver")
        await asyncio.sleep(5)
        await giver.exchange.publish(
            [written_by(1, Segment(7, 0, 2)), written_by(2, Segment(3, 0, 1), Segment(5, 1, 2))]
        )
        known = giver.exchange._member.announcements
        said = [known.get(root).announcement.policy_versions for root in known.roots()]
        await giver.exchange.close()
        return said

    assert virtual_time.run(main()) == [(3, 5, 7)]
