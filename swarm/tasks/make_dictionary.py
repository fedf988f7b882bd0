"""Make the dictionary that frames are compressed with: `python -m swarm.tasks.make_dictionary --out FILE`.

It is trained on questions and answers of every reasoning-gym task that nodes take, written as groups: models take up
the words of a question, and the names of sources and the layout of a group are the same in every frame. The same
versions of reasoning-gym and zstandard make the same bytes. The file that is shipped is part of the protocol: another
one would be another dictionary, with another number.
"""

import argparse
import contextlib
import io
from pathlib import Path

import reasoning_gym
import zstandard

from protocol.codec import digest
from protocol.compression import DICTIONARY_ID
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.wire import encode_group
from swarm.tasks.gym import GYM_PREFIX
from swarm.tasks.gym_safety import REPLACED, SAFE

__all__ = ["main", "make_dictionary"]

DICTIONARY_BYTES = 8 * 2**10  # 32 KiB would save 1 % more, and the protocol's page prints this one
NUM_ITEMS = 20  # of each task
MAX_CHARS = 600  # of each question with its answer
SEED = 77
_MINOR_AT = 2  # where a record says its minor version


def make_dictionary() -> bytes:
    """Return the dictionary."""
    samples: list[bytes | bytearray | memoryview] = []
    for name in sorted(SAFE | REPLACED.keys()):
        with contextlib.redirect_stdout(io.StringIO()):  # some generators print
            items = reasoning_gym.create_dataset(name, seed=SEED, size=NUM_ITEMS)
            texts = [f"{items[index]['question']}\n{items[index]['answer']}"[:MAX_CHARS] for index in range(NUM_ITEMS)]
        for index, text in enumerate(texts):
            ref = TaskRef(GYM_PREFIX + name, digest(text), SEED, index)
            sample = bytearray(encode_group(SharedGroup(ref, (SharedCompletion(text, True),))))
            sample[_MINOR_AT] = 0  # the dictionary stays that of version 1.0
            samples.append(bytes(sample))
    trained = zstandard.train_dictionary(DICTIONARY_BYTES, samples, k=60, d=6, level=12, dict_id=DICTIONARY_ID)
    return trained.as_bytes()


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="make the dictionary of the protocol's frames")
    parser.add_argument("--out", type=Path, required=True)
    parser.parse_args().out.write_bytes(make_dictionary())


if __name__ == "__main__":
    main()
