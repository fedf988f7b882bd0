"""A bridge between two networks of honest nodes, and hostile peers that flood it from one of them. For tests.

Everything is real but learning: `swarm-node bridge` runs as users run it, every honest node is a whole member in a
process of its own, and hostile peers speak to their transport as they like. Honest groups teach something by the
verifier of these nodes, junk is well formed and does not.

    flood     announcements of junk, most by an author who is never heard of again; many bodies are never given
    replay    what others have announced, again and again
    forge     what others have announced, with another signature
    oversize  requests and messages beyond every limit
    pull      on the other side: whatever the bridge has heard of, as often as it answers
"""

import asyncio
import contextlib
import multiprocessing as mp
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from _nodes import BenchmarkNode, BenchmarkNodes, local_transport
from _swarm import read_rewards, write_group
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.about import NodeAbout
from protocol.announcements import LiveBatch
from protocol.bloom import repair_request
from protocol.clock import system_clock
from protocol.config import SwarmConfig
from protocol.digests import leaf_of
from protocol.errors import ProtocolError
from protocol.identity import Identity
from protocol.member import Rescored
from protocol.messages import Announcement, SharedCompletion, SharedGroup, TaskRef
from protocol.own_record import sign_own_record
from protocol.requests import (
    AnnounceRequest,
    AnnounceResponse,
    Broadcast,
    Hello,
    Offer,
    PullRequest,
    PullResponse,
    decode_announce_request,
    decode_broadcast,
    decode_hello,
    decode_pull_request,
    decode_repair_response,
    encode_announce_request,
    encode_announce_response,
    encode_broadcast,
    encode_hello,
    encode_pull_request,
    encode_pull_response,
    encode_repair_request,
)
from protocol.signing import sign_announcement
from protocol.transport.base import Judgement, RequestRefused, TransportError
from protocol.wire import decode_announcement, encode_frame

__all__ = ["CrossingNode", "Floods", "FurtherNode", "HonestNodes"]

ABOUT = NodeAbout("trainer", "swarm-node/0.1.0", "tiny", ())
START_WITHIN_S = 60.0
MAX_REMEMBERED = 256  # announcements and bodies of a hostile peer
NEVER_GIVEN = 0.3  # of the bodies of junk


class CrossingNode(BenchmarkNode):
    """An honest node, which says what it has heard and what it could learn from."""

    first_rank = 0

    def __init__(self, rank: int, config: SwarmConfig, host: str, transport: str) -> None:
        super().__init__(self.first_rank + rank, config, host, transport)
        self._heard: dict[bytes, tuple[str, float]] = {}  # by root: author, and when
        self._publishing: asyncio.Task[None] | None = None
        self._published: dict[int, float] = {}
        listen, gossip = self.member.gossip.on_offer, self.member.gossip

        def note(batch: LiveBatch, teller: str, held: int) -> None:
            self._heard.setdefault(batch.root, (batch.author, time.time()))
            listen(batch, teller, held)

        gossip.on_offer = note

    async def _rescore(self, group: SharedGroup) -> Rescored:
        rescored = await read_rewards(group)
        if rescored.informative:
            self.admitted[group.task.seed, group.task.index] = time.time()
        return rescored

    async def publish_from_now_on(self, every_s: float) -> None:
        """Publish a batch of two groups every so often, until the end."""
        self._publishing = asyncio.create_task(self._publish(every_s))

    async def _publish(self, every_s: float) -> None:
        rng, number = random.Random(self.rank), 0
        while True:
            groups = []
            for _ in range(2):
                ref = TaskRef("reasoning_gym/products", "0123456789abcdef" * 2, self.rank, number)
                groups.append(replace(write_group(rng, num_completions=4, num_chars=200), task=ref))
                self._published[number] = time.time()
                number += 1
            await self.member.publish(groups)
            self.member.sample(1000)  # as a node that trains on all that it gets
            await asyncio.sleep(every_s * rng.uniform(0.5, 1.5))

    async def seen(self, since_s: float) -> dict[str, Any]:
        """Return what was published, heard and admitted; what was heard, since then."""
        status = self.member.status()
        return {
            "node_id": self.member.node_id,
            "rank": self.rank,
            "published": dict(self._published),
            "admitted": dict(self.admitted),
            "heard": [author for author, at_s in self._heard.values() if at_s >= since_s],
            "refusals": status["refusals"],
            "num_peers": status["num_peers"],
        }


class FurtherNode(CrossingNode):
    """One of the second network."""

    first_rank = 100


