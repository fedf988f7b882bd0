"""Every measure against numbers that were worked out by hand."""

import pytest

from node.experiment.measures import bootstrap, measure, oscillation, paired
from node.experiment.record import NodeRecord, UnitRecord


def node(rewards, heldout=(), **columns):
    length = len(rewards)
    filled = {
        "num_groups": [4] * length,
        "num_groups_zero_advantage": [1] * length,
        "num_external": [3] * length,
        "num_external_missing": [1] * length,
        "num_tokens_generated": [10] * length,
        "num_completions": [8] * length,
    }
    return NodeRecord({}, {"reward_mean": rewards, **filled, **columns}, list(heldout), {}, {}, {}, 0, 0)


def unit(*nodes):
    return UnitRecord("4/4", "4-4", 1, "memory", {}, {}, nodes, 2.0, 3.0)


def test_reward_is_summed_over_rounds_and_averaged_over_nodes():
    found = measure(unit(node([0.1, 0.2, 0.3]), node([0.5, 0.5, 0.5])))
    assert found["reward_cumulative"] == pytest.approx((0.6 + 1.5) / 2)
    assert found["num_tokens_generated"] == 60
    assert found["zero_advantage_share"] == 0.25
    assert (found["wall_s"], found["cpu_s"]) == (2.0, 3.0)


def test_held_out_is_of_the_last_evaluation_of_each_node_and_its_mean_leaves_out_the_one_before_training():
    first, second = [(0, 0.1), (5, 0.3), (10, 0.2)], [(0, 0.1), (5, 0.4), (10, 0.8)]
    found = measure(unit(node([0.0], first), node([0.0], second)))
    assert found["heldout_after"] == pytest.approx(0.5)
    assert (found["heldout_after_least"], found["heldout_after_most"]) == (0.2, 0.8)
    assert found["heldout_mean"] == pytest.approx((0.25 + 0.6) / 2)
    assert found["oscillation"] == pytest.approx(((0.1 / 3) / 0.3 + 0) / 2)


def test_what_was_not_measured_is_none():
    found = measure(unit(node([0.5], num_external=[0], num_external_missing=[0])))
    assert found["heldout_after"] is found["heldout_mean"] is found["oscillation"] is None
    assert found["external_missing_share"] is None


def test_missing_groups_count_from_the_fourth_round_on():
    missing = node([0.0] * 5, num_external=[0, 0, 0, 3, 4], num_external_missing=[4, 4, 4, 1, 0])
    assert measure(unit(missing))["external_missing_share"] == 1 / 8


def test_oscillation_is_the_mean_distance_below_the_best_so_far_in_parts_of_the_best():
    assert oscillation([0.1, 0.2, 0.2, 0.4]) == 0
    assert oscillation([0.4, 0.2, 0.4, 0.0]) == pytest.approx((0 + 0.2 + 0 + 0.4) / 4 / 0.4)
    assert oscillation([0.0, 0.0]) == 0
    assert oscillation([]) == 0
    # learning and forgetting at once weighs more than a slow rise, whatever the height
    assert oscillation([0.2, 0.6, 0.2, 0.6]) == pytest.approx(oscillation([0.1, 0.3, 0.1, 0.3]))


def test_an_interval_over_seeds_lies_around_the_mean_and_is_the_same_every_time():
    found = bootstrap([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found["mean"] == 3.0
    assert found == bootstrap([1.0, 2.0, 3.0, 4.0, 5.0])
    # The mean of five draws from 1 … 5 has a standard deviation of sqrt(2 / 5): about 1.96 of them on both sides.
    assert found["low"] == pytest.approx(3 - 1.96 * 0.632, abs=0.15)
    assert found["high"] == pytest.approx(3 + 1.96 * 0.632, abs=0.15)
    assert bootstrap([2.0, 2.0, 2.0])["high"] == 2.0
    assert bootstrap([7.0])["low"] is None


def test_a_pair_of_arms_is_compared_seed_by_seed():
    found = paired([2.0, 4.0, 6.0], [1.0, 3.0, 5.0])
    assert found["difference"]["mean"] == found["difference"]["low"] == found["difference"]["high"] == 1.0
    assert found["ratio"]["mean"] == pytest.approx(12 / 9)
    assert found["ratio"]["per_seed"] == pytest.approx([2.0, 4 / 3, 1.2])
    assert 1.2 <= found["ratio"]["low"] < found["ratio"]["high"] <= 2.0
    assert "ratio" not in paired([1.0, 2.0], [0.0, 0.0])
