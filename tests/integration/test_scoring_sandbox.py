"""Real scoring processes against hostile answers, and against hostile code inside the sandbox."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from protocol.messages import TaskRef
from swarm.config import ScoringConfig, TasksConfig, TaskSourceConfig
from swarm.errors import PoolClosed, ScoringError, UnknownSource
from swarm.scoring import ScoringPool, sandbox_layers
from swarm.tasks import build_task_set
from swarm.tasks.gym_safety import REPLACED, SAFE
from swarm.types import Completion, RolloutGroup, Segment

WHOLE = {"answer": ("whole_text",), "partial_credit": "scorer"}
PATIENT = ScoringConfig(cpu_limit_s=20, wall_limit_s=60)
HASTY = ScoringConfig(cpu_limit_s=0.4, wall_limit_s=20)
NO_ORACLE = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}  # no text answer to give
GYM_TASKS = sorted(SAFE | set(REPLACED))

PRODUCTS = TaskSourceConfig(name="products", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})


def ref_of(source, seed=0, index=0):
    return TaskRef(source=source.name, digest=source.digest, seed=seed, index=index)


def jsonl(folder, *lines, name="hostile.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return TaskSourceConfig(name=str(path))


def hostile_answers(folder):
    file, port = folder / "pwned", 9
    code = [
        f"open({str(file)!r}, 'w').write('x')",
        f"__import__('pathlib').Path({str(file)!r}).touch()",
        f"__import__('os').system('touch {file}')",
        f"__import__('socket').create_connection(('127.0.0.1', {port}))",
        "[None for _ in iter(int, 1)]",
        "bytearray(10 * 2**30)",
        "[[0] * 10**9] * 10",
        "(lambda f: f(f))(lambda f: f(f))",
        "__import__('os').kill(__import__('os').getppid(), 9)",
    ]
    text = [
        "9**9**9**9",
        "1e999999999",
        "10**10**10",
        "x**(10**9)",
        "factorial(10**8)",
        "1" * 8000,
        "(" * 4000 + ")" * 4000,
        "[" * 8000,
        "-" * 8000,
        "1/" * 4000 + "0",
        "∧".join("P" * 500),
        "¬" * 8000,
        "U99999999 " * 800,
        "A" * 8000,
        "nan",
        "inf",
        "\x00",
        "\ud800",
        "",
    ]
    return code + text


@pytest.mark.parametrize("first", range(0, len(GYM_TASKS), 12))
def test_no_scorer_does_what_an_answer_says(tmp_path, first):
    config = TasksConfig(sources=tuple(TaskSourceConfig(name=name) for name in GYM_TASKS[first : first + 12]), **WHOLE)
    jobs, right = [], []
    for source in build_task_set(config, seed=0).sources:
        jobs += [(ref_of(source), text) for text in hostile_answers(tmp_path)]
        answer = source._entry(0, 0)["answer"]
        if source.name.removeprefix("reasoning_gym/") not in NO_ORACLE:
            right.append(len(jobs))
            jobs.append((ref_of(source), answer))
    with ScoringPool(config, HASTY) as pool:
        scores = pool.score(jobs)
        assert pool.counts.total() == len(jobs)
    assert list(tmp_path.iterdir()) == []
    assert [jobs[number][0].source for number in right if scores[number].reward < 1.0] == []
    fooled = [jobs[number] for number, score in enumerate(scores) if score.reward >= 1 and number not in right]
    assert [job for job in fooled if job[0].source != "reasoning_gym/propositional_logic"] == []  # P∧P… is true there


def test_every_jsonl_verifier_meets_hostile_answers(tmp_path):
    lines = [
        {"question": "a", "answer": "4", "verifier": "exact"},
        {"question": "b", "answer": "4", "verifier": "number"},
        {"question": "c", "answer": "x**2 + 1", "verifier": "math"},
        {"question": "d", "answer": "(a+)+b", "verifier": "regex"},
        {"question": "e", "answer": "B", "verifier": "choice", "choices": ["red", "blue"]},
    ]
    right = ["4", "4.0", "1 + x^2", "aab", "(b)"]
    config = TasksConfig(sources=(jsonl(tmp_path, *lines),), **WHOLE)
    (source,) = build_task_set(config, seed=0).sources
    folder = tmp_path / "empty"
    folder.mkdir()
    hostile = [(ref_of(source, index=index), text) for index in range(5) for text in hostile_answers(folder)]
    with ScoringPool(config, HASTY) as pool:
        scores = pool.score([*hostile, *((ref_of(source, index=index), text) for index, text in enumerate(right))])
    assert [score.reward for score in scores[-5:]] == [1.0] * 5
    assert {score.reward for score in scores[:-5]} == {0.0}
    assert list(folder.iterdir()) == []


def test_a_pattern_that_backtracks_for_ever_costs_only_its_answer(tmp_path):
    lines = [{"question": "a", "answer": "(a+)+b", "verifier": "regex"}]
    config = TasksConfig(sources=(jsonl(tmp_path, *lines),), **WHOLE)
    (source,) = build_task_set(config, seed=0).sources
    with ScoringPool(config, HASTY) as pool:
        first_pid = pool.process_ids
        scores = pool.score([(ref_of(source), text) for text in ["ab", "a" * 60, "aab", "b"]])
        assert [(score.reward, score.outcome) for score in scores] == [
            (1.0, "scored"),
            (0.0, "cpu_limit"),
            (1.0, "scored"),
            (0.0, "scored"),
        ]
        assert pool.num_replaced == 1
        assert pool.process_ids != first_pid
        assert pool.counts == {"scored": 3, "cpu_limit": 1}


# What follows runs hostile code in the sandbox: a program that only this test has, whose scorer calls a
# function of `hostile_code` by the name that the answer gives.

CODE = Path(__file__).with_name("hostile_code.py")


def hostile_program(layers=None):
    choose = f"child.lock_down = lambda limit, _: lock_down(limit, {layers!r}); " if layers is not None else ""
    return (
        f"sys.path.insert(0, {str(CODE.parent)!r}); import hostile_code; from swarm.scoring import child; "
        f"lock_down = child.lock_down; {choose}child.serve(hostile_code.build)"
    )


@pytest.fixture
def echo(tmp_path):
    """A source whose answers are the names of functions."""
    config = TasksConfig(sources=(jsonl(tmp_path, {"question": "?", "answer": "x", "verifier": "exact"}),), **WHOLE)
    (source,) = build_task_set(config, seed=0).sources
    return config, ref_of(source)


ATTACKS = "write_file native_write mkdir unlink rename connect native_socket fork native_fork spawn execute kill_parent"
PYTHON_ATTACKS = "write_file mkdir unlink rename connect fork spawn execute kill_parent"


@pytest.mark.parametrize(
    ("layers", "attacks"),
    [
        (None, ATTACKS),
        (("seccomp",), ATTACKS),
        (("audit",), PYTHON_ATTACKS),
        (("landlock",), "write_file native_write mkdir unlink rename execute"),
    ],
)
def test_each_layer_holds_against_code(echo, tmp_path, layers, attacks):
    missing = set(layers or ()) - set(sandbox_layers())
    if missing:
        pytest.skip(f"no {missing} on this platform")
    config, ref = echo
    target = tmp_path / "target"
    target.write_text("untouched")
    before = sorted(tmp_path.iterdir())
    with ScoringPool(config, PATIENT, program=hostile_program(layers)) as pool:
        (worker,) = pool.process_ids
        scores = pool.score([(ref, f"{attack} {target}") for attack in ["calm", *attacks.split(), "calm"]])
        assert psutil.Process(worker).children(recursive=True) == []
    assert [score.reward for score in scores] == [0.5] * len(scores)  # 0.5: refused with PermissionError or the like
    assert target.read_text() == "untouched"
    assert sorted(tmp_path.iterdir()) == before


def test_the_attacks_succeed_without_a_sandbox(echo, tmp_path):
    """What the tests above rest on: the attacks do work where nothing stops them."""
    config, ref = echo
    attacks = "write_file native_write mkdir native_socket fork native_fork spawn".split()
    target = tmp_path / "target"
    target.write_text("untouched")
    with ScoringPool(config, PATIENT, program=hostile_program(())) as pool:
        scores = pool.score([(ref, f"{attack} {target}") for attack in attacks])
    assert [score.reward for score in scores] == [1.0] * len(attacks)
    assert target.read_text() != "untouched"


def test_evaluating_an_answer_is_refused_even_where_a_scorer_tries(echo):
    config, ref = echo
    with ScoringPool(config, PATIENT, program=hostile_program()) as pool:
        assert [score.reward for score in pool.score([(ref, "evaluate x")])] == [0.5]


def test_limits_hold_against_code(echo):
    config, ref = echo
    with ScoringPool(config, ScoringConfig(cpu_limit_s=0.5, wall_limit_s=2.0), program=hostile_program()) as pool:
        answers = ["calm", "loop", "calm 1", "native_loop", "allocate", "sleep", "crash", "exit", "print", "calm 2"]
        began_s = time.monotonic()
        scores = pool.score([(ref, answer) for answer in answers])
        outcomes = dict(zip(answers, (score.outcome for score in scores), strict=True))
        assert outcomes == {
            "calm": "scored",
            "loop": "cpu_limit",
            "calm 1": "scored",
            "native_loop": "cpu_limit",
            "allocate": "memory_limit",
            "sleep": "wall_limit",
            "crash": "crashed",
            "exit": "scorer_error",
            "print": "scored",
            "calm 2": "scored",
        }
        assert time.monotonic() - began_s < 60
        assert pool.num_replaced == 4


def test_the_process_inherits_nothing_and_imports_little(echo, monkeypatch):
    monkeypatch.setenv("SWARM_SECRET", "s3cret")
    config, ref = echo
    with ScoringPool(config, PATIENT, program=hostile_program()) as pool:
        names = ["environment_is_clean", "folder_is_empty", "imports_are_few", "no_foreign_descriptors"]
        assert [score.reward for score in pool.score([(ref, name) for name in names])] == [1.0] * len(names)


def test_processes_that_do_not_start_are_an_error_with_their_last_words(echo):
    config, _ = echo
    with pytest.raises(ScoringError, match="No module named 'no_such_module'"):
        ScoringPool(config, PATIENT, program="import no_such_module").start()


def test_equal_answers_are_scored_once_and_scores_repeat():
    config = TasksConfig(sources=(PRODUCTS,))
    task = build_task_set(config, seed=1).train_batch(0, 1)[0]
    texts = [f"I say {number % 82}" for number in range(300)]
    with ScoringPool(config, ScoringConfig(num_workers=2)) as pool:
        pool.prefetch([task.ref])
        first = pool.score([(task.ref, text) for text in texts])
        assert first == pool.score([(task.ref, text) for text in texts])
        assert first[:82] == first[82:164]
    assert sum(score.reward for score in first[:82]) == 1.0


def test_what_is_not_sent_to_a_process(echo):
    config = TasksConfig(sources=(PRODUCTS,))
    task = build_task_set(config, seed=1).train_batch(0, 1)[0]
    with ScoringPool(config, ScoringConfig(max_answer_chars=5)) as pool:
        assert [score.outcome for score in pool.score([(task.ref, "no idea"), (task.ref, "123456")])] == [
            "no_answer",
            "too_long",
        ]
        with pytest.raises(UnknownSource):
            pool.score([(TaskRef("jsonl/none", "0" * 32, 0, 0), "1")])
        bad = pool.score([(TaskRef(task.ref.source, task.ref.digest, 0, 2**40), "1")])
        assert bad[0].outcome == "scorer_error"


def test_groups_get_their_rewards():
    config = TasksConfig(sources=(PRODUCTS,))
    tasks = build_task_set(config, seed=1)
    task = tasks.train_batch(0, 1)[0]
    left, right = (int(word.rstrip(".")) for word in task.question.split() if word.rstrip(".").isdigit())
    texts = (f"<answer>{left * right}</answer>", "<answer>-1</answer>", "hm")
    completion = Completion(0, (1,), (0.0,), (Segment(0, 0, 1),), "length")
    group = RolloutGroup(task=task, prompt_ids=(1,), completions=(completion,) * 3, texts=texts)
    with ScoringPool(config, ScoringConfig()) as pool:
        assert [scored.rewards for scored in pool.score_groups([group])] == [(1.0, 0.0, 0.0)]


def test_a_process_that_is_killed_from_outside_is_replaced():
    config = TasksConfig(sources=(PRODUCTS,))
    task = build_task_set(config, seed=1).train_batch(0, 1)[0]
    with ScoringPool(config, ScoringConfig()) as pool:
        (pid,) = pool.process_ids
        os.kill(pid, 9)
        assert [score.outcome for score in pool.score([(task.ref, "1"), (task.ref, "2")])] == ["scored", "scored"]
        assert pool.num_replaced == 1
        assert pool.process_ids != (pid,)
        (pid,) = pool.process_ids
    assert not psutil.pid_exists(pid)


def test_processes_of_a_low_priority_give_way_to_others():
    config = TasksConfig(sources=(PRODUCTS,))
    task = build_task_set(config, seed=1).train_batch(0, 1)[0]
    own = psutil.Process().nice()
    pool = ScoringPool(config, ScoringConfig(), niceness=5)
    pool.start(wait=False)
    assert [psutil.Process(pid).nice() for pid in pool.process_ids] == [own], "until it is ready"
    with pool:
        assert [psutil.Process(pid).nice() for pid in pool.process_ids] == [own + 5]
        os.kill(*pool.process_ids, 9)
        pool.score([(task.ref, "1")])
        assert [psutil.Process(pid).nice() for pid in pool.process_ids] == [own + 5], "its successor as well"


def test_closing_does_not_wait_for_an_answer_that_another_thread_has_scored(echo):
    config, ref = echo
    pool = ScoringPool(config, ScoringConfig(cpu_limit_s=60, wall_limit_s=4), program=hostile_program())
    pool.start()
    with ThreadPoolExecutor(max_workers=1) as other:
        scoring = other.submit(pool.score, [(ref, f"sleep {number}") for number in range(100)])
        (worker,) = pool._workers
        while worker.current is None:
            time.sleep(0.001)
        began_s = time.monotonic()
        pool.close()
        assert time.monotonic() - began_s < 4
        with pytest.raises(PoolClosed):
            scoring.result()
    assert not psutil.pid_exists(worker.pid)
