"""A reference means the same item in every process, or the source is refused."""

import os
import subprocess
import sys

from swarm.tasks.gym_safety import REPLACED, SAFE

SLOW = {"futoshiki", "intermediate_integration", "puzzle24", "zebra_puzzles"}

FINGERPRINT = """
import sys, zlib
from swarm.tasks.gym import ReasoningGymSource
for name in sys.argv[1:]:
    source = ReasoningGymSource(name, {})
    texts = [source.question(5, index) + repr(source._entry(5, index)["answer"]) for index in (2**31 - 1, 700, 0)]
    print(name, source.digest, *(zlib.crc32(text.encode()) for text in texts))
"""


def start_fingerprints(hash_seed, names):
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", FINGERPRINT, *names], env=environment, stdout=subprocess.PIPE)


def test_items_are_the_same_in_every_process():
    """Sets iterate in another order with another hash seed: a source that shows it cannot be referred to."""
    names = [name for name in sorted(SAFE | set(REPLACED)) if name not in SLOW]
    processes = [start_fingerprints(1, names), start_fingerprints(2, names[::-1])]
    first, second = (process.communicate()[0].decode().splitlines() for process in processes)
    assert len(first) == len(names)
    assert sorted(first) == sorted(second)
