import io
import json

from rich.console import Console

from node.display import JsonDisplay, PlainDisplay, Progress, RunInfo, duration
from node.live import LiveDisplay, sparkline

INFO = RunInfo("silo", "tiny", "chain_sum", 100, "runs/x")


def row(index: int, **more):
    return {
        "round": index,
        "reward_mean": 0.25,
        "reward_moving_average": 0.2,
        "tokens_per_s": 12345.6,
        "rollout_s": 0.5,
        "scoring_s": 0.1,
        "update_s": 0.4,
        "round_s": 2.0,
        "evaluation_s": 0.0,
        "peak_rss_bytes": 3 * 2**20,
        **more,
    }


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_at_most_every_two_seconds_but_evaluations_always():
    out, clock = io.StringIO(), Clock()
    display = PlainDisplay(out, clock)
    display.begin(INFO)
    assert "runs/x" not in out.getvalue(), "it may still turn out that there is no such model"
    display.loaded()
    for index in range(1, 8):
        clock.now = index * 0.7
        display.round(row(index, **({"pass_at_1_heldout": 0.5} if index == 3 else {})))
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["tiny on chain_sum, 100 rounds", "writing to runs/x"]
    assert [line.split()[1] for line in lines[2:]] == ["1/100", "3/100", "6/100"]
    assert "held-out pass@1 0.500" in lines[3]
    assert lines[2] == (
        "round 1/100  reward 0.250 (average 0.200)  12,346 tokens/s  rollout 0.500 s  scoring 0.100 s  "
        "update 0.400 s  memory 3 MiB  eta 3:18"
    )


def test_json_is_one_object_a_round_on_stdout_and_nothing_else():
    out, err = io.StringIO(), io.StringIO()
    display = JsonDisplay(out, err)
    display.begin(INFO)
    display.note("something")
    display.round(row(1))
    display.round(row(2))
    assert [json.loads(line)["round"] for line in out.getvalue().splitlines()] == [1, 2]
    assert "something" in err.getvalue()


def test_the_time_left_follows_the_last_rounds():
    progress = Progress(100)
    assert progress.eta_s(0) == 0
    progress.add(row(1, round_s=1.0, evaluation_s=3.0))
    progress.add(row(2, round_s=2.0))
    assert progress.eta_s(2) == 98 * 3.0
    assert progress.eta_s(200) == 0


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 3661)] == ["0:00", "1:00", "59:59", "1:01:01"]


def test_sparkline_averages_into_columns():
    assert sparkline([], 4) == ""
    assert sparkline([0.0, 1.0], 4) == "▁█"
    assert sparkline([0.0, 0.0, 1.0, 1.0, 0.5, 0.5], 3) == "▁█▅"
    assert sparkline([2.0, -1.0], 2) == "█▁"


def test_the_live_panel_shows_what_the_issue_of_a_run_is():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    display = LiveDisplay(console, Clock())
    display.begin(INFO)
    display.loaded()
    display.evaluated_before(0.05)
    for index in range(1, 5):
        display.round(row(index))
    display.round(row(5, pass_at_1_heldout=0.4))
    display.phase("update")
    with console.capture() as captured:
        console.print(display.render())
    display.end()
    text = captured.get()
    for part in ("tiny on chain_sum", "runs/x", "5 of 100", "0.250", "average 0.200", "0.050 before", "0.400 after 5",
                 "12,346 tokens/s", "rollout 0.500", "scoring 0.100", "update 0.400", "3 MiB", "left 3:10",
                 "updating the policy"):  # fmt: skip
        assert part in text, part


def test_a_round_in_a_swarm_says_what_came_from_others():
    out, clock = io.StringIO(), Clock()
    display = PlainDisplay(out, clock)
    display.begin(INFO)
    swarm = {"num_external": 3, "num_external_missing": 1, "num_peers": 2, "reward_external_mean": 0.5}
    display.round(row(1, **swarm))
    assert "  from others 3 of 4 (peers 2)  " in out.getvalue()
    live = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None), clock)
    live.begin(INFO)
    live.round(row(1, **swarm))
    live.round(row(2, **swarm | {"num_external": 0, "num_external_missing": 4, "reward_external_mean": None}))
    with live._console.capture() as captured:
        live._console.print(live.render())
    live.end()
    assert "0 of 4 (peers 2)" in captured.get()