class HonestNodes(BenchmarkNodes):
    """The honest nodes of one network; each wants all that it can get."""

    def __init__(self, node_class: type[CrossingNode], transport: str, num: int, **settings: Any) -> None:
        wants = {"reserve_groups": 40, "max_author_share": 1.0}
        super().__init__(num, lambda rank: wants | settings, node_class=node_class, transport=transport, num_at_once=2)

    @property
    def address(self) -> str:
        """Where the first of them is."""
        return self._peers[0]


class Hostile:
    """One hostile peer, on one transport, with links to its victims."""

    def __init__(self, transport: str) -> None:
        self.identity = Identity(Ed25519PrivateKey.generate())
        self.transport = local_transport(transport, self.identity, "main", "127.0.0.1")
        self.rng = random.Random()
        self.counts = Counter[str]()
        self.victims: list[str] = []
        self._known: dict[bytes, bytes] = {}  # announcements of others, by root
        self._bodies: dict[bytes, bytes] = {}  # of its junk: one frame each
        self._sequence = int(time.time() * 1000)
        handlers = {"hello": self._hello, "pull": self._pull, "announce": self._announced, "repair": self._refuse,
                    "peers": self._refuse}  # fmt: skip
        for name, handler in handlers.items():
            self.transport.handle(name, handler, max_request_bytes=2**20)
        self.transport.hear(self._judge)

    async def link(self, addresses: Sequence[str]) -> None:
        """Become a neighbour of each."""
        for address in addresses:
            victim = await self.transport.connect(address, timeout_s=20)
            answer = await self._ask(victim, "hello", encode_hello(self._own_hello()))
            if answer is None or not decode_hello(answer).link:
                self.counts["links refused"] += 1
            self.victims.append(victim)

    def _own_hello(self) -> Hello:
        now_ms = int(system_clock() * 1000)
        return Hello("main", now_ms, True, sign_own_record(self.identity, self.transport, "main", ABOUT, now_ms))

    async def _hello(self, asker: str, payload: bytes) -> bytes:
        return encode_hello(self._own_hello())

    async def _refuse(self, asker: str, payload: bytes) -> bytes:
        raise RequestRefused("busy")

    async def _pull(self, asker: str, payload: bytes) -> bytes:
        frame = self._bodies.get(decode_pull_request(payload).root)
        if frame is None or self.rng.random() < NEVER_GIVEN:
            self.counts["bodies never given"] += 1
            await asyncio.sleep(3600)
            raise RequestRefused("busy")
        self.counts["bodies given"] += 1
        return encode_pull_response(PullResponse((leaf_of(frame),), {0: frame}))

    async def _announced(self, asker: str, payload: bytes) -> bytes:
        for offer in decode_announce_request(payload).offers:
            self._note(offer.encoded)
        return encode_announce_response(AnnounceResponse(0))

    def _judge(self, teller: str, message: bytes) -> Judgement:
        with contextlib.suppress(ProtocolError):
            self._note(decode_broadcast(message).encoded)
        return Judgement.IGNORE  # it passes nothing on

    def _note(self, encoded: bytes) -> None:
        self._known[decode_announcement(encoded).root] = encoded
        if len(self._known) > MAX_REMEMBERED:
            del self._known[next(iter(self._known))]

    def _junk(self) -> Announcement:
        """A batch of one well-formed group that teaches nothing, most by an author of its own."""
        self._sequence += 1
        made = write_group(self.rng, num_completions=2, num_chars=60)
        frame = encode_frame(replace(made, completions=tuple(SharedCompletion(c.text[:-1] + "0", True) for c in made.completions)))  # noqa: E501  # fmt: skip
        author = self.identity if self.rng.random() < 0.2 else Identity(Ed25519PrivateKey.generate())
        announcement = sign_announcement(
            author, "main", sequence=self._sequence, created_at_ms=int(time.time() * 1000), frames=[frame]
        )
        self._bodies[announcement.root] = frame
        if len(self._bodies) > 16 * MAX_REMEMBERED:
            del self._bodies[next(iter(self._bodies))]
        return announcement

    async def _tell(self, encoded: list[bytes]) -> None:
        """Tell everybody, by whatever the transport has for it."""
        if self.transport.broadcasts:
            for one in encoded:
                await self.transport.broadcast(encode_broadcast(Broadcast(one, self.identity.node_id)))
            return
        request = encode_announce_request(AnnounceRequest(tuple(Offer(one, 2**64 - 1) for one in encoded)))
        await asyncio.gather(*(self._ask(victim, "announce", request) for victim in self.victims))

    async def _ask(self, victim: str, name: str, payload: bytes, max_bytes: int = 2**20) -> bytes | None:
        try:
            return await self.transport.request(victim, name, payload, max_response_bytes=max_bytes, timeout_s=10)
        except TransportError as error:
            self.counts[f"{name}: {error.code if isinstance(error, RequestRefused) else error.reason}"] += 1
            return None

    # attacks, once each

    async def flood(self) -> None:
        """Announce two batches of junk."""
        self.counts["junk"] += 2
        await self._tell([self._junk().encoded for _ in range(2)])

    async def replay(self) -> None:
        """Announce what others have."""
        known = self.rng.sample(list(self._known.values()), min(16, len(self._known)))
        self.counts["replays"] += len(known)
        await self._tell(known)

    async def forge(self) -> None:
        """Announce in the name of others."""
        for encoded in self.rng.sample(list(self._known.values()), min(2, len(self._known))):
            self.counts["forged"] += 1
            await self._tell([self.rng.randbytes(64) + encoded[64:]])

    async def oversize(self) -> None:
        """Ask with 4 MiB, and announce more than fits."""
        name = self.rng.choice(("announce", "pull", "repair", "peers", "hello"))
        self.counts["oversize"] += 1
        await asyncio.gather(*(self._ask(victim, name, bytes(4 * 2**20 - 64)) for victim in self.victims))
        large = self._junk().encoded + bytes(2000)
        if self.transport.broadcasts:  # past what the node's own transport would say of it
            session = self.transport._session
            if session is not None:  # None while its own host is replaced
                await self.transport._host_of(session).broadcast(large)
        else:
            await self._tell([large])

    async def pull(self) -> None:
        """Ask for whatever the bridge has heard of."""
        [bridge] = self.victims
        answer = await self._ask(bridge, "repair", encode_repair_request(repair_request(bytes(8), [], 128)))
        for offer in decode_repair_response(answer).offers if answer is not None else ():
            self._note(offer.encoded)
        roots = self.rng.sample(list(self._known), min(24, len(self._known)))
        self.counts["pulls"] += len(roots)
        asking = [self._ask(bridge, "pull", encode_pull_request(PullRequest(root, (0,)))) for root in roots]
        self.counts["bodies pulled"] += sum(answer is not None for answer in await asyncio.gather(*asking))


