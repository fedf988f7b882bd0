"""A task source that runs hostile code where a scorer would run. Only tests can reach it.

An answer names a function here. Its score: 1 if the attack succeeded, 0.5 if it was refused.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

from swarm.tasks.jsonl import JsonlSource
from swarm.tasks.mixture import build_source

LIBC = ctypes.CDLL(None, use_errno=True)


def calm(*_):
    raise PermissionError("nothing was tried")


def write_file(path):
    with open(path, "w") as file:
        file.write("pwned")


def native_write(path):
    fd = LIBC.open(path.encode(), os.O_WRONLY | os.O_CREAT, 0o600)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open")
    LIBC.write(fd, b"pwned", 5)
    LIBC.close(fd)


def mkdir(path):
    os.mkdir(path + ".folder")


def unlink(path):
    os.unlink(path)


def rename(path):
    os.rename(path, path + ".moved")


def connect(_):
    server = socket.socket()
    server.bind(("127.0.0.1", 0))


def native_socket(_):
    if LIBC.socket(2, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "socket")


def _leave_if_child(pid):
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def fork(_):
    _leave_if_child(os.fork())


def native_fork(_):
    pid = LIBC.fork()
    if pid < 0:
        raise OSError(ctypes.get_errno(), "fork")
    _leave_if_child(pid)


def spawn(_):
    subprocess.run([shutil.which("true") or "/bin/true"], check=True)


def execute(_):
    os.execv("/bin/true", ["true"])


def kill_parent(_):
    os.kill(os.getppid(), signal.SIGUSR1)


def evaluate(text):
    eval(text, {"x": 1})


def loop(_):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue


def native_loop(_):
    return 9**9**9


def allocate(_):
    return len(bytearray(10 * 2**30))


def sleep(_):
    time.sleep(1000)


def crash(_):
    ctypes.string_at(0)


def exit(_):
    sys.exit(0)


def print(_):
    sys.stdout.write("x" * 100_000)
    sys.stderr.write("x" * 100_000)


def environment_is_clean(_):
    assert "SWARM_SECRET" not in os.environ
    assert "HOME" not in os.environ


def folder_is_empty(_):
    assert os.listdir(".") == []


def imports_are_few(_):
    assert not {"torch", "transformers", "pydantic", "matplotlib", "asyncio"} & set(sys.modules)


def no_foreign_descriptors(_):
    assert len(os.listdir("/dev/fd")) <= 7  # three standard, requests, results, shared numbers, the listing


class HostileSource(JsonlSource):
    def score(self, seed, index, answer):
        name, _, argument = answer.partition(" ")
        try:
            globals()[name](argument)
        except (PermissionError, BlockingIOError):
            return 0.5
        return 1.0


def build(spec):
    source = build_source(spec)
    source.__class__ = HostileSource
    return source
