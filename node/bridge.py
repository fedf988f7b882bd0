"""Runs `swarm-node bridge`: one node in two networks, which makes them one swarm. It learns nothing.

This process is the first side, and its child the second: two transports do not always fit into one process. Both have
the identity of the run folder. Where one side ends, the other does too, with the reason, and what each remembers is
saved. What crosses is `protocol.bridge`'s; what the two processes say to each other, `node.bridge_side`'s.
Exit status: as in `node.running`.

RUN_DIR/...         the first side's, as in any run folder
        second/...  the second side's
"""

import asyncio
import json
import shutil
import signal
import socket
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from node.bootstrap import report
from node.bridge_side import MAX_STATUS_BYTES, MAX_WORDS_BYTES, USER_ERROR, make_side
from node.config import RunConfig, to_toml
from node.control import Monitor
from node.join import started
from node.processes import child_command
from node.run_folder import RunFolder, write_atomically
from node.running import StopDeadline, resume_command
from node.status import build_status
from protocol.bridge.channel import ChannelBroken
from protocol.bridge.pipe import PipeChannel
from protocol.bridge.side import BridgeSide
from protocol.identity import Identity
from protocol.tasks import first_of
from protocol.transport.base import TransportError
from swarm.errors import UserError

__all__ = ["SideEnded", "SideRefused", "bridge_status", "run_bridge", "second_folder"]

_STOP_WITHIN_S: Final = 6.0  # of the child, before it is killed; this process has eight
_LAST_WORDS_WITHIN_S: Final = 3.0  # of a child whose end of the channel is closed


class SideRefused(UserError):
    """The second side cannot run like this; the message has its own words, which name the fix."""


class SideEnded(Exception):
    """The second side has ended, by a bug or by somebody's hand."""


def second_folder(folder: RunFolder) -> RunFolder:
    """Return where the second side keeps what it remembers."""
    return RunFolder(folder.path / "second")


