"""The network of one simulation: who is in it, what befalls messages, who holds a record of the DHT.

Of a node it knows no more than `memory.MemoryTransport` shows. Everything is a function of the seed and of the order
of calls. Faults, partitions and deaths may change at any time.
"""

import hashlib
import random
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.clock import Clock, system_clock
from protocol.transport.base import TransportDown

if TYPE_CHECKING:
    from protocol.transport.memory import MemoryTransport

__all__ = ["NUM_REPLICAS", "Faults", "MemoryNetwork"]

NUM_REPLICAS = 8  # nodes that hold one record


@dataclass(frozen=True, slots=True)
class Faults:
    """What the network does to every message. A request and its response are two messages."""

    latency_s: tuple[float, float] = (0.01, 0.05)  # uniform, each message anew, so that messages overtake
    bandwidth_bytes_per_s: float | None = None  # of a node's uplink, which its messages share one after the other
    loss: float = 0.0  # probability that a message vanishes
    duplication: float = 0.0  # probability that a request arrives twice
    corruption: float = 0.0  # probability that one byte of the payload changes
    reordering: float = 0.0  # probability that a message waits for another `reordering_s`
    reordering_s: float = 1.0


class MemoryNetwork:
    """The network of one simulation."""

    def __init__(self, rng: random.Random, faults: Faults | None = None, clock: Clock = system_clock) -> None:
        self.rng, self.clock = rng, clock
        self.faults = faults or Faults()  # may be replaced at any time
        self._nodes: dict[str, MemoryTransport] = {}  # by node id, from `start` to `close`
        self._ring: list[tuple[bytes, str]] = []  # (hash, node id) of the same, sorted
        self._dead: set[str] = set()
        self._sides: dict[str, int] = {}  # by node id while there is a partition; others are on side 0

    def partition(self, *sides: Iterable[str]) -> None:
        """Let messages pass only within a side, from now on; nodes that are not named are with the first."""
        self._sides = {node_id: number for number, side in enumerate(sides) for node_id in side}

    def heal(self) -> None:
        """End the partition."""
        self._sides = {}

    def kill(self, node_id: str) -> None:
        """Take a node's transport down: its requests raise TransportDown, requests to it PeerUnreachable."""
        self._dead.add(node_id)
        node = self._nodes.get(node_id)
        if node is not None:
            node.go_down(TransportDown("the node's transport was killed"))

    def revive(self, node_id: str) -> None:
        """Bring it back: counted as a restart. Records that others had stored with it are gone."""
        self._dead.discard(node_id)
        node = self._nodes.get(node_id)
        if node is not None:
            node.come_back()

    def reaches(self, source: str, target: str) -> bool:
        """Whether a message from one node to another could arrive just now."""
        alive = target in self._nodes and target not in self._dead and source not in self._dead
        return alive and not self.parted(source, target)

    def live(self, node_id: str) -> "MemoryTransport | None":
        """Return a node that takes messages, whoever sends them."""
        return None if node_id in self._dead else self._nodes.get(node_id)

    def is_dead(self, node_id: str) -> bool:
        """Whether a node was killed, and not revived."""
        return node_id in self._dead

    def parted(self, source: str, target: str) -> bool:
        """Whether a partition lies between two nodes."""
        return bool(self._sides) and self._sides.get(source, 0) != self._sides.get(target, 0)

    def join(self, node: "MemoryTransport") -> None:
        """Let a node in. Raises ValueError where one of its id is there."""
        if node.node_id in self._nodes:
            raise ValueError(f"{node.node_id} is in this network already: close its transport first")
        self._nodes[node.node_id] = node
        insort(self._ring, (_place(node.node_id.encode()), node.node_id))

    def leave(self, node: "MemoryTransport") -> None:
        """Let a node go."""
        del self._nodes[node.node_id]
        del self._ring[bisect_left(self._ring, (_place(node.node_id.encode()), node.node_id))]

    def delay_s(self) -> float:
        """Return how long the next message takes."""
        faults, rng = self.faults, self.rng
        low, high = faults.latency_s
        delay_s = low + (high - low) * rng.random()
        if faults.reordering and rng.random() < faults.reordering:
            delay_s += faults.reordering_s
        return delay_s

    def replicas(self, asker: str, key: bytes) -> "list[MemoryTransport]":
        """Return the nodes that hold a key, as far as the asker reaches them."""
        found: list[MemoryTransport] = []
        start, num_nodes = bisect_left(self._ring, (_place(key), "")), len(self._ring)
        for step in range(num_nodes):
            node_id = self._ring[(start + step) % num_nodes][1]
            if self.reaches(asker, node_id):
                found.append(self._nodes[node_id])
                if len(found) == NUM_REPLICAS:
                    break
        return found


def _place(name: bytes) -> bytes:
    """Where on the ring something stands."""
    return hashlib.sha256(name).digest()[:16]
