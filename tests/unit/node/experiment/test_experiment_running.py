"""Which units are run, when, and what is left where one fails: with units that count how often they are asked."""

import io
import os
import signal

import pytest

from node.experiment.plan import make_plan
from node.experiment.running import run_units
from node.layers import Layer
from swarm.errors import UserError

UNITS = make_plan(
    [
        Layer(
            "test",
            {
                "experiment.arms": ["8/0", "4/4"],
                "experiment.seeds": 2,
                "experiment.nodes": 2,
                "rounds": 10,
            },
        )
    ],
    {},
).units


class Counting:
    """Needs to be asked so often; fails instead where it is told to."""

    def __init__(self, unit, log, needs, error=None):
        self.unit, self.log, self.needs, self.error = unit, log, needs, error
        self.rounds_done = 0
        log.append(f"begin {unit.name}")

    def finished(self):
        self.needs -= 1
        self.rounds_done = min(20, self.rounds_done + 7)
        if self.needs:
            return False
        if self.error is not None:
            raise self.error
        self.log.append(f"done {self.unit.name}")
        return True

    def stop(self):
        self.log.append(f"stop {self.unit.name}")

    def end(self):
        self.log.append(f"end {self.unit.name}")


def run(num_jobs, needs, errors=None, on_begin=lambda unit: None):
    log, out = [], io.StringIO()

    def begin(unit):
        on_begin(unit)
        return Counting(unit, log, needs[unit.name], (errors or {}).get(unit.name))

    try:
        run_units(UNITS, num_jobs, begin, 3, out)
    finally:
        print(out.getvalue())
    return log, out.getvalue()


NEEDS = {"8-0-seed1": 1, "4-4-seed1": 3, "8-0-seed2": 1, "4-4-seed2": 1}


def test_as_many_as_there_are_jobs_run_side_by_side_the_first_ones_first(monkeypatch):
    monkeypatch.setattr("node.experiment.running._POLL_S", 0.0)
    log, said = run(2, dict(NEEDS))
    assert log[:2] == ["begin 8-0-seed1", "begin 4-4-seed1"]
    assert log.index("done 8-0-seed1") < log.index("begin 8-0-seed2") < log.index("done 4-4-seed1")
    assert sorted(line for line in log if line.startswith("done")) == sorted(f"done {unit.name}" for unit in UNITS)
    assert "4 of 7" in said, "those that were there before are counted"
    assert "7 of 7" in said


def test_one_that_fails_ends_the_others_and_says_why(monkeypatch):
    monkeypatch.setattr("node.experiment.running._POLL_S", 0.0)
    log = []

    def begin(unit):
        fails = unit.arm == "4/4"
        return Counting(unit, log, 2 if fails else 9, UserError("no such model") if fails else None)

    with pytest.raises(UserError, match="no such model"):
        run_units(UNITS, 2, begin, 0, io.StringIO())
    # All are asked before one is waited for.
    assert log[-4:] == ["stop 8-0-seed1", "stop 4-4-seed1", "end 8-0-seed1", "end 4-4-seed1"]
    assert not any(line.startswith("done") for line in log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_runs(monkeypatch, number):
    monkeypatch.setattr("node.experiment.running._POLL_S", 0.0)
    before = signal.getsignal(number)
    log = []

    def begin(unit):
        if unit.seed == 2:
            os.kill(os.getpid(), number)
        return Counting(unit, log, 1 if unit.seed == 1 else 10**9)

    with pytest.raises(KeyboardInterrupt):
        run_units(UNITS, 1, begin, 0, io.StringIO())
    assert "done 4-4-seed1" in log
    assert not any("seed2" in line and "done" in line for line in log)
    assert signal.getsignal(number) == before
