"""Runs one unit of an experiment: every node of one arm and one seed, in one process and in virtual time.

Each node is a whole one, the loop of `node.daemon` with the exchange of `swarm-node join` over a network in memory.
What differs from a process of its own: nodes share what does not change (`node.experiment.shared`), work is done
in the loop's thread, in which virtual time stands still, and a round begins when its time has come
(`node.experiment.pacing`). So a unit is a function of its settings: run twice on one machine it is the same to the
last bit.
"""

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node.config import RunConfig
from node.daemon import Node
from node.experiment.inline import InlineExecutor, RoundCount, RoundDisplay
from node.experiment.pacing import PacedExchange
from node.experiment.shared import SharedParts
from node.experiment.units import Unit
from node.membership import about_trainer, member_settings
from node.parts import Parts
from node.rescoring import Rescorer, build_rescorer
from node.swarm_exchange import SwarmExchange
from protocol.about import NodeAbout
from protocol.admission import Rescore
from protocol.identity import Identity
from protocol.member import Member
from protocol.shards import record_validator
from protocol.transport import virtual_time
from protocol.transport.base import RecordValidator
from protocol.transport.memory import Faults, MemoryNetwork, MemoryTransport
from protocol.transport.peer_id import peer_id_of

__all__ = ["UnitRun", "simulate"]

_WATCHES_APART: Final = 0.25  # of a round: looking takes time, and nothing happens in between
OnRound = Callable[[int, Mapping[str, Any]], None]
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class UnitRun:
    """What a unit left behind: the rows of metrics of each node. Processor time includes the scoring processes."""

    nodes: list[Rows]
    wall_s: float
    cpu_s: float


def simulate(unit: Unit, on_round: OnRound = lambda number, row: None) -> UnitRun:
    """Run a unit to its end. `on_round` is given the number of a node, from 0, and each row that it finishes."""
    wall_s, cpu_s = time.perf_counter(), sum(os.times()[:4])
    with SharedParts() as shared:
        nodes = virtual_time.run(_run_all(unit, shared, on_round))
    return UnitRun(nodes, time.perf_counter() - wall_s, sum(os.times()[:4]) - cpu_s)


async def _run_all(unit: Unit, shared: SharedParts, on_round: OnRound) -> list[Rows]:
    network = _Network(unit)
    nodes = [_SimulatedNode(unit, number, network, shared, on_round) for number in range(len(unit.configs))]
    tasks = [asyncio.create_task(node.run()) for node in nodes]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class _Network:
    """The network of a unit. What one node has verified of a record, all have: it is the same bytes."""

    def __init__(self, unit: Unit) -> None:
        self.network = MemoryNetwork(
            random.Random(f"network {unit.seed}"),
            Faults(latency_s=unit.latency_s),
            virtual_time.virtual_clock(),
        )
        self._identities = [_identity(unit.seed, number) for number in range(len(unit.configs))]
        self._validators: dict[str, RecordValidator] = {}

    def identity(self, number: int) -> Identity:
        """Return a node's key pair."""
        return self._identities[number]

    @property
    def first_address(self) -> str:
        """Where the first node is: all others join through it."""
        return f"/memory/p2p/{peer_id_of(self._identities[0].node_id)}"

    def transport(self, number: int, swarm_id: str) -> MemoryTransport:
        """Make a node's transport."""
        if swarm_id not in self._validators:
            self._validators[swarm_id] = record_validator(swarm_id)
        return MemoryTransport(self.network, self._identities[number].node_id, self._validators[swarm_id])


class _SimulatedNode:
    """One node, and what it is given in the place of threads, disk and wire."""

    def __init__(self, unit: Unit, number: int, network: _Network, shared: SharedParts, on_round: OnRound) -> None:
        self._unit, self._number, self._network, self._shared, self._on_round = unit, number, network, shared, on_round
        self._config: RunConfig = unit.configs[number]
        self._rows: list[dict[str, Any]] = []
        self._work, self._rescoring = InlineExecutor(), InlineExecutor()
        self._exchange = SwarmExchange(
            self._make_member,
            self._make_rescorer,
            self._config.sapo,
            about_trainer(self._config),
            note=lambda text: None,
            on_started=lambda member: None,
            watch_interval_s=unit.round_s * _WATCHES_APART,
        )

    async def run(self) -> Rows:
        """Run the node to its end."""
        paced = PacedExchange(
            self._exchange, round_s=self._unit.round_s, jitter=self._unit.jitter, rng=self._rng("pace")
        )
        node = Node(
            self._config,
            build_parts=self._shared.build,
            recorder=RoundCount(),
            exchange=paced,
            display=RoundDisplay(self._finished),
            executor=self._work,
        )
        await node.run()
        return self._rows

    def _finished(self, row: Mapping[str, Any]) -> None:
        """Keep a row, with the time that the node has taken so far: its own work, and scoring what others wrote."""
        cpu_s, wall_s = (getattr(self._work, name) + getattr(self._rescoring, name) for name in ("cpu_s", "wall_s"))
        self._rows.append({**row, "cpu_so_far_s": cpu_s, "wall_so_far_s": wall_s})
        self._on_round(self._number, row)

    async def _make_member(self, rescore: Rescore, about: Callable[[], NodeAbout]) -> Member:
        settings = member_settings(self._config)
        peers = (self._network.first_address,) if self._number else ()
        return Member(
            self._network.identity(self._number),
            self._network.transport(self._number, settings.swarm_id),
            settings.model_copy(update={"peers": peers}),
            rescore=rescore,
            about=about,
            state_path=None,
            clock=virtual_time.virtual_clock(),
            rng=self._rng("member"),
        )

    def _make_rescorer(self, parts: Parts) -> Rescorer:
        return build_rescorer(
            self._config,
            parts.policy,
            build=lambda: (
                self._shared.encodings(self._config),
                self._shared.tasks(self._config),
                self._shared.scorer(self._config),
            ),
            executor=self._rescoring,
        )

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{purpose} {self._unit.seed} {self._number}")


def _identity(seed: int, number: int) -> Identity:
    key = random.Random(f"identity {seed} {number}").randbytes(32)
    return Identity(Ed25519PrivateKey.from_private_bytes(key))
