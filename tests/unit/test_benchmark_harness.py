"""The benchmarks' shared last line, and what becomes of a peer that fails."""

import json
import platform
import sys
import time

import pytest
from harness import Bar, PeerError, best_time_s, hardware, last_json_line, peer_python, report, run_peer


@pytest.mark.parametrize(
    ("value", "at_least", "holds"),
    [(5.0, True, True), (4.99, True, False), (5.0, False, True), (5.01, False, False), (None, True, False)],
)
def test_a_bar_holds_on_the_right_side_of_its_target(value, at_least, holds):
    assert Bar("speed", value, 5.0, at_least=at_least).holds is holds


def test_report_prints_one_object_with_hardware_figures_and_bars(capsys):
    print(".", end="")
    report({"seconds": 1.5}, [Bar("speed", 6.0, 5.0), Bar("missing", None, 1.0)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    found = json.loads(lines[-1])
    assert set(found) == {"hardware", "figures", "bars"}
    assert found["figures"] == {"seconds": 1.5}
    assert found["bars"] == [
        {"name": "speed", "value": 6.0, "target": 5.0, "holds": True},
        {"name": "missing", "value": None, "target": 1.0, "holds": False},
    ]


def test_report_refuses_figures_that_are_not_json():
    with pytest.raises(ValueError, match="JSON"):
        report({"ratio": float("nan")}, [])


def test_hardware_names_parts_and_never_the_machine():
    found = hardware()
    assert found["num_cores"] >= 1
    assert found["memory_gib"] > 0
    assert platform.node() not in json.dumps(found)


def test_best_time_is_the_shortest_call_after_the_warm_up(monkeypatch):
    now = 0.0
    durations = iter([0.001, 3.0, 2.0, 4.0, 5.0])

    def work():
        nonlocal now
        now += next(durations)

    monkeypatch.setattr("harness.time.perf_counter", lambda: now)
    assert best_time_s(work, budget_s=8.5) == pytest.approx(2.0)


def test_last_json_line_skips_what_was_printed_before():
    assert last_json_line('loading\n{"a": 1}\n{"b": 2}\n\n') == {"b": 2}


@pytest.mark.parametrize("text", ["", "no json", "[1, 2]"])
def test_last_json_line_refuses_output_without_an_object(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the message is json's own for one of them
        last_json_line(text)


def test_a_peer_answers_with_its_last_line(monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", "ours")
    code = (
        "import json, os; print('hello'); print(json.dumps({'x': os.environ['X'], 'v': 'VIRTUAL_ENV' in os.environ}))"
    )
    assert run_peer([sys.executable, "-c", code], time_limit_s=30, env={"X": "3"}) == {"x": "3", "v": False}


def test_what_a_peer_prints_around_its_report_is_skipped():
    assert run_peer([sys.executable, "-c", """print('..{"x": 1}'); print("closing")"""], time_limit_s=30) == {"x": 1}


def test_a_peer_without_a_report_is_an_error():
    with pytest.raises(PeerError, match="no JSON object in its output: 'hello'"):
        run_peer([sys.executable, "-c", "print('hello')"], time_limit_s=30)


def test_a_peer_that_fails_says_why():
    with pytest.raises(PeerError, match=r"exit status 1.*no such thing"):
        run_peer([sys.executable, "-c", "raise SystemExit('no such thing')"], time_limit_s=30)


def test_a_peer_over_its_time_limit_is_ended():
    start = time.monotonic()
    with pytest.raises(PeerError, match=r"no result within 0.2 s"):
        run_peer([sys.executable, "-c", "import time; time.sleep(60)"], time_limit_s=0.2)
    assert time.monotonic() - start < 10


def test_a_missing_peer_environment_is_none(tmp_path):
    assert peer_python(tmp_path) is None