class _HostileProcess:
    """Some hostile peers of one network in one process, told what to do over a pipe."""

    def __init__(self, transport: str) -> None:
        self._transport = transport
        self._peers: list[Hostile] = []
        self._attacking: list[asyncio.Task[None]] = []

    async def join(self, kinds: list[str], addresses: list[str]) -> None:
        for _ in kinds:
            peer = Hostile(self._transport)
            await peer.transport.start()
            self._peers.append(peer)
            await peer.link(addresses)

    async def attack(self, kinds: list[str], every_s: float) -> None:
        for peer, kind in zip(self._peers, kinds, strict=True):
            self._attacking.append(asyncio.create_task(self._repeat(getattr(peer, kind), every_s)))

    async def _repeat(self, attack: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            with contextlib.suppress(TransportError):
                await attack()
            await asyncio.sleep(every_s * random.uniform(0.5, 1.5))

    async def counts(self) -> Counter[str]:
        for task in self._attacking:
            if task.done():
                task.result()  # a bug of the attack's: it must not look like peace
        return sum((peer.counts for peer in self._peers), Counter())

    async def close(self) -> None:
        for task in self._attacking:
            task.cancel()
        for peer in self._peers:
            await peer.transport.close()


async def _serve(pipe: Connection, transport: str) -> None:
    process = _HostileProcess(transport)
    try:
        while True:
            name, arguments = await asyncio.to_thread(pipe.recv)
            if name == "close":
                break
            pipe.send(await getattr(process, name)(**arguments))
    finally:
        await process.close()


def _run(pipe: Connection, transport: str) -> None:
    asyncio.run(_serve(pipe, transport))


class Floods:
    """Hostile peers of one network, as their parent sees them. `kinds` names the attack of each."""

    def __init__(self, transport: str, kinds: list[str], addresses: list[str]) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, transport), daemon=True)
        self._process.start()
        theirs.close()
        self._kinds = kinds
        self._do("join", kinds=kinds, addresses=addresses)

    def attack(self, every_s: float) -> None:
        """Begin: each peer does its worst every so often."""
        self._do("attack", kinds=self._kinds, every_s=every_s)

    def counts(self) -> Counter[str]:
        """Return what they have done, and what was refused."""
        found: Counter[str] = self._do("counts")
        return found

    def __exit__(self, *_: object) -> None:
        """End them."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: whoever asked it last has said so
            self._pipe.send(("close", {}))
        self._process.join(15)
        if self._process.is_alive():
            self._process.kill()

    def _do(self, name: str, **arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return BenchmarkNodes.answer(self._pipe, START_WITHIN_S)
