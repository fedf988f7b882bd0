"""The demonstration: real processes that end when it does, whatever ends it."""

import signal
import time

import psutil
import pytest


def left_over(folder):
    """Processes that were started with this folder."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ()) and "demo" not in process.info["cmdline"]
    ]


def test_the_demonstration_shows_what_each_learned_and_what_they_exchanged(workplace):
    done = workplace.run("demo", "--nodes", "2", "--rounds", "8", "--run-dir", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("a swarm on this machine", "node-2", "held-out pass@1", "what they exchanged", "published"):
        assert part in done.stdout, part
    assert (workplace.path / "demo" / "reward.png").stat().st_size > 10_000
    assert [row["round"] for row in workplace.rows("demo/node-1")] == list(range(1, 9))
    assert left_over(workplace.path / "demo") == []
    again = workplace.run("demo", "--run-dir", "demo")
    assert again.returncode == 2
    assert "is not empty" in again.stderr


@pytest.mark.no_cover
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_demonstration(workplace, number):
    demo = workplace.start("demo", "--nodes", "2", "--rounds", "100000", "--run-dir", "demo")
    deadline = time.monotonic() + 120
    while not all(len(workplace.rows(f"demo/node-{index}")) > 2 for index in (1, 2)):
        assert demo.poll() is None, demo.communicate()
        assert time.monotonic() < deadline, "waited too long for rounds"
        time.sleep(0.1)
    assert len(left_over(workplace.path / "demo")) >= 3
    demo.send_signal(number)
    demo.communicate(timeout=60)
    assert demo.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + (0.5 if number == signal.SIGINT else 20)  # killed: they find their pipe broken
    while left_over(workplace.path / "demo"):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)
