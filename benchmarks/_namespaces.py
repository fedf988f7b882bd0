"""A network of this machine's own that can be cut in two: namespaces of Linux, joined by two bridges in one more.

Needs root, and `ip` and `tc` of iproute2. A cut drops packets in silence, as a broken backbone does: nobody is told
that a connection is gone. Nothing outside these namespaces is touched, and they go with `close`.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

__all__ = ["NamespaceError", "Namespaces", "enter_namespace"]

_CLONE_NEWNET = 0x40000000
_NETNS = Path("/run/netns")
# Classic BPF, each instruction with its code, jumps and operand: drops (2) TCP over IPv4 with SYN and without ACK.
_NO_SYN = (
    "10,40 0 0 12,21 0 7 2048,"  # IPv4
    "48 0 0 23,21 0 5 6,"  # TCP
    "177 0 0 14,80 0 0 27,84 0 0 18,21 0 1 2,"  # flags
    "6 0 0 2,6 0 0 0"
)


class NamespaceError(Exception):
    """This machine does not let this user make network namespaces."""


def enter_namespace(name: str) -> None:
    """Move this thread, and whatever it starts from now on, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (_NETNS / name).open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name}")


class Namespaces:
    """One namespace for each node, all on one bridge at first. A context manager."""

    def __init__(self, num: int, network: str = "10.77.0") -> None:
        """Make them, with addresses of this network. Raises NamespaceError where that is impossible."""
        for program in ("ip", "tc"):
            if not shutil.which(program):
                raise NamespaceError(f"the program `{program}` (iproute2) is missing")
        self._hub = f"swarm{os.getpid()}"
        self.names = [f"{self._hub}-{number}" for number in range(num)]
        self.hosts = [f"{network}.{number + 1}" for number in range(num)]
        try:
            for name in (self._hub, *self.names):
                _ip("netns", "add", name)
            for bridge in ("one", "two"):
                _ip("-n", self._hub, "link", "add", bridge, "type", "bridge")
                _ip("-n", self._hub, "link", "set", bridge, "up")
            for number, name in enumerate(self.names):
                port = ("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("-n", self._hub, *port)
                _ip("-n", self._hub, "link", "set", f"port{number}", "master", "one", "up")
                _ip("-n", name, "address", "add", f"{self.hosts[number]}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except NamespaceError:
            self.close()
            raise

    def __enter__(self) -> "Namespaces":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut_off(self, numbers: Iterable[int]) -> None:
        """Let these nodes reach each other and nobody else."""
        self._move(numbers, "two")

    def heal(self) -> None:
        """Let all nodes reach each other again."""
        self._move(range(len(self.names)), "one")

    def shut_in(self, number: int) -> None:
        """Put a node behind a firewall that lets nobody in: a connection that begins outside gets no answer."""
        device = ("-n", self.names[number])
        _run("tc", *device, "qdisc", "add", "dev", "eth0", "ingress")
        _run("tc", *device, "filter", "add", "dev", "eth0", "parent", "ffff:", "bpf", "da", "bytecode", _NO_SYN)

    def close(self) -> None:
        """Remove the namespaces with everything in them."""
        for name in (*self.names, self._hub):
            if (_NETNS / name).exists():
                _ip("netns", "delete", name)

    def _move(self, numbers: Iterable[int], bridge: str) -> None:
        for number in numbers:
            _ip("-n", self._hub, "link", "set", f"port{number}", "master", bridge)


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NamespaceError(f"{' '.join(words)}: {done.stderr.strip()}")