def run_bridge(configs: tuple[RunConfig, RunConfig], folder: RunFolder, *, as_json: bool) -> int:
    """Run until it is stopped, or a side fails. `folder` is locked. Returns the exit status."""
    is_first_run = not folder.config.exists()
    try:
        with StopDeadline(lambda: _stopped_line(folder)) as deadline:
            number = asyncio.run(_Bridge(configs, folder, as_json=as_json).run(deadline))
    except SideEnded as error:
        print(f"swarm-node: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        if is_first_run and not folder.config.exists():  # it has never begun
            shutil.rmtree(second_folder(folder).path, ignore_errors=True)
    print(_stopped_line(folder), file=sys.stderr, flush=True)
    return 128 + number


def bridge_status(
    run_dir: Path, began_at: float, first: dict[str, Any], second: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what both sides do: `swarm` is the first one's, `sides` are both; None for one that is still starting."""
    sides = [first, *([second] if second is not None else [])]
    status = build_status("bridge", str(run_dir), began_at, None, first)
    warnings = [f"{side['transport']}: {line}" for side in sides for line in side["warnings"]]
    return status | {"sides": sides, "warnings": warnings}


class _Bridge:
    """The first side, and the process of the second."""

    def __init__(self, configs: tuple[RunConfig, RunConfig], folder: RunFolder, *, as_json: bool) -> None:
        self._configs, self._folder, self._as_json = configs, folder, as_json
        self._began_at = time.time()
        self._second: dict[str, Any] | None = None  # what it said last
        self._last_words = ""  # of a second side that fails
        self._stopping, self._second_runs = asyncio.Event(), asyncio.Event()

    async def run(self, deadline: StopDeadline) -> signal.Signals:
        """Run both sides; return the signal that stopped them. Raises what has ended one."""
        received = deadline.watch_signals(self._stopping.set, self._note)
        here, there = socket.socketpair()
        channel = PipeChannel(here)
        for name, take, most in (
            ("status", self._take_status, MAX_STATUS_BYTES),
            ("note", self._take_note, MAX_WORDS_BYTES),
            ("failed", self._take_last_words, MAX_WORDS_BYTES),
        ):
            channel.handle(name, take, max_request_bytes=most)
        identity = Identity.load_or_create(self._folder.identity)
        side = await make_side(self._configs[0], self._folder, identity, channel)
        child = await self._start_child(there)
        try:
            await channel.start()
            await side.start()
            started(side.member, self._folder, self._note)
            await self._wait_for(side, child, self._second_runs.wait())
            write_atomically(second_folder(self._folder).config, to_toml(self._configs[1]))
            write_atomically(self._folder.config, to_toml(self._configs[0]))

            def make_status() -> dict[str, Any]:
                return bridge_status(self._folder.path, self._began_at, side.status(), self._second)

            async with Monitor(self._folder.path, make_status):
                reporting = report(make_status, self._note, as_json=self._as_json)
                await self._wait_for(side, child, reporting)
        except ChannelBroken:
            raise await self._why_it_ended(child) from None
        finally:
            await asyncio.gather(self._end_child(child, channel), side.close())
        return received[0]

    async def _wait_for(
        self, side: BridgeSide, child: asyncio.subprocess.Process, what: Coroutine[Any, Any, object]
    ) -> None:
        """Wait for something, or for the wish to stop. Raises what ends a side before."""
        if self._stopping.is_set():
            what.close()
            return
        await first_of(side.wait_failed(), child.wait(), self._stopping.wait(), what)
        if child.returncode is not None and not self._stopping.is_set():
            raise ChannelBroken("the second side has ended")

    async def _start_child(self, end: socket.socket) -> asyncio.subprocess.Process:
        """Start the second side with its end of the channel."""
        second = second_folder(self._folder)
        second.path.mkdir(exist_ok=True)
        child = await asyncio.create_subprocess_exec(
            *child_command("node.bridge_side", str(end.fileno())),
            stdin=asyncio.subprocess.PIPE,
            pass_fds=[end.fileno()],
            start_new_session=True,
        )
        end.close()
        given = {
            "config": self._configs[1].model_dump(mode="json"),
            "folder": str(second.path),
            "identity": str(self._folder.identity),
        }
        assert child.stdin is not None
        child.stdin.write(json.dumps(given).encode())
        child.stdin.close()
        return child

    async def _end_child(self, child: asyncio.subprocess.Process, channel: PipeChannel) -> None:
        """Ask the second side to leave, and wait for its end; kill it where that takes too long."""
        try:
            async with asyncio.timeout(_STOP_WITHIN_S):
                if child.returncode is None:
                    await channel.request("stop", b"", max_response_bytes=0, timeout_s=_STOP_WITHIN_S)
                await child.wait()
        except (TimeoutError, TransportError):
            if child.returncode is None:
                child.kill()
                await child.wait()

    async def _why_it_ended(self, child: asyncio.subprocess.Process) -> Exception:
        """Return what to raise where the second side is gone."""
        try:
            async with asyncio.timeout(_LAST_WORDS_WITHIN_S):
                await child.wait()
        except TimeoutError:
            pass  # it has closed the channel, and does not end: `_end_child` ends it
        what = f"the second side of the bridge ({self._configs[1].network.transport})"
        if child.returncode == USER_ERROR and self._last_words:
            return SideRefused(f"{what}: {self._last_words}")
        how = "does not answer" if child.returncode is None else f"ended with status {child.returncode}"
        words = f": {self._last_words}" if self._last_words else ""
        return SideEnded(f"{what} {how}{words}; go on with: {_go_on(self._folder)}")

    async def _take_status(self, asker: str, payload: bytes) -> bytes:
        self._second = json.loads(payload)
        self._second_runs.set()
        return b""

    async def _take_note(self, asker: str, payload: bytes) -> bytes:
        self._note(payload.decode())
        return b""

    async def _take_last_words(self, asker: str, payload: bytes) -> bytes:
        self._last_words = payload.decode()
        return b""

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr if self._as_json else sys.stdout, flush=True)


def _go_on(folder: RunFolder) -> str:
    return resume_command(folder, "bridge").removesuffix(" --resume")


def _stopped_line(folder: RunFolder) -> str:
    return f"stopped; go on with: {_go_on(folder)}"
