"""The peers that this node talks to: those it has chosen (out), and those that have chosen it (in).

    hello      both sides show swarm, version, clock and a signed record; a link is asked for, and given while
               there is room
    keep       chosen neighbours are pinged after a silence, lost and banned ones are dropped, missing ones are
               replaced from the directory, and one is exchanged now and then, or when most come from one root
    return     lost neighbours are tried again for a while, whether they are missing or not: that is what mends a
               partition of the network, on both sides of which everybody has found enough neighbours
    join       while there is no neighbour at all: every given and remembered address, again and again
    nearby     what the transport finds on the local network is tried at once

Whom to try is `directory`'s to say. What neighbours are told is `gossip`'s.
"""

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from protocol.clocks import ClockOffsets
from protocol.directory import GIVEN, NEARBY, Directory
from protocol.greeting import check_hello
from protocol.limits import MAX_HELLO_BYTES
from protocol.local import Local
from protocol.messages import NodeRecord
from protocol.quota import Quota, Quotas
from protocol.refusals import Reason, Refusal
from protocol.requests import Hello, decode_hello, encode_hello
from protocol.transport.base import PeerUnreachable, RequestRefused, TransportError

__all__ = ["Neighbour", "Neighbours"]

TICK_S = 1.0  # while links are missing
CALM_TICK_S = 5.0
MAX_BACKOFF_S = 30.0
MAX_FAILURES = 2  # requests in a row without an answer, after which a neighbour is lost
FULL_RETRY_S = 120.0  # until a node that had no place is asked again
GREET_AGAIN_S = 600.0  # so that neighbours have a fresh record to tell of
BALANCE_S = 20.0  # how often it is looked whether one root has named too many of the chosen
MAX_LOST = 8  # neighbours that are tried again, those lost last
LOST_RETRY_S = 10.0
LOST_FOR_S = 900.0
MAX_NEARBY = 64
NEARBY_RETRY_S = 10.0  # until addresses nearby that did not answer are tried again
_NUM_DIALS = 3  # at one time


@dataclass(slots=True)
class Neighbour:
    """One linked peer."""

    node_id: str
    direction: Literal["in", "out"]
    record: NodeRecord
    source: str  # where this node had heard of it
    since_s: float  # unix seconds
    heard_at_s: float  # when it asked or answered last
    greeted_at_s: float
    rtt_ms: float | None = None
    num_failures: int = 0  # in a row
    quiet_until_s: float = 0.0  # it needs no relays before
    outbox: dict[bytes, None] = field(default_factory=dict)  # roots that it is to be told of
    sending: bool = False


