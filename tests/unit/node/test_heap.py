"""That freed memory goes back to the system, in a process whose heap is its own."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import os, resource, sys
from node.heap import give_back, limit_arenas

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

limit_arenas()
kept = [bytes(2000) for _ in range(50_000)]
del kept[:-1]  # the last one holds the top of the heap, so that nothing shrinks by itself
before = resident_mib()
give_back()
print(before - resident_mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_what_is_freed_is_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 60
