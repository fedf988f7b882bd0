"""Runs one node, alone or in a swarm: its run folder, its signals, and what is left to say at the end.

The loop is `node.daemon`'s, the swarm `node.join`'s. Exit status: 0 the run is finished, 2 the user can fix it,
3 training diverged, 130 and 143 stopped by Ctrl-C and SIGTERM. A bug ends with its traceback and status 1.
Whatever it is, the finished rounds are on the disk.
"""

import asyncio
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from node.config import RunConfig, to_toml
from node.control import Monitor
from node.display import Display, JsonDisplay, PlainDisplay, RunInfo
from node.exchange import Exchange
from node.importing import importing
from node.metrics import read_rows
from node.run_folder import RunFolder, write_atomically
from node.status import build_status, training_status
from node.summary import model_label, print_summary, summarize, tasks_label, write_summary
from node.torchrun import launch
from swarm.errors import TrainingDiverged, UserError
from swarm.models.presets import locate

if TYPE_CHECKING:
    from node.daemon import Node
    from node.parts import Parts

__all__ = ["FINISHED", "OutOfMemory", "StopDeadline", "resume_command", "run_node", "run_until_stopped"]

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


def run_node(
    config: RunConfig,
    folder: RunFolder,
    *,
    command: str,
    make_exchange: Callable[[Display], Exchange],
    as_json: bool,
) -> int:
    """Run a node until it is finished or stopped. `folder` is locked. Returns the exit status.

    `command` is the one that was typed: "silo" or "join".
    """
    display = make_display(as_json)
    display.begin(RunInfo(command, model_label(config), tasks_label(config), config.rounds, str(folder.path)))
    try:
        with _terminated_early():
            launch().check(config)
            locate(config.model.name)  # what can be known at once is said before anything is loaded
            from node.daemon import MOVING_AVERAGE_ROUNDS, Node
            from node.recorder import Recorder

        def build(config: RunConfig, stopping: threading.Event) -> "Parts":
            with importing():  # torch and transformers take seconds: it is in its swarm meanwhile
                from node.parts import build_parts

            parts = build_parts(config, stopping, display.note)
            write_atomically(folder.config, to_toml(config))
            return parts

        recorder = Recorder(folder, config.checkpoint)
        exchange = make_exchange(display)
        node = Node(config, build_parts=build, recorder=recorder, exchange=exchange, display=display)
        began_at = time.time()

        def make_status() -> dict[str, Any]:
            training = training_status(node, model_label(config), tasks_label(config))
            return build_status(command, str(folder.path), began_at, training, exchange.status())

        async def run() -> signal.Signals | None:
            async with Monitor(folder.path, make_status):
                return await run_until_stopped(node, folder, deadline, command)

        with StopDeadline(lambda: _stopped_line(node, folder, command), display.end) as deadline:
            stopped_by = asyncio.run(run())
            display.end()
            return _conclude(node, folder, command, stopped_by, MOVING_AVERAGE_ROUNDS, as_json=as_json)
    except TrainingDiverged as error:
        write_summary(folder, summarize(config, read_rows(folder.metrics), "diverged"))
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

    def __init__(self, last_line: Callable[[], str], before: Callable[[], None] = lambda: None) -> None:
        """`last_line` is what is said on stderr when the process is ended, after `before`."""
        self._last_line, self._before = last_line, before
        self._timers: list[threading.Timer] = []

    def __enter__(self) -> "StopDeadline":
        return self

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()

    def begin(self, number: signal.Signals) -> None:
        """Start to count: from now on the process has `_STOP_WITHIN_S` seconds."""
        timer = threading.Timer(_STOP_WITHIN_S, self.leave_at_once, (number,))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def leave_at_once(self, number: signal.Signals) -> None:
        """End the process in the middle of a step. Nothing is lost but the round that is going on."""
        self._before()
        print(self._last_line(), file=sys.stderr, flush=True)
        os._exit(128 + number)

    def watch_signals(self, stop: Callable[[], None], note: Callable[[str], None]) -> list[signal.Signals]:
        """From now on a signal calls `stop`, a second one ends the process. Returns the list of those received."""
        received: list[signal.Signals] = []

        def on_signal(number: signal.Signals) -> None:
            received.append(number)
            if len(received) > 1:
                self.leave_at_once(received[0])
            stop()
            note(f"{number.name}: stopping after this step; once more stops at once")
            self.begin(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        return received


async def run_until_stopped(
    node: "Node", folder: RunFolder, deadline: StopDeadline, command: str = "silo"
) -> signal.Signals | None:
    """Run the node; return the signal that stopped it, if one did."""
    received = deadline.watch_signals(node.stop, node.display.note)
    try:
        await node.run()
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        lower = _LOWER.get(node.phase, "the size of the model, or set model.dtype=bfloat16")
        raise OutOfMemory(
            f"out of memory ({node.phase}): lower {lower}; go on with {resume_command(folder, command)}"
        ) from error
    return received[0] if received and not node.finished else None


def _stopped_line(node: "Node", folder: RunFolder, command: str) -> str:
    last, go_on = node.recorder.last_round, resume_command(folder, command)
    return f"stopped after round {last}; go on with: {go_on}"


def resume_command(folder: RunFolder, command: str = "silo") -> str:
    """Return the command that goes on with a run."""
    return f"swarm-node {command} --run-dir {shlex.quote(str(folder.path))} --resume"


def _conclude(
    node: "Node",
    folder: RunFolder,
    command: str,
    stopped_by: signal.Signals | None,
    window: int,
    *,
    as_json: bool,
) -> int:
    """Write the summary and, of a finished run, the picture; say what there is."""
    console = Console(stderr=as_json)
    name = stopped_by.name if stopped_by is not None else "finished"
    rows = read_rows(folder.metrics)
    summary = summarize(node.config, rows, name)
    write_summary(folder, summary)
    if stopped_by is not None:
        print(_stopped_line(node, folder, command), file=sys.stderr, flush=True)
        return 128 + stopped_by
    if rows:
        from node.plot import plot_rewards

        plot_rewards(rows, f"{model_label(node.config)} on {tasks_label(node.config)}", window, folder.picture)
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
