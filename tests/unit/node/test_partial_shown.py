"""What is shown of partial rollouts: in flight, recycled, staleness, saved seconds."""

import io
from types import SimpleNamespace

from rich.console import Console

from node.display import PlainDisplay, RunInfo, partial_rollouts
from node.live import LiveDisplay
from node.stats import stats_view
from node.status import build_status, training_status

INFO = RunInfo("silo", "tiny", "chain_sum", 100, "runs/x")
ROW = {
    "round": 1, "reward_mean": 0.25, "reward_moving_average": 0.2, "tokens_per_s": 12345.6, "rollout_s": 0.5,
    "scoring_s": 0.1, "update_s": 0.4, "round_s": 2.0, "evaluation_s": 0.0, "peak_rss_bytes": 3 * 2**20,
}  # fmt: skip
PARTIAL = ROW | {
    "over_provision": 1.5, "num_groups_in_flight": 12, "num_groups_recycled": 4, "staleness_mean": 0.25,
    "staleness_max": 2, "num_tokens_cut": 9, "saved_s": 0.125,
}  # fmt: skip


def test_a_round_says_what_was_in_flight_and_nothing_where_rollouts_are_synchronous():
    assert partial_rollouts(ROW) == ""
    assert partial_rollouts(PARTIAL) == "  in flight 12 groups, 4 recycled, staleness 0.25, saved 0.125 s"
    exact = PARTIAL | {"staleness_max": 0, "staleness_mean": 0.0}
    assert partial_rollouts(exact) == "  in flight 12 groups, 4 recycled, saved 0.125 s"


def test_plain_lines_and_the_live_panel_show_it():
    out = io.StringIO()
    display = PlainDisplay(out, lambda: 0.0)
    display.begin(INFO)
    display.round(PARTIAL)
    assert "in flight 12 groups, 4 recycled" in out.getvalue()
    live = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None), lambda: 0.0)
    live.begin(INFO)
    live.round(ROW)
    with live._console.capture() as captured:
        live._console.print(live.render())
    assert "in flight" not in captured.get()
    live.round(PARTIAL)
    with live._console.capture() as captured:
        live._console.print(live.render())
    live.end()
    assert "in flight 12 groups, 4 recycled, staleness 0.25, saved 0.125 s" in captured.get()


def test_stats_average_it_over_the_last_rounds():
    rows = [PARTIAL, PARTIAL | {"num_groups_in_flight": 8, "staleness_max": 3, "saved_s": -0.025}]
    node = SimpleNamespace(
        rows=rows, pass_at_1_heldout=None, recorder=SimpleNamespace(last_round=2), phase="rollout",
        config=SimpleNamespace(rounds=9, sapo=SimpleNamespace(num_local=8, num_external=0)),
    )  # fmt: skip
    training = training_status(node, "tiny", "chain_sum")
    assert training["rollouts"]["num_groups_in_flight"] == 10
    assert training["rollouts"]["staleness_max"] == 3
    console = Console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as captured:
        console.print(stats_view(build_status("silo", "runs/x", 0.0, training, None)))
    shown = "in flight 10.0 groups, 4.0 recycled, staleness 0.25 on average, 3 at most, saved 0.050 s a round"
    assert shown in captured.get()
    node.rows = [ROW]
    assert training_status(node, "tiny", "chain_sum")["rollouts"] is None
