"""Runs `swarm-node silo`: one node, its run folder, its signals, and what is left to say at the end.

The loop is `node.daemon`'s. Exit status: 0 the run is finished, 2 the user can fix it, 3 training diverged,
130 and 143 stopped by Ctrl-C and SIGTERM. A bug ends with its traceback and status 1. Whatever it is, the
finished rounds are on the disk.
"""

import asyncio
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from node.config import RunConfig, to_toml
from node.display import Display, JsonDisplay, PlainDisplay, RunInfo
from node.exchange import SiloExchange
from node.run_folder import RunFolder, write_atomically
from node.summary import model_label, print_summary, summarize, tasks_label, write_summary
from swarm.errors import TrainingDiverged, UserError

if TYPE_CHECKING:
    from node.daemon import Node
    from node.parts import Parts

__all__ = ["FINISHED", "OutOfMemory", "StopDeadline", "resume_command", "run_silo", "run_until_stopped"]

FINISHED = 0
_STOP_WITHIN_S = 8.0  # after this a step that is still going on is given up; the journal has every finished round
_LOWER = {
    "rollout": "engine.max_slots, rollout.num_completions or rollout.max_new_tokens",
    "evaluation": "engine.max_slots or rollout.max_new_tokens",
    "update": "trainer.max_tokens_per_microbatch or trainer.logprob_chunk_tokens",
    "replay": "trainer.max_tokens_per_microbatch or trainer.logprob_chunk_tokens",
}


class OutOfMemory(UserError):
    """The machine has too little memory for the settings."""


def run_silo(config: RunConfig, folder: RunFolder, *, as_json: bool) -> int:
    """Run a node alone until it is finished or stopped. `folder` is locked. Returns the exit status."""
    display = make_display(as_json)
    display.begin(RunInfo(model_label(config), tasks_label(config), config.rounds, str(folder.path)))
    try:
        with _terminated_early():
            from node.daemon import MOVING_AVERAGE_ROUNDS, Node
            from node.parts import build_parts
            from node.recorder import Recorder

        def build(config: RunConfig, stopping: threading.Event) -> "Parts":
            parts = build_parts(config, stopping)
            write_atomically(folder.config, to_toml(config))
            return parts

        recorder = Recorder(folder, config.checkpoint)
        node = Node(config, build_parts=build, recorder=recorder, exchange=SiloExchange(), display=display)
        with StopDeadline() as deadline:
            stopped_by = asyncio.run(run_until_stopped(node, deadline))
            display.end()
            return _conclude(node, folder, stopped_by, MOVING_AVERAGE_ROUNDS, as_json=as_json)
    except TrainingDiverged as error:
        write_summary(folder, summarize(config, node.rows, "diverged"))
        raise TrainingDiverged(
            f"training diverged after round {node.recorder.last_round} ({error}); its policy is intact: "
            f"`swarm-node export {shlex.quote(str(folder.path))} FOLDER`, then start again with --model FOLDER "
            "and a lower trainer.learning_rate"
        ) from error
    finally:
        display.end()


def make_display(as_json: bool) -> Display:
    """Return the display for where stdout goes."""
    if as_json:
        return JsonDisplay(sys.stdout, sys.stderr)
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        return PlainDisplay(sys.stdout)
    from node.live import LiveDisplay

    return LiveDisplay(console)


class StopDeadline:
    """Ends a process that was asked to stop and has not, in the middle of whatever it does.

    A thread of its own, so that it still counts when the loop has ended. Leaving the block calls it off.
    """

    def __init__(self) -> None:
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> "StopDeadline":
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()

    def begin(self, node: "Node", number: signal.Signals) -> None:
        """Start to count: from now on the process has `_STOP_WITHIN_S` seconds."""
        timer = threading.Timer(_STOP_WITHIN_S, _leave_at_once, (node, number))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()


async def run_until_stopped(node: "Node", deadline: StopDeadline) -> signal.Signals | None:
    """Run the node; return the signal that stopped it, if one did."""
    loop = asyncio.get_running_loop()
    received: list[signal.Signals] = []

    def on_signal(number: signal.Signals) -> None:
        received.append(number)
        if len(received) > 1:
            _leave_at_once(node, received[0])
        node.stop()
        node.display.note(f"{number.name}: stopping after this step; once more stops at once")
        deadline.begin(node, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await node.run()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        lower = _LOWER.get(node.phase, "the size of the model, or set model.dtype=bfloat16")
        raise OutOfMemory(
            f"out of memory ({node.phase}): lower {lower}; go on with {resume_command(node.recorder.folder)}"
        ) from error
    return received[0] if received and not node.finished else None


def _leave_at_once(node: "Node", number: signal.Signals) -> None:
    """End the process in the middle of a step. Nothing is lost but the round that is going on."""
    node.display.end()
    print(_stopped_line(node), file=sys.stderr, flush=True)
    os._exit(128 + number)


def _stopped_line(node: "Node") -> str:
    return f"stopped after round {node.recorder.last_round}; go on with: {resume_command(node.recorder.folder)}"


def resume_command(folder: RunFolder) -> str:
    """Return the command that goes on with a run."""
    return f"swarm-node silo --run-dir {shlex.quote(str(folder.path))} --resume"


def _conclude(node: "Node", folder: RunFolder, stopped_by: signal.Signals | None, window: int, *, as_json: bool) -> int:
    """Write the summary and, of a finished run, the picture; say what there is."""
    console = Console(stderr=as_json)
    name = stopped_by.name if stopped_by is not None else "finished"
    summary = summarize(node.config, node.rows, name)
    write_summary(folder, summary)
    if stopped_by is not None:
        print(_stopped_line(node), file=sys.stderr, flush=True)
        return 128 + stopped_by
    if node.rows:
        from node.plot import plot_rewards

        plot_rewards(node.rows, f"{model_label(node.config)} on {tasks_label(node.config)}", window, folder.picture)
    print_summary(console, folder, summary)
    return FINISHED


@contextmanager
def _terminated_early() -> Iterator[None]:
    """Until the loop handles signals itself, SIGTERM ends the process like Ctrl-C does: by an exception."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python had no memory left; the CPU allocator of torch has no exception of its own."""
    text = str(error).lower()
    is_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "out of memory" in text
    return isinstance(error, MemoryError) or is_torch
