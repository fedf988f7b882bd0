"""The smaller parts of a member: appetite, clocks, background tasks, settings."""

import asyncio

import pytest
from pydantic import ValidationError

from protocol.clocks import ClockOffsets
from protocol.config import SwarmConfig
from protocol.counters import Means
from protocol.gossip import Appetite
from protocol.tasks import Tasks


def test_a_node_that_pulls_wants_to_hear_and_one_that_does_not_has_enough():
    appetite = Appetite()
    for at_s in range(0, 300, 10):
        appetite.pulled("a", 10, at_s)
        appetite.heard("a", 8, at_s)
    assert appetite.quiet_s(300) == 0
    for number in range(1000):
        appetite.heard(f"another {number}", 8, 300)
    assert 30 < appetite.quiet_s(300) <= 61
    assert appetite.quiet_s(3000) == 0


def test_an_author_of_whom_nothing_is_pulled_cannot_still_the_appetite_for_others():
    appetite = Appetite()
    for at_s in range(0, 300, 10):
        appetite.pulled("useful", 4, at_s)
        for _ in range(100):
            appetite.heard("useless", 64, at_s)
    assert appetite.quiet_s(300) == 0
    for _ in range(100):
        appetite.heard("useful", 64, 300)
    assert appetite.quiet_s(300) > 0


def test_the_odd_clock_is_told_and_a_close_one_is_not():
    clocks = ClockOffsets()
    assert (clocks.median_s, clocks.warning) == (None, None)
    for number in range(5):
        clocks.note(f"peer {number}", 1.0 + 0.1 * number)
    clocks.note("liar", 10_000.0)
    assert clocks.warning is None
    for number in range(5):
        clocks.note(f"peer {number}", -30.0)
    assert clocks.warning is not None
    assert clocks.warning.startswith("the clock is 30 s ahead of those of 6 peers: set it")
    clocks.note_refused("stranger", "your clock is 300 s behind mine")
    assert "30 s" in clocks.warning  # one that refuses is outweighed by those that do not
    for number in range(1000):
        clocks.note_refused(f"other {number}", "your clock is 300 s behind mine")
    assert clocks.warning == "64 peers refuse this node for its clock: your clock is 300 s behind mine"


def test_no_background_task_dies_unnoticed():
    async def main() -> None:
        tasks, ended = Tasks(), asyncio.Event()

        async def bug() -> None:
            raise RuntimeError("a bug")

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        tasks.spawn(forever(), "forever")
        await asyncio.sleep(0)
        assert len(tasks) == 1
        tasks.spawn(bug(), "bug")
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(tasks.wait_failed(), 1)
        await tasks.close()
        assert ended.is_set()
        assert len(tasks) == 0
        tasks.spawn(bug(), "too late")
        assert len(tasks) == 0

    asyncio.run(main())


def test_settings_refuse_what_they_do_not_know_or_cannot_be():
    assert SwarmConfig().reserve_groups == 5
    ids = ({"swarm_id": text} for text in ("x" * 65, "", "a\tb", "a\x9bm"))
    for wrong in (*ids, {"resrve_groups": 5}, {"num_outbound": 2}, {"ban_s": 0}):
        with pytest.raises(ValidationError):
            SwarmConfig.model_validate(wrong)
    assert all(field.description for field in SwarmConfig.model_fields.values())


def test_means_are_of_the_last_values():
    means = Means()
    assert (means.mean, means.largest, means.quantile(0.5)) == (None, None, None)
    for value in range(1000):
        means.add(value)
    assert means.largest == 999
    assert means.mean == pytest.approx(871.5)
    assert means.quantile(0.5) == 872
