"""Starts one `swarm-node` after another without importing torch and transformers for each: they are forked.

This process imports what a node imports. Then it reads JSON from stdin, a line each, and answers with a line:

    {"arguments": [...], "folder": ..., "environment": {...}, "out": ..., "err": ...}   forks a node; its pid
    {"pid": ...}                                              its exit status once it has ended, null before

A node is a process of its own all the same, with its own files, locks and scoring processes, to be killed like any.
What a fork shares with the others is how it was imported and the seed of its hashes.
"""

import gc
import importlib
import json
import os
import sys
from typing import Any

IMPORTS = (
    "node.cli",
    "node.daemon",
    "node.exchange",
    "node.parts",
    "node.running",
    "node.saved",
    "matplotlib.pyplot",
    "reasoning_gym",
    "transformers.models.llama.modeling_llama",
)


def become(request: dict[str, Any]) -> None:
    """Do in this process, which was forked, what the program does."""
    written = os.O_WRONLY | os.O_CREAT
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], written),
        (2, request["err"], written),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["swarm-node", *request["arguments"]]
    sys.modules["node.cli"].main()


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared by all stays shared
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                become(request)
        print(json.dumps(answer), flush=True)


main()
