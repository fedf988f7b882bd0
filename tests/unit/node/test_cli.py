import stat
import subprocess
import sys
import time

import pytest

from node.cli import run


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capfd, *arguments: str) -> str:
    """Run a command that is a user's mistake; return its one line."""
    assert run(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("swarm-node: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["silo", "--set", "trainer.learning_rat=1"], "did you mean trainer.learning_rate?"),
        (["silo", "--set", "seed"], "not of the form key=value"),
        (["silo", "--rounds", "0"], "rounds = 0 (--rounds): input should be greater than or equal to 1"),
        (["silo", "--rounds", "many"], "Invalid value for '--rounds'"),
        (["silo", "--config", "none.toml"], "there is no configuration file none.toml"),
        (["silo", "--nonsense"], "No such option"),
        (["silo", "--set", "sapo.first_completions=8"], "set it below rollout.num_completions = 8, or to 0"),
        (["silo", "--set", "sapo.first_completions=1"], "sapo.first_completions: must be 0 or at least 2"),
        (
            ["silo", "--set", "sapo.first_completions=4", "--set", "rollout.schedule=partial"],
            "swarm-node: sapo.first_completions waits for rewards in the middle of a round",
        ),
        (["join", "--set", "sapo.num_broad=4"], "set it below sapo.num_local = 4"),
        (
            [
                "join",
                "--set",
                "sapo.num_broad=1",
                "--set",
                "rollout.schedule=partial",
                "--set",
                "rollout.order=arrival",
            ],
            "set rollout.order=submission, or sapo.num_broad=0",
        ),
        (["silo", "--resume"], "there is no run in runs"),
        (["silo", "--resume", "--run-dir", "none"], "there is no run folder none"),
        (["eval"], "name either a RUN_DIR or a --model"),
        (["eval", "none"], "none holds no run"),
        (["export", "none", "out"], "none holds no run"),
        (["nonsense"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_writes_nothing(elsewhere, capfd, arguments, message):
    assert message in refused(capfd, *arguments)
    assert list(elsewhere.iterdir()) == []


def test_malformed_toml_is_named_with_its_line(elsewhere, capfd):
    (elsewhere / "run.toml").write_text("seed = 1\n\nrounds = [\n")
    assert "run.toml:3: not valid TOML" in refused(capfd, "silo", "--config", "run.toml")


def test_an_occupied_folder_is_left_as_it_is(elsewhere, capfd):
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "metrics.jsonl").write_text('{"round": 1}\n')
    assert "already holds a run; go on with it: --run-dir run --resume" in refused(capfd, "silo", "--run-dir", "run")
    assert (elsewhere / "run" / "metrics.jsonl").read_text() == '{"round": 1}\n'


def test_another_seed_on_resume_is_refused(elsewhere, capfd):
    (elsewhere / "run").mkdir()
    (elsewhere / "run" / "config.toml").write_text("seed = 3\n")
    (elsewhere / "run" / "metrics.jsonl").touch()
    line = refused(capfd, "silo", "--run-dir", "run", "--resume", "--seed", "4")
    assert "was run with seed = 3, not 4" in line


def test_config_show_names_origins_and_can_be_read_back(elsewhere, capfd, monkeypatch):
    monkeypatch.setenv("SWARM_NODE_ROUNDS", "9")
    assert run(["config", "show", "--set", "seed=7", "--tasks", "products:2"]) == 0
    (elsewhere / "c.toml").write_text(capfd.readouterr().out)
    monkeypatch.delenv("SWARM_NODE_ROUNDS")
    assert run(["config", "show", "--config", "c.toml", "--origin"]) == 0
    lines = {line.split(" = ")[0]: line for line in capfd.readouterr().out.splitlines()}
    assert lines["seed"].split() == ["seed", "=", "7", "c.toml:1"]
    assert lines["rounds"].split()[2] == "9"
    assert lines["tasks.sources"].split()[2] == "products:2"
    assert run(["config", "show", "--model", "tiny", "--origin"]) == 0
    lines = {line.split(" = ")[0]: line for line in capfd.readouterr().out.splitlines()}
    assert lines["model.name"].split()[-1] == "--model"
    assert lines["rollout.max_new_tokens"].endswith("preset tiny")
    assert lines["rollout.top_p"].endswith("default")


def test_init_makes_an_identity_once(elsewhere, capfd):
    assert run(["init", "--run-dir", "node"]) == 0
    first = capfd.readouterr().out.split()
    assert first[0] == "new"
    assert run(["init", "--run-dir", "node"]) == 0
    assert capfd.readouterr().out.split()[1] == first[2]
    assert stat.S_IMODE((elsewhere / "node" / "identity").stat().st_mode) == 0o600


def test_an_identity_that_others_can_read_is_one_line(elsewhere, capfd):
    run(["init", "--run-dir", "node"])
    (elsewhere / "node" / "identity").chmod(0o644)
    capfd.readouterr()
    assert "chmod 600" in refused(capfd, "init", "--run-dir", "node")


def test_version_and_help(capfd):
    assert run(["--version"]) == 0
    assert "swarm-node, version 0" in capfd.readouterr().out
    assert run(["silo", "--help"]) == 0
    text = capfd.readouterr().out
    for option in ("--model", "--tasks", "--config", "--rounds", "--run-dir", "--resume", "--set", "--json"):
        assert option in text


def test_help_imports_nothing_slow():
    code = (
        "import sys; from node.cli import run; run(['--help']);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic', 'rich', 'numpy')))"
    )
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert time.perf_counter() - begin < 20


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(folder):
        raise KeyError("a bug")

    monkeypatch.setattr("node.run_folder.newest_run", broken)
    with pytest.raises(KeyError, match="a bug"):
        run(["silo", "--resume"])


def test_config_show_describes(capfd):
    assert run(["config", "show", "--describe"]) == 0
    assert "# fixes everything random in the run" in capfd.readouterr().out
