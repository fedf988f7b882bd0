"""An answer has its wall time, and what kept its process from running is not held against it."""

import subprocess
import sys
import time

from hypothesis import given
from hypothesis import strategies as st

from swarm.scoring.patience import Patience

LIMIT_S = 4.0


class Process(Patience):
    """Of a process whose times and state a test sets."""

    def __init__(self):
        super().__init__(0, LIMIT_S)
        self.ran_s, self.waited_s, self.runnable = 0.0, 0.0, False

    def _times(self):
        return self.ran_s, self.waited_s

    def _is_runnable(self):
        return self.runnable


def judged_after(process, step_s, each):
    """Ask every `step_s` until the time is over, `each` telling what the process did; return when that was."""
    now_s = 0.0
    while process.seconds_left(0.0, now_s) > 0:
        assert now_s < 100 * LIMIT_S, "it is never judged"
        now_s += step_s
        each(step_s)
    return now_s


def test_who_sleeps_has_the_limit():
    assert judged_after(Process(), 0.5, lambda step_s: None) == LIMIT_S


def test_who_runs_has_the_limit_of_processor_time():
    process = Process()
    process.runnable = True

    def run(step_s):
        process.ran_s += step_s / 2
        process.waited_s += step_s / 2

    assert judged_after(process, 0.5, run) == 1.0 + 2 * (LIMIT_S - 1.0)


def test_who_waits_for_a_processor_without_getting_one_is_not_judged():
    process = Process()
    process.runnable = True
    assert all(process.seconds_left(0.0, number / 2) > 0 for number in range(200))
    process.waited_s, process.ran_s, process.runnable = 99.0, 0.4, False  # it got one, and sleeps
    assert process.seconds_left(0.0, 100.0) > 0
    assert judged_after(process, 0.5, lambda step_s: None) > 0


def test_a_machine_that_stood_still_is_not_held_against_the_answer():
    process = Process()
    assert process.seconds_left(0.0, 1.5) > 0
    assert process.seconds_left(0.0, 3600.0) > 0
    fresh = Process()
    assert fresh.seconds_left(0.0, 3600.0) > 0


def test_another_answer_has_all_its_time():
    process = Process()
    judged_after(process, 0.5, lambda step_s: None)
    assert process.seconds_left(10.0, 12.0) > 0


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.booleans()), min_size=1))
def test_time_that_counts_is_never_more_than_passed(moments):
    process, now_s, waited_s = Process(), 0.0, 0.0
    for step_s, share, runnable in moments:
        now_s += step_s
        waited_s += share * step_s
        process.waited_s, process.ran_s, process.runnable = waited_s, now_s - waited_s, runnable
        left_s = process.seconds_left(0.0, now_s)
        assert left_s <= LIMIT_S
        assert LIMIT_S - left_s <= now_s + 1e-9


def test_a_real_process_is_seen_to_run_and_to_sleep():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    idle = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        first, second = Patience(busy.pid, 1.0), Patience(idle.pid, 1.0)
        deadline = time.monotonic() + 30
        while first._times()[0] < 0.3 or second._is_runnable():
            assert time.monotonic() < deadline, "the one does not run, or the other does not sleep"
            time.sleep(0.01)
        assert first._is_runnable()
    finally:
        for process in (busy, idle):
            process.kill()
            process.wait()
