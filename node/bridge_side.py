"""One side of `swarm-node bridge` in its process; `main` is the process of the second side.

The second process is a child of the first, with which it shares a socket pair. Over it the two exchange what crosses
the bridge (`protocol.bridge`), and beside that:

    status    the child says now and then what it does
    note      a line for the user
    failed    what the child dies of, in words
    stop      the parent asks the child to leave

Where the parent is gone, the child leaves too. Each side saves what it remembers in a folder of its own.
"""

import asyncio
import json
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from node.config import RunConfig
from node.join import last_listen, make_transport, started
from node.membership import member_settings, software
from node.run_folder import RunFolder
from protocol.about import NO_MODEL, NodeAbout
from protocol.bridge.channel import ChannelBroken
from protocol.bridge.pipe import PipeChannel
from protocol.bridge.side import BridgeSide
from protocol.bridge.store import BridgeStore
from protocol.clock import system_clock
from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.member import Member
from protocol.tasks import first_of
from swarm.errors import UserError

__all__ = ["MAX_STATUS_BYTES", "MAX_WORDS_BYTES", "USER_ERROR", "main", "make_side"]

MAX_STATUS_BYTES: Final = 2**20
MAX_WORDS_BYTES: Final = 16 * 2**10
_STATUS_INTERVAL_S: Final = 1.0
_ANSWER_WITHIN_S: Final = 30.0
USER_ERROR: Final = 2


async def make_side(config: RunConfig, folder: RunFolder, identity: Identity, channel: PipeChannel) -> BridgeSide:
    """Make one side of the bridge, with the memory of its folder."""
    swarm = member_settings(config)
    store = BridgeStore(swarm.max_store_bytes, swarm.max_live_batches)
    about = NodeAbout("bootstrap", f"{software()} bridge", NO_MODEL, ())
    member = Member(
        identity,
        make_transport(config, identity, config.network.listen or await last_listen(folder)),
        swarm,
        rescore=None,
        about=lambda: about,
        state_path=folder.swarm,
        clock=system_clock,
        rng=random.Random(),
        store=store,
    )
    return BridgeSide(member, store, channel)


async def _serve(config: RunConfig, folder: RunFolder, identity: Identity, channel: PipeChannel) -> None:
    """Be the second side until the parent says stop, or is gone, or the side fails (raised)."""
    stopping = asyncio.Event()

    async def stop(asker: str, payload: bytes) -> bytes:
        stopping.set()
        return b""

    channel.handle("stop", stop, max_request_bytes=0)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)  # the parent was killed
    side = await make_side(config, folder, identity, channel)
    await channel.start()
    try:
        await side.start()
        lines: list[str] = []
        started(side.member, folder, lines.append)
        for line in lines:
            await _say(channel, "note", line)
        await first_of(side.wait_failed(), stopping.wait(), _report(channel, side.status))
    except (UserError, ProtocolError) as error:
        if isinstance(error, ChannelBroken):
            raise
        await _say(channel, "failed", str(error))
        raise
    except Exception as error:  # a bug, which ends this process with its trace, and the parent with these words
        await _say(channel, "failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        await side.close()


async def _report(channel: PipeChannel, make_status: Callable[[], dict[str, Any]]) -> None:
    """Tell the parent what this side does, again and again. Ends by being cancelled."""
    while True:
        await _say(channel, "status", json.dumps(make_status()))
        await asyncio.sleep(_STATUS_INTERVAL_S)


async def _say(channel: PipeChannel, name: str, words: str) -> None:
    await channel.request(name, words.encode(), max_response_bytes=0, timeout_s=_ANSWER_WITHIN_S)


def main() -> None:
    """Be the process of the second side. Its settings come on stdin, the number of its socket as its argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    end = socket.socket(fileno=int(sys.argv[1]))
    given = json.load(sys.stdin)
    config, folder = RunConfig.model_validate(given["config"]), RunFolder(Path(given["folder"]))
    identity = Identity.load_or_create(Path(given["identity"]))
    sys.exit(asyncio.run(_run(config, folder, identity, end)))


async def _run(config: RunConfig, folder: RunFolder, identity: Identity, end: socket.socket) -> int:
    try:
        await _serve(config, folder, identity, PipeChannel(end))
    except ChannelBroken:
        print("the bridge's first process is gone: this one has left its network", file=sys.stderr)
        return 1
    except (UserError, ProtocolError):
        return USER_ERROR  # the parent has heard of it
    return 0
