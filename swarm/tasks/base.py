"""The contract of a task source, and the hashes by which items are drawn and split.

Everything is a function of (name, digest, seed, index): no source keeps a cursor. Which item is drawn when
is the mixture's affair (`mixture`), where an answer stands in a completion is `answers`'.
"""

import hashlib
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass

from protocol.messages import TaskRef
from swarm.types import Task

__all__ = ["MAX_SOURCE_NAME_BYTES", "SourceSpec", "TaskSource", "heldout_position", "stable_hash"]

MAX_SOURCE_NAME_BYTES = 128  # what a TaskRef allows


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What another process needs to build the same source. `digest` lets it see that it did."""

    kind: str  # "reasoning_gym" or "jsonl"
    target: str  # name of the reasoning-gym task, or path of the file
    config_json: str  # canonical JSON of the settings; empty for a file
    digest: str  # 32 hex digits


class TaskSource(ABC):
    """Questions by (seed, index), each with the verifier of its answers."""

    name: str  # of the wire, e.g. "reasoning_gym/products"
    digest: str  # 32 hex digits: name, settings and version of the generator, or content of the file
    num_items: int | None  # how many items there are in the stream of a seed; None: 2**31, made as they are asked for

    @property
    @abstractmethod
    def spec(self) -> SourceSpec:
        """What another process needs to build the same source."""

    @abstractmethod
    def question(self, seed: int, index: int) -> str:
        """Return the question of an item. Raises InvalidTaskRef if there is no such item."""

    @abstractmethod
    def score(self, seed: int, index: int, answer: str) -> float:
        """Return how right an extracted answer is; 1 or more is fully right. Runs in the sandbox only."""

    def prepare(self, seed: int, index: int) -> None:
        """Make an item ready, so that scoring it later is quick. Changes no result."""
        self.question(seed, index)

    def task(self, seed: int, index: int) -> Task:
        """Return an item with its reference."""
        ref = TaskRef(source=self.name, digest=self.digest, seed=seed, index=index)
        return Task(ref=ref, question=self.question(seed, index))


def stable_hash(*parts: str | int) -> int:
    """Return 64 bits that are a function of the parts alone, on every machine and in every process."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(struct.pack("<I", len(data)))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def heldout_position(question: str) -> float:
    """Return where a question stands in [0, 1); below the held-out fraction it is never trained on.

    A function of the text alone: equal questions of other seeds, sources and nodes fall on the same side.
    """
    return stable_hash("held-out split", question) / 2**64
