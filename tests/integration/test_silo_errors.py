"""What a user can get wrong, typed at the real program: one line that names the fix, status 2, nothing left behind.

Each command is typed at the program itself; some of what follows from it is asked of forks.
"""

import json

import pytest


def refused(done):
    assert done.returncode == 2, (done.stdout, done.stderr)
    [line] = done.stderr.splitlines()
    assert line.startswith("swarm-node: ")
    assert "Traceback" not in done.stdout
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--tasks", "chain_summ"], "chain_sum"),
        (["--tasks", "bad.jsonl"], "bad.jsonl, line 2"),
        (["--tasks", "none.jsonl"], "none.jsonl"),
        (["--set", "model.device=cuda:7"], "cuda:7"),
    ],
)
def test_a_mistake_that_shows_while_loading_is_one_line_and_leaves_no_folder(workplace, change, message):
    (workplace.path / "bad.jsonl").write_text(
        '{"question": "1+1", "answer": "2", "verifier": "number"}\n{"question":\n'
    )
    assert message in refused(workplace.run_fork(*workplace.silo("run", 3, *change)))
    assert not (workplace.path / "run").exists()


def test_a_mistake_without_a_run_folder_says_nothing_of_one_and_leaves_no_runs(workplace):
    done = workplace.run("silo", "--model", "no/such/folder", "--tasks", "questions.jsonl")
    assert "no/such/folder" in refused(done)
    assert "runs/" not in done.stdout + done.stderr
    assert not (workplace.path / "runs").exists()


def test_a_finished_run_is_not_overwritten_and_json_has_one_object_a_round(workplace):
    done = workplace.run(*workplace.silo("run", 3, "--json"))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == workplace.rows("run")
    names = {path.name for path in (workplace.path / "run").iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "journal", "checkpoints", "summary.json", "reward.png"}
    before = {path: path.read_bytes() for path in (workplace.path / "run").rglob("*") if path.is_file()}
    line = refused(workplace.run_fork(*workplace.silo("run", 3)))
    assert "already holds a run" in line
    assert {path: path.read_bytes() for path in (workplace.path / "run").rglob("*") if path.is_file()} == before
    line = refused(workplace.run_fork("silo", "--run-dir", "run", "--resume", "--model", "tiny"))
    assert "was run with model.name" in line


def test_the_policy_of_a_run_is_evaluated_and_exported(workplace):
    from transformers import AutoModelForCausalLM

    assert workplace.run_fork(*workplace.silo("run", 20)).returncode == 0
    evaluated = workplace.run("eval", "run", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["pass_at_1_heldout"] == workplace.rows("run")[-1]["pass_at_1_heldout"]
    exported = workplace.run("export", "run", "out")
    assert exported.returncode == 0, exported.stderr
    AutoModelForCausalLM.from_pretrained(workplace.path / "out")
    settings = ["--set", 'tasks.answer=["whole_text"]', "--set", "rollout.max_new_tokens=2", "--items", "8"]
    again = workplace.run_fork("eval", "--model", "out", "--tasks", "questions.jsonl", *settings, "--json")
    assert json.loads(again.stdout)["pass_at_1_heldout"] == json.loads(evaluated.stdout)["pass_at_1_heldout"]
    assert "is not empty" in refused(workplace.run_fork("export", "run", "out"))


def test_the_doctor_finds_this_machine_fit(workplace):
    done = workplace.run("doctor", "--model", "model", "--tasks", "questions.jsonl", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["can_run"]
    names = "python torch device engine bf16 threads memory disk model speed sandbox scorer"
    assert [check["name"] for check in report["checks"]] == names.split()
    assert workplace.run_fork("doctor", "--model", "no/such", "--tasks", "questions.jsonl").returncode == 1


def test_the_same_seed_gives_the_same_run_from_the_resolved_config(workplace):
    assert workplace.run(*workplace.silo("one", 6, "--set", "seed=7")).returncode == 0
    done = workplace.run_fork("silo", "--config", "one/config.toml", "--run-dir", "two")
    assert done.returncode == 0, done.stderr
    steady = ("round", "reward_mean", "loss", "grad_norm", "num_tokens_generated")
    assert [[row[name] for name in steady] for row in workplace.rows("one")] == [
        [row[name] for name in steady] for row in workplace.rows("two")
    ]
    assert workplace.run_fork(*workplace.silo("three", 6, "--set", "seed=8")).returncode == 0
    assert [row["reward_mean"] for row in workplace.rows("one")] != [
        row["reward_mean"] for row in workplace.rows("three")
    ]
