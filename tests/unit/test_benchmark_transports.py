"""What the comparison of transports counts: latencies from each publication, what is missing, what a rollout costs."""

import pytest
from _transport_nodes import moments, summary
from transports import bars_of

USED = {
    "announcements_seen": 6,
    "batches_heard": 4,
    "frames_pulled": 5,
    "groups_admitted": 4,
    "bytes_in": 3200,
    "cpu_s": 0.16,
    "requests_failed": 1,
}


def answer(published, admitted):
    return {"published": published, "admitted": admitted, "used": USED}


def test_every_group_has_a_moment_of_its_own():
    """A node remembers the newest 32 batches of one author: more of them at once would push out what is not pulled."""
    found = moments(0, 0, 40, 5.0)
    assert found == sorted(found)
    assert len(set(found)) == 40
    assert found[0] < 1 < 4 < found[-1] < 5
    assert max(sum(start <= one < start + 1 for one in found) for start in found) < 32
    assert moments(1, 0, 40, 5.0) != found != moments(0, 40, 40, 5.0)


def test_latency_runs_from_each_publication_and_costs_are_shared_by_what_was_delivered():
    answers = [
        answer([[0, 100.0], [1, 103.0]], [[5, 0, 101.5]]),
        answer([[0, 101.0], [1, 104.0]], [[3, 0, 100.25], [3, 1, 103.75]]),
    ]
    found = summary(answers, [3, 5], 2, since_s=99.0)
    assert (found["num_groups_wanted"], found["delivered"]) == (4, 0.75)
    assert (found["latency_p50_s"], found["latency_max_s"], found["last_after_s"]) == (0.5, 0.75, 4.75)
    assert found["announcements_heard_again"] == 0.5
    assert found["bodies_twice"] == 0.25
    assert found["bytes_in_per_rollout"] == pytest.approx(6400 / 24)
    assert found["cpu_ms_per_rollout"] == pytest.approx(320 / 24)


def test_a_swarm_that_did_not_end_holds_no_bar():
    bars = bars_of("libp2p", 48, None)
    assert [(bar.value, bar.holds) for bar in bars] == [(None, False)] * 3


def test_churn_is_held_to_bars_of_its_own():
    found = {"delivered": 1.0, "latency_p50_s": 0.2, "bodies_twice": 0.0}
    churn = {"delivered": 0.5, "recovered_s": 3.0, "newcomers_delivered": 1.0}
    assert [bar.holds for bar in bars_of("hivemind", 16, found | {"churn": churn})] == [True] * 3 + [False, True, True]
