import io
import json

import pytest
from rich.console import Console

from node.config import RunConfig
from node.plot import heldout_points, plot_rewards
from node.run_folder import RunFolder
from node.summary import print_summary, summarize, write_summary


def rows(count: int):
    made = [
        {
            "round": index,
            "reward_mean": index / count,
            "reward_moving_average": index / count,
            "num_tokens_generated": 10,
            "num_completions": 2,
            "num_updates_skipped": 1,
            "scoring_outcomes": {"scored": 2},
            "rollout_s": 0.5,
            "scoring_s": 0.25,
            "update_s": 1.0,
            "load_policy_s": 0.0,
            "evaluation_s": 0.0,
            "round_s": 2.0,
            "elapsed_s": 2.0 * index,
            "peak_rss_bytes": index * 2**20,
        }
        for index in range(1, count + 1)
    ]
    made[0]["pass_at_1_heldout_before"] = 0.05
    made[-1]["pass_at_1_heldout"] = 0.75
    return made


def test_the_summary_adds_up():
    summary = summarize(RunConfig(rounds=40), rows(40), "finished")
    assert summary["rounds"] == 40
    assert (summary["pass_at_1_heldout_before"], summary["pass_at_1_heldout_after"]) == (0.05, 0.75)
    assert summary["seconds"] == {
        "rollout": 20.0, "scoring": 10.0, "update": 40.0, "load_policy": 0.0, "evaluation": 0.0,
    }  # fmt: skip
    assert summary["num_tokens_generated"] == 400
    assert summary["scoring_outcomes"] == {"scored": 80}
    assert summary["elapsed_s"] == 80.0
    assert summary["reward_total"] == 20.5
    assert len(summary["reward_curve"]) == 20
    assert summary["reward_curve"][0] == pytest.approx([2, 1.5 / 40])
    assert summary["stopped_by"] == "finished"
    assert {"torch", "transformers", "python"} <= summary["versions"].keys()


def test_a_run_stopped_before_its_first_round_has_a_summary_too(tmp_path):
    summary = summarize(RunConfig(), [], "SIGINT")
    assert summary["rounds"] == 0
    assert summary["pass_at_1_heldout_before"] is None
    write_summary(RunFolder(tmp_path), summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_what_is_printed_names_the_gain_and_the_files(tmp_path):
    folder = RunFolder(tmp_path)
    plot_rewards(rows(40), "tiny on chain_sum", 50, folder.picture)
    out = io.StringIO()
    print_summary(Console(file=out, width=200), folder, summarize(RunConfig(rounds=40), rows(40), "finished"))
    text = out.getvalue()
    assert "40 rounds in 1:20" in text
    assert "0.050 → 0.750" in text
    assert "reward.png" in text
    assert folder.picture.read_bytes().startswith(b"\x89PNG")


def test_heldout_points_begin_before_the_first_round():
    assert heldout_points(rows(3)) == [(0, 0.05), (3, 0.75)]
