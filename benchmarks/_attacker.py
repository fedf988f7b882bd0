"""A peer of a simulated swarm that speaks the protocol, and says in it what it likes. For tests."""

import random
from collections.abc import Sequence
from typing import Any

from _swarm import Swarm, identity_of

from protocol.about import NodeAbout
from protocol.digests import leaf_of
from protocol.identity import Identity
from protocol.messages import Announcement
from protocol.own_record import sign_own_record
from protocol.requests import (
    AnnounceRequest,
    Hello,
    Offer,
    PeersResponse,
    PullResponse,
    decode_hello,
    decode_pull_request,
    encode_announce_request,
    encode_hello,
    encode_peers_response,
    encode_pull_response,
)
from protocol.signing import sign_announcement
from protocol.transport.base import RequestRefused
from protocol.transport.memory import MemoryTransport
from protocol.transport.virtual_time import virtual_clock

__all__ = ["ABOUT", "Attacker", "attack"]

ABOUT = NodeAbout("trainer", "swarm-node/0.1.0", "tiny", ())


class Attacker:
    """A peer that speaks the protocol, and says in it what it likes."""

    def __init__(self, swarm: Swarm, identity: Identity, swarm_id: str = "main") -> None:
        self.identity, self.swarm_id, self.swarm = identity, swarm_id, swarm
        self.clock = virtual_clock()
        self.transport = MemoryTransport(swarm.network, identity.node_id, lambda *record: True)
        self.batches: dict[bytes, list[bytes]] = {}  # frames that it gives, by root
        self.records: list[bytes] = []  # that it tells of
        self.num_pulled = 0
        self._sequence = 0
        for name, handler in (
            ("hello", self._hello), ("pull", self._pull), ("announce", self._nothing), ("repair", self._nothing),
            ("peers", self._peers),
        ):  # fmt: skip
            self.transport.handle(name, handler, max_request_bytes=2**20)

    def record(self, swarm_id: str | None = None) -> Any:
        now_ms = int(self.clock() * 1000)
        return sign_own_record(self.identity, self.transport, swarm_id or self.swarm_id, ABOUT, now_ms)

    async def link(self, victim: str) -> bool:
        hello = Hello(self.swarm_id, int(self.clock() * 1000), True, self.record())
        answer = await self.transport.request(
            victim, "hello", encode_hello(hello), max_response_bytes=4096, timeout_s=5
        )
        return decode_hello(answer).link

    async def announce(self, victim: str, encoded: Sequence[bytes]) -> None:
        request = encode_announce_request(AnnounceRequest(tuple(Offer(one, 2**64 - 1) for one in encoded)))
        await self.transport.request(victim, "announce", request, max_response_bytes=4096, timeout_s=5)

    def make(self, frames: list[bytes], *, age_s: float = 0.0, swarm_id: str = "main") -> Announcement:
        self._sequence += 1
        made = sign_announcement(
            self.identity, swarm_id, sequence=int(self.clock() * 1000) + self._sequence,
            created_at_ms=int((self.clock() - age_s) * 1000), frames=frames,
        )  # fmt: skip
        self.batches[made.root] = frames
        return made

    async def _hello(self, asker: str, payload: bytes) -> bytes:
        return encode_hello(Hello(self.swarm_id, int(self.clock() * 1000), True, self.record()))

    async def _pull(self, asker: str, payload: bytes) -> bytes:
        request = decode_pull_request(payload)
        frames = self.batches.get(request.root)
        if frames is None:
            raise RequestRefused("not_held")
        self.num_pulled += len(request.numbers)
        leaves = tuple(leaf_of(frame) for frame in frames)
        return encode_pull_response(PullResponse(leaves, {number: frames[number] for number in request.numbers}))

    async def _peers(self, asker: str, payload: bytes) -> bytes:
        return encode_peers_response(
            PeersResponse(tuple(random.Random(0).sample(self.records, min(8, len(self.records)))))
        )

    async def _nothing(self, asker: str, payload: bytes) -> bytes:
        raise RequestRefused("busy")


async def attack(swarm: Swarm, seed: int = 10_000, swarm_id: str = "main") -> Attacker:
    attacker = Attacker(swarm, identity_of(seed), swarm_id)
    await attacker.transport.start()
    return attacker
