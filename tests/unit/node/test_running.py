import asyncio
import os
import signal
import threading
from typing import Any

import pytest
import torch

from node.running import OutOfMemory, StopDeadline, resume_command, run_until_stopped
from swarm.errors import TrainingDiverged


def cpu_out_of_memory() -> BaseException:
    """What torch raises when the CPU has no memory left."""
    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("nobody has that much memory")


@pytest.mark.parametrize("make_error", [cpu_out_of_memory, MemoryError, lambda: torch.OutOfMemoryError("CUDA")])
def test_out_of_memory_names_the_settings_to_lower_and_keeps_the_rounds_before(harness, make_error):
    run = harness(fails=(3, make_error()))
    with pytest.raises(OutOfMemory) as caught:
        until_stopped(run.node())
    message = str(caught.value)
    assert message.startswith("out of memory (update): lower trainer.max_tokens_per_microbatch")
    assert message.endswith(resume_command(run.folder))
    assert "\n" not in message
    again = harness()
    again.run()
    assert again.display.notes[0] == "resumed after 2"


def until_stopped(node: Any) -> signal.Signals | None:
    with StopDeadline(lambda: "") as deadline:
        return asyncio.run(run_until_stopped(node, node.recorder.folder, deadline))


def test_another_error_of_torch_is_a_bug_and_stays_one(harness):
    with pytest.raises(RuntimeError, match="shapes do not match"):
        until_stopped(harness(fails=(3, RuntimeError("shapes do not match"))).node())


def test_divergence_is_raised_with_the_rounds_before_intact(harness):
    with pytest.raises(TrainingDiverged):
        until_stopped(harness(fails=(5, TrainingDiverged("not finite"))).node())
    again = harness()
    again.run()
    assert again.display.notes[0] == "resumed after 4"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_between_rounds_stops_after_the_round(harness, number):
    run = harness()

    def on_round(round_index: int) -> None:
        if round_index == 4:
            os.kill(os.getpid(), number)

    run.on_round = on_round
    assert until_stopped(run.node()) == number
    assert run.display.rounds[-1] >= 4
    assert len(run.display.rounds) < 12
    assert f"{number.name}: stopping after this step" in run.display.notes[-1]
    # A deadline that outlived the run would end the process that runs these tests.
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
