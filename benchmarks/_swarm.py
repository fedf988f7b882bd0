"""A swarm in one process over the memory transport, in virtual time: what `scale.py` and the tests simulate.

Nodes are whole members with real keys, signatures and frames. In place of a model there is a writer of groups whose
texts have the sizes and the redundancy of reasoning text, and a verifier that reads a reward out of the text.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.about import NodeAbout
from protocol.config import SwarmConfig
from protocol.identity import Identity
from protocol.member import ExternalGroup, Member, Rescored
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.shards import record_validator
from protocol.transport.base import RecordValidator
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport
from protocol.transport.virtual_time import virtual_clock

__all__ = ["Node", "Swarm", "identity_of", "write_group"]

_SYLLABLES = (
    "ba",
    "con",
    "di",
    "er",
    "fac",
    "gen",
    "in",
    "ka",
    "lo",
    "mul",
    "num",
    "or",
    "pro",
    "qua",
    "re",
    "sum",
    "ti",
)
_WORDS = tuple(a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in ("", "s", "ed", "ing"))


def identity_of(seed: int) -> Identity:
    """Return the same key pair for the same seed."""
    return Identity(Ed25519PrivateKey.from_private_bytes(random.Random(f"identity {seed}").randbytes(32)))


def write_text(rng: random.Random, num_chars: int) -> str:
    """Return text of this length that zstd makes half as long, as it does with what small models write."""
    words = rng.choices(_WORDS, k=num_chars // 5)
    for position in range(0, len(words), 4):
        words[position] += f" {rng.choice('+-*/=')} {rng.getrandbits(10)}"
    return " ".join(words)[:num_chars].ljust(num_chars, ".")


def write_group(
    rng: random.Random, *, num_completions: int = 8, num_chars: int = 600, source: str = "reasoning_gym/products"
) -> SharedGroup:
    """Return a group in which some completions are right: they end in "#1", others in "#0"."""
    right = rng.randrange(1, num_completions) if num_completions > 1 else 0
    completions = tuple(
        SharedCompletion(f"{write_text(rng, num_chars - 2)}#{int(index < right)}", True)
        for index in range(num_completions)
    )
    return SharedGroup(TaskRef(source, "0123456789abcdef" * 2, rng.getrandbits(63), rng.getrandbits(32)), completions)


async def read_rewards(group: SharedGroup) -> Rescored:
    """Score a group as `write_group` means it."""
    if not group.task.source.startswith("reasoning_gym/"):
        return Rescored("unknown_task")
    rewards = tuple(float(completion.text.endswith("#1")) for completion in group.completions)
    return Rescored("scored", rewards, len(set(rewards)) > 1)


@dataclass
class Node:
    """One member with what it runs on."""

    member: Member
    transport: MemoryTransport
    rng: random.Random
    used: list[ExternalGroup] = field(default_factory=list)
    watcher: "asyncio.Task[None] | None" = None

    @property
    def id(self) -> str:
        """Its node id."""
        return self.member.node_id

    @property
    def address(self) -> str:
        """Where it can be joined."""
        return self.transport.addresses[0]

    def status(self) -> dict[str, Any]:
        """What it shows."""
        return self.member.status()


class Swarm:
    """Nodes on one network. To be used inside `virtual_time.run`."""

    transport_class = MemoryTransport

    def __init__(self, seed: int = 0, faults: Faults | None = None) -> None:
        self.rng = random.Random(f"swarm {seed}")
        self.network = MemoryNetwork(random.Random(f"network {seed}"), faults, virtual_clock())
        self.nodes: list[Node] = []
        self.failures: list[BaseException] = []
        self._validators: dict[str, RecordValidator] = {}  # shared: a DHT record that one node has verified, all have
        self._seed, self._num_made = seed, 0

    async def add(
        self,
        config: SwarmConfig | None = None,
        *,
        identity: Identity | None = None,
        peers: tuple[str, ...] | None = None,
        rescore: Callable[[SharedGroup], Any] | None = read_rewards,
        state_path: Path | None = None,
        clock_offset_s: float = 0.0,
        **settings: Any,
    ) -> Node:
        """Start a node; by default it joins through one random node that is there."""
        self._num_made += 1
        number = self._seed * 1_000_003 + self._num_made
        if peers is None:
            peers = (self.rng.choice(self.nodes).address,) if self.nodes else ()
        config = config or SwarmConfig(peers=peers, **settings)
        identity, rng = identity or identity_of(number), random.Random(f"node {number}")
        transport = self.transport_class(self.network, identity.node_id, self._validator(config.swarm_id))
        role = "trainer" if rescore else "bootstrap"
        member = Member(
            identity,
            transport,
            config,
            rescore=rescore,
            about=lambda: NodeAbout(role, "swarm-node/0.1.0", "tiny", ("reasoning_gym/products",)),  # type: ignore[arg-type]
            state_path=state_path,
            clock=virtual_clock(clock_offset_s),
            rng=rng,
        )
        await member.start()
        node = Node(member, transport, rng)
        node.watcher = asyncio.create_task(self._watch(node))
        self.nodes.append(node)
        return node

    def _validator(self, swarm_id: str) -> RecordValidator:
        if swarm_id not in self._validators:
            self._validators[swarm_id] = record_validator(swarm_id)
        return self._validators[swarm_id]

    async def remove(self, node: Node, *, kill: bool = False) -> None:
        """Close a node; `kill` lets its transport die first, so that it says and saves nothing."""
        if kill:
            self.network.kill(node.id)
        self.nodes.remove(node)
        if node.watcher is not None:
            node.watcher.cancel()
        await node.member.close()

    async def close(self) -> None:
        """Close every node, and raise what any of them died of."""
        for node in list(self.nodes):
            await self.remove(node)
        self.check()

    def check(self) -> None:
        """Raise what any node has died of."""
        if self.failures:
            raise self.failures[0]

    async def _watch(self, node: Node) -> None:
        try:
            await node.member.wait_failed()
        except Exception as error:  # a node's death is the test's to see
            self.failures.append(error)