class Neighbours:
    """The links of one node."""

    def __init__(
        self, local: Local, directory: Directory, clocks: ClockOffsets, own_record: Callable[[], NodeRecord]
    ) -> None:
        self._local, self._directory, self._clocks, self._own_record = local, directory, clocks, own_record
        self._links: dict[str, Neighbour] = {}
        self._hellos = Quota(local.config.max_hellos_per_s, local.config.max_hellos_per_s * 20, local.clock())
        self._hellos_by_peer = Quotas(0.2, 5, 1024)
        self._dialling: set[str] = set()
        self._lost: dict[str, tuple[NodeRecord, float]] = {}  # node id -> (its record, when it was lost)
        self._retry_lost_at_s = self._balance_at_s = 0.0
        self._greeted: set[str] = set()  # peers whose answer to a hello is under way
        self._wake = asyncio.Event()
        self._backoff_s, self._next_join_s, self._rotate_at_s = TICK_S, 0.0, 0.0
        self._next_nearby_s = 0.0
        self.given: dict[str, str] = {}  # address that a person typed -> what came of it last
        self._nearby: dict[str, None] = {}  # addresses that the transport has found, not linked yet; the oldest first
        self.on_link: list[Callable[[Neighbour], None]] = []
        local.transport.on_found = self._found_nearby
        local.on_ban.append(self._ban)
        local.transport.handle("hello", self._handle_hello, max_request_bytes=MAX_HELLO_BYTES)

    def start(self) -> None:
        """Start the background work."""
        self._rotate_at_s = self._local.clock() + self._local.config.rotation_s * self._local.rng.uniform(0.5, 1.5)
        self.given = dict.fromkeys(self._local.config.peers, "not tried yet")
        self._local.tasks.spawn(self._keep(), "neighbours")

    @property
    def ids(self) -> dict[str, Neighbour]:
        """Linked peers by node id; to be read only."""
        return self._links

    def knows(self, node_id: str) -> bool:
        """Whether a peer may speak as a neighbour: it is one, or has just said so and its answer is under way."""
        return node_id in self._links or node_id in self._greeted

    def outbound(self) -> list[Neighbour]:
        """Those that this node has chosen."""
        return [link for link in self._links.values() if link.direction == "out"]

    def inbound(self) -> list[Neighbour]:
        """Those that have chosen this node."""
        return [link for link in self._links.values() if link.direction == "in"]

    def heard(self, node_id: str) -> None:
        """Note that a peer has asked or answered."""
        link = self._links.get(node_id)
        if link is not None:
            link.heard_at_s, link.num_failures = self._local.clock(), 0

    def failed(self, node_id: str) -> None:
        """Note that a peer did not answer."""
        link = self._links.get(node_id)
        if link is None:
            return
        link.num_failures += 1
        if link.num_failures >= MAX_FAILURES:
            now_s = self._local.clock()
            self._directory.failed(node_id, now_s)
            self.drop(node_id)
            self._lost.pop(node_id, None)
            self._lost[node_id] = (link.record, now_s)
            if len(self._lost) > MAX_LOST:
                del self._lost[next(iter(self._lost))]

    def drop(self, node_id: str) -> None:
        """End a link; the peer may be asked, and may ask, as any stranger."""
        if self._links.pop(node_id, None) is not None:
            self._wake.set()

    def wake(self) -> None:
        """Look again for nodes to connect to."""
        self._wake.set()

    async def _keep(self) -> None:
        """Keep enough links. Consumes the directory; waits for a tick or `wake`; ends with the member."""
        local, config = self._local, self._local.config
        while True:
            self._wake.clear()
            now_s = local.clock()
            self._drop_silent(now_s)
            if not self._links and now_s >= self._next_join_s:
                await self._join()
            if self._nearby and (now_s >= self._next_nearby_s or not self._links):
                self._next_nearby_s = now_s + NEARBY_RETRY_S
                await self._join_nearby()
            self._retry_lost(now_s)
            missing = config.num_outbound - len(self.outbound())
            if now_s >= self._rotate_at_s or self._is_unbalanced(now_s):
                self._rotate(now_s)
                missing = config.num_outbound - len(self.outbound())
            await self._dial_some(missing)
            calm = len(self.outbound()) >= config.min_outbound
            tick_s = (CALM_TICK_S if calm else TICK_S) * local.rng.uniform(0.8, 1.2)
            try:
                async with asyncio.timeout(tick_s):
                    await self._wake.wait()
                await asyncio.sleep(TICK_S / 10)  # what wakes it comes in swarms
            except TimeoutError:
                continue

    def _found_nearby(self, address: str) -> None:
        """Try an address that the transport has found by itself, soon."""
        if address in self._local.transport.addresses:
            return
        self._nearby[address] = None
        if len(self._nearby) > MAX_NEARBY:
            del self._nearby[next(iter(self._nearby))]
        self._next_join_s = 0.0
        self._wake.set()

    async def _join_nearby(self) -> None:
        """Try every address that was found, once more while it does not answer and nobody is a neighbour."""
        for address in list(self._nearby):
            try:
                node_id = await self._local.transport.connect(address, timeout_s=self._local.config.request_timeout_s)
                if node_id not in self._links:
                    await self._greet(node_id, NEARBY)
            except TransportError:
                continue
            except ValueError:  # no address: whoever is on this network may say anything
                pass
            self._nearby.pop(address, None)

    async def _join(self) -> None:
        """Try every address that was given, and what the directory has is tried after it."""
        local = self._local
        for address in self.given:
            if address in local.transport.addresses:
                self.given[address] = "this node itself"
                continue
            try:
                node_id = await local.transport.connect(address, timeout_s=local.config.request_timeout_s)
                if node_id == local.node_id:
                    self.given[address] = "this node itself"
                    continue
                self.given[address] = await self._greet(node_id, GIVEN)
            except ValueError as error:
                self.given[address] = str(error)
            except TransportError as error:
                self.given[address] = str(error)
        if self._links:
            self._backoff_s, self._next_join_s = TICK_S, 0.0
        else:
            self._next_join_s = local.clock() + self._backoff_s * local.rng.uniform(0.8, 1.2)
            self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)

    def _retry_lost(self, now_s: float) -> None:
        """Try one of the lost neighbours, now and then."""
        for node_id, (_, lost_at_s) in list(self._lost.items()):
            gone = now_s - lost_at_s > LOST_FOR_S or self._local.reputation.is_banned(node_id, now_s)
            if gone or node_id in self._links:
                del self._lost[node_id]
        if self._lost and now_s >= self._retry_lost_at_s:
            self._retry_lost_at_s = now_s + LOST_RETRY_S * self._local.rng.uniform(0.8, 1.2)
            node_id = self._local.rng.choice(list(self._lost))
            self._directory.add(self._lost[node_id][0], node_id, now_s)  # it may have been forgotten
            self._local.tasks.spawn(self._dial(node_id, node_id), "retry")

    async def _dial_some(self, num: int) -> None:
        """Connect to a few nodes of the directory, side by side."""
        if num <= 0:
            return
        now_s, chosen, num_before = self._local.clock(), self._chosen(), len(self.outbound())
        exclude = chosen.keys() | {self._local.node_id} | self._local.reputation.banned(now_s)
        strangers_only = exclude | self._links.keys()
        while len(chosen) < num_before + min(num, _NUM_DIALS):
            # One that has chosen this node is as good as any, where nobody else is left.
            drawn = self._directory.choose(now_s, exclude=strangers_only, chosen=chosen)
            if drawn is None and len(chosen) < self._local.config.min_outbound:
                drawn = self._directory.choose(now_s, exclude=exclude, chosen=chosen)
            if drawn is None:
                break
            node_id, source = drawn[0].record.node_id, drawn[1]
            chosen[node_id] = source
            exclude.add(node_id)
            strangers_only.add(node_id)
        await asyncio.gather(*(self._dial(*one) for one in list(chosen.items())[num_before:]))

    def _chosen(self) -> dict[str, str]:
        """The neighbours that this node has chosen, each with where it had heard of it."""
        return {link.node_id: link.source for link in self.outbound()}

    async def _dial(self, node_id: str, source: str) -> None:
        """Connect to one node by the addresses of its record, and ask for a link."""
        local, known = self._local, self._directory.get(node_id)
        if known is None or node_id in self._dialling:
            return
        self._dialling.add(node_id)
        try:
            await self._connect(known.record)
            await self._greet(node_id, source)
        except TransportError:
            local.counters.requests_failed += 1
            self._directory.failed(node_id, local.clock())
        finally:
            self._dialling.discard(node_id)

    async def _connect(self, record: NodeRecord) -> None:
        """Reach a node under any of its addresses. Raises TransportError."""
        error: TransportError = PeerUnreachable("it has no address that this transport understands")
        for address in record.addresses:
            try:
                found = await self._local.transport.connect(address, timeout_s=self._local.config.request_timeout_s)
            except ValueError:
                continue
            except TransportError as failure:
                error = failure
                continue
            if found == record.node_id:
                return
            error = PeerUnreachable("another node answers under its address")
        raise error

    async def _greet(self, node_id: str, source: str) -> str:
        """Say hello and ask for a link; return what came of it, in words. Raises TransportError."""
        local = self._local
        sent_s, start_s = local.clock(), asyncio.get_running_loop().time()
        self._greeted.add(node_id)
        try:
            answer = await local.transport.request(
                node_id,
                "hello",
                encode_hello(self._own_hello(link=True)),
                max_response_bytes=MAX_HELLO_BYTES,
                timeout_s=local.config.request_timeout_s,
            )
            rtt_s = asyncio.get_running_loop().time() - start_s
            hello = decode_hello(answer)
            self._clocks.note(node_id, hello.now_ms / 1000 - (sent_s + rtt_s / 2))
            record = check_hello(hello, node_id, local, self._known_record(node_id))
        except RequestRefused as refusal:
            if refusal.code == Reason.CLOCK_SKEW:
                self._clocks.note_refused(node_id, refusal.detail)
            self._directory.later(node_id, local.clock() + FULL_RETRY_S)
            return f"refused: {refusal}"
        except Refusal as refusal:
            local.refuse(refusal.reason, blame=node_id)
            self._directory.failed(node_id, local.clock())
            return f"not taken: {refusal}"
        finally:
            self._greeted.discard(node_id)
        now_s = local.clock()
        self._directory.add(record, source, now_s)
        self._directory.reached(node_id, now_s)
        if not hello.link:
            self._directory.later(node_id, now_s + FULL_RETRY_S)
            self.drop(node_id)
            return "there, with no free place for a neighbour"
        self._link(record, "out", source, rtt_s * 1000)
        return "joined"

    async def _handle_hello(self, asker: str, payload: bytes) -> bytes:
        """Take a stranger's greeting, and give it a link if it asks for one and there is room."""
        local, now_s = self._local, self._local.clock()
        if local.reputation.is_banned(asker, now_s):
            raise local.refuse_request(Reason.BANNED, "this node will not hear you for a while")
        if not self._hellos_by_peer.take(asker, now_s) or (asker not in self._links and not self._hellos.take(now_s)):
            raise local.refuse_request(Reason.BUSY, "too many greetings at one time; ask again later")
        try:
            hello = decode_hello(payload)
            record = check_hello(hello, asker, local, self._known_record(asker))
        except Refusal as refusal:
            raise local.refuse_malformed(refusal, asker) from None
        if hello.link:  # who asks for none may be a crawler, which is nobody to tell of
            self._directory.add(record, asker, now_s)
            self._directory.reached(asker, now_s)
        linked = asker in self._links
        if linked:
            self._links[asker].record = record
            self.heard(asker)
        elif hello.link:
            linked = len(self.inbound()) < local.config.max_inbound
            if linked:
                self._link(record, "in", asker, None)
            else:
                local.refuse(Reason.FULL)
        return encode_hello(self._own_hello(link=linked))

    def _known_record(self, node_id: str) -> NodeRecord | None:
        known = self._directory.get(node_id)
        return known.record if known is not None else None

    def _own_hello(self, *, link: bool) -> Hello:
        local = self._local
        return Hello(local.config.swarm_id, int(local.clock() * 1000), link, self._own_record())

    def _link(self, record: NodeRecord, direction: Literal["in", "out"], source: str, rtt_ms: float | None) -> None:
        now_s = self._local.clock()
        link = self._links.get(record.node_id)
        if link is None:
            link = Neighbour(record.node_id, direction, record, source, now_s, now_s, now_s)
            self._links[record.node_id] = link
            is_new = True
        else:
            is_new = False
            link.record, link.greeted_at_s = record, now_s
            if direction == "out" and link.direction == "in":
                link.direction, link.source = "out", source
        link.rtt_ms = rtt_ms if rtt_ms is not None else link.rtt_ms
        self.heard(record.node_id)
        for address in self.given.keys() & set(record.addresses):
            self.given[address] = "joined"
        if is_new:
            for tell in self.on_link:
                tell(link)

    def _is_unbalanced(self, now_s: float) -> bool:
        """Whether one source has told of all chosen neighbours and another could name one, or a root of two more."""
        chosen = self._chosen()
        if len(chosen) < self._local.config.min_outbound or now_s < self._balance_at_s:
            return False
        self._balance_at_s = now_s + BALANCE_S * self._local.rng.uniform(0.8, 1.2)
        drawn = self._directory.choose(now_s, exclude=self._links.keys() | {self._local.node_id}, chosen=chosen)
        if drawn is None:
            return False
        roots, sources = self._roots(), set(chosen.values())
        return roots[drawn[0].root] + 2 <= max(roots.values()) or (len(sources) == 1 and drawn[1] not in sources)

    def _roots(self) -> Counter[str]:
        return Counter(map(self._directory.root_of, self._chosen()))

    def _rotate(self, now_s: float) -> None:
        """Give up a chosen neighbour, if enough are chosen, and another one is known.

        It is the one that has been useful least of those that the most prolific root has named.
        """
        local = self._local
        self._rotate_at_s = now_s + local.config.rotation_s * local.rng.uniform(0.5, 1.5)
        exclude = self._links.keys() | {local.node_id}
        if len(self.outbound()) < local.config.min_outbound:
            return
        if self._directory.choose(now_s, exclude=exclude, chosen={}) is None:
            return
        roots = self._roots()
        most = [link for link in self.outbound() if roots[self._directory.root_of(link.node_id)] == max(roots.values())]
        worst = min(most, key=lambda link: (local.reputation.score(link.node_id, now_s), link.since_s))
        self._directory.later(worst.node_id, now_s + local.config.rotation_s)
        self.drop(worst.node_id)

    def _drop_silent(self, now_s: float) -> None:
        """End links whose peer has not been heard; chosen ones are pinged long before (`gossip`)."""
        limit_s = 5 * self._local.config.ping_s
        for link in [link for link in self._links.values() if now_s - link.heard_at_s > limit_s]:
            self.drop(link.node_id)

    async def greet_again(self, link: Neighbour) -> None:
        """Exchange fresh records with a neighbour. Used by the directory's upkeep; a failure ends the link in time."""
        try:
            await self._greet(link.node_id, link.source)
        except TransportError:
            self.failed(link.node_id)

    def _ban(self, node_id: str) -> None:
        self._directory.forget(node_id)
        self.drop(node_id)
        self._local.tasks.spawn(self._local.transport.disconnect(node_id), "disconnect")
