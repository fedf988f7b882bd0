"""One node's transport in a process of its own, told line by line on stdin what to do; each line is answered by one.

Arguments: identity file, seconds by which the clock is wrong, addresses to listen on.
"""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

_true_time = time.time
time.time = lambda: _true_time() + float(sys.argv[2])  # before anybody takes the function

from protocol.identity import Identity  # noqa: E402
from protocol.transport.base import TransportError  # noqa: E402
from protocol.transport.hivemind import HivemindSettings, HivemindTransport  # noqa: E402


async def echo(asker: str, request: bytes) -> bytes:
    return request


async def obey(transport: HivemindTransport, command: str, *words: str) -> str:
    if command == "connect":
        return await transport.connect(words[0], timeout_s=10)
    if command == "ask":
        return (await transport.request(words[0], "echo", b"hello", max_response_bytes=9, timeout_s=5)).decode()
    if command == "store":
        return str(await transport.store(b"key", words[0].encode(), time.time() + 60))
    if command == "lookup":
        return " ".join(sorted(record.value.decode() for record in await transport.lookup(b"key", timeout_s=5)))
    if command == "daemon":
        return str(transport._session.daemon._child.pid if transport._session else "down")
    if command == "stop_daemon":
        os.kill(transport._session.daemon._child.pid, signal.SIGSTOP)
        return "stopped"
    raise AssertionError(command)


async def main() -> None:
    identity = Identity.load_or_create(Path(sys.argv[1]))
    settings = HivemindSettings(listen=tuple(sys.argv[3:]), nat_port_map=False, auto_nat=False)
    transport = HivemindTransport(identity, lambda key, owner, value, expires_at, now: True, settings)
    transport.handle("echo", echo, max_request_bytes=100)
    try:
        await transport.start()
    except TransportError as error:
        print(f"TransportError: {error}")
        return
    print(*transport.addresses, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            print(await obey(transport, *line.split()), flush=True)
        except TransportError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
    await transport.close()


asyncio.run(main())
