"""Runs `swarm-node bootstrap`: a node that others find each other through. It routes and relays, and learns nothing.

It needs no model, no tasks and no torch. Any node can stand in for it: a swarm needs one live peer to be joined.
Exit status: as in `node.running`.
"""

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from node.config import RunConfig, to_toml
from node.control import Monitor
from node.join import make_member, started
from node.membership import software
from node.run_folder import RunFolder, write_atomically
from node.running import StopDeadline, resume_command
from node.status import build_status
from protocol.about import NO_MODEL, NodeAbout

__all__ = ["report", "run_bootstrap"]

_REPORT_INTERVAL_S: Final = 2.0
_JSON_INTERVAL_S: Final = 5.0


def run_bootstrap(config: RunConfig, folder: RunFolder, *, as_json: bool) -> int:
    """Run until it is stopped. `folder` is locked. Returns the exit status."""
    with StopDeadline(lambda: _stopped_line(folder)) as deadline:
        number = asyncio.run(_run(config, folder, deadline, as_json=as_json))
    print(_stopped_line(folder), file=sys.stderr, flush=True)
    return 128 + number


async def _run(config: RunConfig, folder: RunFolder, deadline: StopDeadline, *, as_json: bool) -> signal.Signals:
    out = sys.stderr if as_json else sys.stdout

    def note(text: str) -> None:
        print(text, file=out, flush=True)

    about = NodeAbout("bootstrap", software(), NO_MODEL, ())
    member = await make_member(config, folder, None, lambda: about)
    began_at = time.time()

    def make_status() -> dict[str, Any]:
        return build_status("bootstrap", str(folder.path), began_at, None, member.status())

    stopping = asyncio.Event()
    received = deadline.watch_signals(stopping.set, note)
    try:
        await member.start()
        write_atomically(folder.config, to_toml(config))
        started(member, folder, note)
        async with Monitor(folder.path, make_status):
            failing = asyncio.ensure_future(member.wait_failed())
            reporting = asyncio.ensure_future(report(make_status, note, as_json=as_json))
            stopped = asyncio.ensure_future(stopping.wait())
            done, waiting = await asyncio.wait({failing, reporting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in waiting:
                task.cancel()
            for task in done:
                task.result()
    finally:
        await member.close()
    return received[0]


async def report(make_status: Callable[[], dict[str, Any]], note: Callable[[str], None], *, as_json: bool) -> None:
    """Say now and then how many peers there are. Ends by being cancelled, or when nobody reads any more."""
    num_said = -1
    while True:
        status = make_status()
        num_peers = sum(side["num_peers"] for side in status.get("sides", [status["swarm"]]))
        if as_json:
            print(json.dumps(status), flush=True)
        elif num_peers != num_said:
            note(f"{num_peers} {'peer' if num_peers == 1 else 'peers'}")
        num_said = num_peers
        await asyncio.sleep(_JSON_INTERVAL_S if as_json else _REPORT_INTERVAL_S)


def _stopped_line(folder: RunFolder) -> str:
    return f"stopped; go on with: {resume_command(folder, 'bootstrap').removesuffix(' --resume')}"
