"""When two engines' learning curves count as equal."""

from engines_learn import apart, summary


def runs(rewards, heldout=(0.5, 0.5, 0.5)):
    return [
        {"reward": reward, "pass_at_1_heldout": [0.1, value]} for reward, value in zip(rewards, heldout, strict=True)
    ]


def test_means_are_held_against_the_seeds_of_the_steadier_engine():
    found = {"torch": runs((0.1, 0.2, 0.3)), "vllm": runs((0.23, 0.25, 0.27))}
    assert apart(found, "reward") == (0.05, 0.02)


def test_nothing_is_compared_where_an_engine_or_the_noise_is_missing():
    found = {"torch": runs((0.1, 0.2, 0.3))}
    assert apart(found, "reward") == (None, 0.1)
    same = {"torch": runs((0.1, 0.2, 0.3)), "vllm": runs((0.1, 0.2, 0.3))}
    assert apart(same, "pass_at_1_heldout") == (None, 0.0)


def test_a_run_in_tenths():
    rows = [
        {"reward_mean": index / 20, "mismatch": None if index % 2 else 0.01, "load_policy_s": 0.1, "rollout_s": 1.0,
         "round_s": 2.0, "pass_at_1_heldout_before": 0.1, "pass_at_1_heldout": 0.4}
        for index in range(20)
    ]  # fmt: skip
    found = summary(rows)
    assert found["curve"] == [round((2 * at + 0.5) / 20, 4) for at in range(10)]
    assert (found["reward"], found["mismatch_max"], found["pass_at_1_heldout"]) == (0.475, 0.01, [0.1, 0.4])
    assert len(summary(rows[:3])["curve"]) == 3
