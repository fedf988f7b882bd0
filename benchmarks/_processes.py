"""Real `swarm-node` processes on this machine, for tests of survival: started, killed, asked, and never left over.

What a node does is seen from outside alone: by its control socket, its run folder and the kernel's books. Its lines
go to a file beside the run folder, so that no pipe fills up.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import psutil

from node.control import NoStatus, read_status

__all__ = ["LOOPBACK", "LiveNode", "LiveSwarm"]

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
POLL_S = 0.05
_PROGRAM = str(Path(sys.executable).with_name("swarm-node"))
_T = TypeVar("_T")


class LiveNode:
    """One run folder and the process that uses it, if there is one. It may be killed and started again."""

    def __init__(self, folder: Path, name: str, through: Sequence[str] = ()) -> None:
        """`through` is a command that starts others, which it becomes: `ip netns exec NAME`."""
        self.name, self.folder, self.run_dir, self.log = name, folder, folder / name, folder / f"{name}.log"
        self._through = through
        self.started_at_s = 0.0  # on the monotonic clock
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The process that was started last."""
        if self._process is None:
            raise RuntimeError(f"{self.name} has not been started")
        return self._process

    def start(self, *arguments: str, **environment: str) -> None:
        """Start `swarm-node` with this run folder."""
        self.started_at_s = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self._through, _PROGRAM, *arguments, "--run-dir", str(self.run_dir)],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
            )

    def kill(self) -> None:
        """End it as a power failure does."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGTERM, within_s: float = 30.0) -> int:
        """Ask it to stop; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(within_s)

    def status(self) -> dict[str, Any] | None:
        """What it says of itself now; None while it does not run, or does not listen yet."""
        try:
            found = read_status(self.run_dir)
        except NoStatus:
            return None
        return found if found["running"] and found["swarm"] else None

    def swarm(self) -> dict[str, Any]:
        """The part of its status that is about the swarm. Waits until it listens."""
        status: dict[str, Any] = self.wait(self.status, "an address")["swarm"]
        return status

    def rows(self) -> list[dict[str, Any]]:
        """The whole lines of its metrics."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def metrics_bytes(self) -> int:
        """How long its metrics are: they grow by a line with every round."""
        path = self.run_dir / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def wait(self, happened: Callable[[], _T | None], what: str, timeout_s: float = 300.0) -> _T:
        """Wait until something is there, and return it. Fails if the process ends first, or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := happened()):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}: {self.last_words()}"
            assert time.monotonic() < deadline_s, f"{self.name}: waited {timeout_s:g} s for {what}"
            time.sleep(POLL_S)
        return found

    def last_words(self) -> str:
        """The end of what it has said."""
        return self.log.read_text(errors="replace")[-2000:]

    def family(self) -> Iterator[tuple[str, psutil.Process]]:
        """The processes that make up the node, each with what it is: node, p2pd, or one that scores."""
        node = psutil.Process(self.process.pid)
        yield "node", node
        for child in node.children(recursive=True):
            try:
                yield ("p2pd" if child.name() == "p2pd" else "helper"), child
            except psutil.NoSuchProcess:
                continue


class LiveSwarm:
    """Nodes that end with this block, whatever happens in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: dict[str, LiveNode] = {}

    def __enter__(self) -> "LiveSwarm":
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            if node._process is not None and node.process.poll() is None:
                node.kill()

    def start(self, name: str, *arguments: str, through: Sequence[str] = ()) -> LiveNode:
        """Start a node in a run folder of this name."""
        node = self.nodes.setdefault(name, LiveNode(self.folder, name, through))
        node.start(*arguments)
        return node

    def join(self, names: Sequence[str], *arguments: str, first: LiveNode | None = None) -> list[LiveNode]:
        """Start nodes that learn, each with its own seed. They join through `first`, or through the first of them."""
        nodes: list[LiveNode] = []
        for seed, name in enumerate(names, 1):
            through = first or (nodes[0] if nodes else None)
            peers = [] if through is None else ["--peers", through.swarm()["addresses"][0]]
            common = ("--listen", LOOPBACK, "--set", "network.nat_port_map=false", "--seed", str(seed))
            nodes.append(self.start(name, "join", *common, *peers, *arguments))
        return nodes
