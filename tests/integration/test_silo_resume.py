"""A real node is killed, stopped, and run out of disk; each time it goes on as if nothing had happened.

What is equalled was run by the program; most of what equals it by forks, which start at once.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.no_cover
ROUNDS = 80
NUM_KILLS = 20
MACHINE = ("_s", "_per_s", "_bytes")


def wait_for(process, happened, timeout_s=120.0):
    """Wait until something has happened; fail if the process ends or the time is over first."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert process.poll() is None, f"ended with {process.returncode}: {process.communicate()}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)


def steady(rows):
    """The part of the rows that does not depend on the machine."""
    return [{key: value for key, value in row.items() if not key.endswith(MACHINE)} for row in rows]


def final_state(run):
    """The tensors of the last checkpoint: weights and both moments."""
    folder = max((run / "checkpoints").glob("round-*"))
    assert folder.name == f"round-{ROUNDS:08d}"
    return load_file(folder / "state.safetensors")


def assert_same_run(workplace, run_dir, whole):
    assert steady(workplace.rows(run_dir)) == steady(whole.rows("whole"))
    found, expected = final_state(workplace.path / run_dir), final_state(whole.path / "whole")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.fixture(scope="session")
def uninterrupted(new_workplace):
    """A workplace with a whole run, to be equalled."""
    workplace = new_workplace()
    done = workplace.run(*workplace.silo("whole", ROUNDS))
    assert done.returncode == 0, done.stderr
    rows = workplace.rows("whole")
    assert [row["round"] for row in rows] == list(range(1, ROUNDS + 1))
    assert rows[-1]["policy_version"] > ROUNDS // 2, "the run must learn for these tests to mean anything"
    return workplace


@pytest.mark.timeout(900)
def test_killed_at_twenty_moments_it_ends_bit_for_bit_as_the_uninterrupted_run(workplace, uninterrupted):
    rng = random.Random(20)
    targets = sorted(rng.sample(range(ROUNDS - 5), NUM_KILLS))
    more: list[str] = []
    for target in targets:
        process = workplace.fork(*workplace.silo("killed", ROUNDS, *more))
        wait_for(process, lambda target=target: len(workplace.rows("killed")) >= target and have_lock(workplace))
        time.sleep(rng.uniform(0, 0.1))  # somewhere within a round: the moment is what is random here
        process.kill()
        process.communicate()
        recorded = len(workplace.rows("killed"))
        if (workplace.path / "killed" / "config.toml").exists():
            more = ["--resume"]
        assert recorded < ROUNDS
    done = workplace.run(*workplace.silo("killed", ROUNDS, *more))
    assert done.returncode == 0, done.stderr
    assert f"going on after round {recorded}" in done.stdout or f"going on after round {recorded + 1}" in done.stdout
    assert_same_run(workplace, "killed", uninterrupted)
    runs = (uninterrupted.path / "whole", workplace.path / "killed")
    whole, killed = (json.loads((run / "summary.json").read_text()) for run in runs)
    for name in ("rounds", "pass_at_1_heldout", "reward_curve", "num_tokens_generated", "scoring_outcomes"):
        assert killed[name] == whole[name]


def have_lock(workplace):
    return (workplace.path / "killed" / "lock").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly_and_the_command_it_names_goes_on(workplace, stopped_by, number, status):
    process = workplace.start(*workplace.silo("run", 400))
    wait_for(process, lambda: len(workplace.rows("run")) >= 5)
    seconds, _, err = stopped_by(process, number)
    assert process.returncode == status
    assert seconds < 10
    assert "Traceback" not in err
    last = len(workplace.rows("run"))
    [line] = [line for line in err.splitlines() if line.startswith("stopped after round")]
    command = line.partition("go on with: ")[2]
    assert line.startswith(f"stopped after round {last};")
    assert (workplace.path / "run" / "checkpoints" / f"round-{last:08d}").exists()
    assert json.loads((workplace.path / "run" / "summary.json").read_text())["stopped_by"] == number.name
    done = workplace.run_fork(*shlex.split(command)[1:], "--rounds", str(last + 2))
    assert done.returncode == 0, done.stderr
    assert f"going on after round {last}" in done.stdout
    assert [row["round"] for row in workplace.rows("run")] == list(range(1, last + 3))


def test_no_scoring_process_outlives_a_killed_node(workplace):
    process = workplace.fork(*workplace.silo("run", 400))
    wait_for(process, lambda: len(workplace.rows("run")) >= 2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert children
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(alive(int(pid)) for pid in children):
        assert time.monotonic() < deadline, "a scoring process is still there"
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_after_making_room_the_run_goes_on_as_if_uninterrupted(workplace, uninterrupted):
    disk = workplace.path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "swarm-node-test", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        full = workplace.run_fork(*workplace.silo("disk/run", ROUNDS))
        assert full.returncode == 2, full.stdout
        [line] = full.stderr.splitlines()
        assert "No space left on device" in line
        assert "go on with --resume" in line
        assert 0 < len(workplace.rows("disk/run")) < ROUNDS
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        done = workplace.run_fork("silo", "--run-dir", "disk/run", "--resume")
        assert done.returncode == 0, done.stderr
        assert_same_run(workplace, "disk/run", uninterrupted)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_truncated_checkpoint_and_a_torn_journal_fall_back_to_the_last_good_state(workplace, uninterrupted):
    first = workplace.run_fork(*workplace.silo("run", ROUNDS // 2))
    assert first.returncode == 0, first.stderr
    newest = max((workplace.path / "run" / "checkpoints").glob("round-*"))
    tensors = newest / "state.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)
    segment = max(path for path in (workplace.path / "run" / "journal").iterdir() if path.stat().st_size > 100)
    os.truncate(segment, segment.stat().st_size - 5)
    done = workplace.run_fork("silo", "--run-dir", "run", "--resume", "--rounds", str(ROUNDS))
    assert done.returncode == 0, done.stderr
    assert f"{newest.name} is damaged" in done.stdout
    assert f"going on after round {ROUNDS // 2 - 1}" in done.stdout
    assert_same_run(workplace, "run", uninterrupted)
