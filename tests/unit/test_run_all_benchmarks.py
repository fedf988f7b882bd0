"""A benchmark that crashes or leaves no report is loud."""

import json

import pytest
import run_all

REPORT = {"hardware": {}, "figures": {}, "bars": []}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("run_all.REPOSITORY", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    return tmp_path / "benchmarks"


def write(folder, name, last_line, status=0):
    (folder / f"{name}.py").write_text(f"import sys\nprint('working')\nprint({last_line!r})\nsys.exit({status})\n")


def test_every_script_but_the_harness_is_a_benchmark(folder):
    for name in ("engine", "round", "harness", "run_all", "_peer"):
        write(folder, name, "")
    assert run_all.names(folder) == ["engine", "round"]


def test_reports_are_kept_and_bars_are_listed(folder, capfd):
    bars = [{"name": "speed", "value": 4.0, "target": 5.0, "holds": False}]
    write(folder, "engine", json.dumps({**REPORT, "bars": bars}))
    assert run_all.main([]) == 0
    assert json.loads((folder / "results" / "engine.json").read_text())["bars"] == bars
    assert "engine: speed: 4.0 (target 5.0): DOES NOT HOLD" in capfd.readouterr().out


@pytest.mark.parametrize(("last_line", "status"), [(json.dumps(REPORT), 3), ("no json", 0), ('{"figures": {}}', 0)])
def test_a_crash_is_loud_and_the_others_still_run(folder, capfd, last_line, status):
    write(folder, "a_broken", last_line, status)
    write(folder, "b_sound", json.dumps(REPORT))
    assert run_all.main([]) == 1
    assert "CRASHED a_broken" in capfd.readouterr().err
    assert (folder / "results" / "b_sound.json").exists()
    assert not (folder / "results" / "a_broken.json").exists()


def test_an_unknown_name_is_one_line(folder, capfd):
    write(folder, "engine", json.dumps(REPORT))
    assert run_all.main(["enigne"]) == 2
    assert capfd.readouterr().err == "error: no benchmark is named enigne: choose from engine\n"
