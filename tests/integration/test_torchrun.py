"""One node of two processes: it learns what one process learns, says things once, and leaves nothing when it ends.

torchrun is typed where what it does itself counts. Elsewhere its processes are forked, with the environment it gives.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
NEAR = ("loss", "grad_norm", "tis_mean", "mismatch", "clip_fraction")
SAME = ("round", "reward_mean", "num_tokens_generated", "policy_version", "learning_rate", "pass_at_1_heldout_before")


def torchrun(workplace, *arguments):
    program = str(Path(TORCHRUN).with_name("swarm-node"))
    return subprocess.run(
        [TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "--no-python", program, *arguments],
        cwd=workplace.path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def forked(workplace, *arguments):
    """Start the two processes as torchrun does, which is not there to end them."""
    launch = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [workplace.fork(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **launch) for rank in range(2)]


def wait_for_rounds(workplace, processes, num):
    deadline = time.monotonic() + 120
    while len(workplace.rows("run")) < num:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def assert_alike(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert [ours.get(name) for name in SAME] == [theirs.get(name) for name in SAME]
        assert [ours[name] for name in NEAR] == pytest.approx([theirs[name] for name in NEAR], rel=1e-3, abs=1e-5)


def test_torchrun_gives_the_run_of_one_process_and_one_process_goes_on_with_it(workplace):
    tiny = ["silo", "--model", "tiny", "--set", "evaluation.num_items=8", "--set", "evaluation.every_rounds=0"]
    done = torchrun(workplace, *tiny, "--rounds", "3", "--run-dir", "shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainer: 2 processes, cpu") == 1
    done = workplace.run_fork("silo", "--run-dir", "shared", "--resume", "--rounds", "4")
    assert done.returncode == 0, done.stderr
    assert workplace.run_fork(*tiny, "--rounds", "4", "--run-dir", "alone").returncode == 0
    assert_alike(workplace.rows("shared"), workplace.rows("alone"))


def test_a_mistake_is_said_once(workplace):
    done = torchrun(workplace, *workplace.silo("run", 3, "--model", "no/such/folder"))
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if "swarm-node: " in line]
    assert "no/such/folder" in line
    assert not (workplace.path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["silo", "--rounds", "many"], "'many' is not a valid integer"),
        (["doctor"], "torchrun starts silo and join alone"),
    ],
)
def test_a_mistake_in_the_command_ends_both_and_one_says_it(workplace, arguments, message):
    leader, follower = forked(workplace, *arguments)
    assert message in leader.communicate()[1]
    assert follower.communicate() == ("", "")
    assert leader.returncode == follower.returncode == 2


def test_when_the_node_is_killed_the_other_ends_and_a_run_of_two_goes_on(workplace):
    leader, follower = forked(workplace, *workplace.silo("run", 400))
    wait_for_rounds(workplace, (leader, follower), 3)
    leader.kill()
    begin = time.monotonic()
    assert follower.communicate(timeout=20) == ("", "")
    assert time.monotonic() - begin < 10
    assert follower.returncode == 0
    last = len(workplace.rows("run"))
    both = forked(workplace, "silo", "--run-dir", "run", "--resume", "--rounds", str(last + 2))
    out, err = both[0].communicate()
    assert both[0].returncode == 0, err
    assert "going on after round" in out
    assert [row["round"] for row in workplace.rows("run")] == list(range(1, last + 3))
    assert both[1].communicate() == ("", "")
    assert both[1].returncode == 0


def test_when_the_other_is_killed_the_node_fails_loudly(workplace):
    leader, follower = forked(workplace, *workplace.silo("run", 400))
    wait_for_rounds(workplace, (leader, follower), 2)
    follower.kill()
    _, err = leader.communicate(timeout=60)
    assert leader.returncode == 1
    assert "Traceback" in err


def test_sigterm_to_both_stops_the_node_after_its_step_with_a_checkpoint(workplace):
    both = forked(workplace, *workplace.silo("run", 400))
    wait_for_rounds(workplace, both, 2)
    for process in both:
        process.send_signal(signal.SIGTERM)
    _, err = both[0].communicate(timeout=30)
    assert both[0].returncode == 143, err
    assert "Traceback" not in err
    last = len(workplace.rows("run"))
    assert f"stopped after round {last};" in err
    assert (workplace.path / "run" / "checkpoints" / f"round-{last:08d}").exists()
    assert both[1].communicate(timeout=30) == ("", "")
    assert both[1].returncode == 0
