"""See a swarm from outside: greet nodes without becoming their neighbour, and ask each whom it knows."""

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from protocol.about import NodeAbout
from protocol.clock import Clock
from protocol.identity import Identity
from protocol.limits import MAX_HELLO_BYTES, MAX_PEERS, MAX_PEERS_RESPONSE_BYTES
from protocol.messages import NodeRecord
from protocol.own_record import sign_own_record
from protocol.refusals import Refusal
from protocol.requests import (
    Hello,
    PeersRequest,
    decode_hello,
    decode_peers_response,
    encode_hello,
    encode_peers_request,
)
from protocol.signing import verify_node_record
from protocol.transport.base import Transport, TransportError
from protocol.wire import decode_node_record

__all__ = ["Crawled", "crawl"]

_NUM_AT_ONCE = 16
_MAX_ADDRESSES_TRIED = 4
_NUM_ASKED = 3  # times: each answer is another random choice


@dataclass(frozen=True, slots=True)
class Crawled:
    """One node of the swarm, as it was found."""

    record: NodeRecord
    reachable: bool
    rtt_ms: float | None  # None where it was not reached
    is_beyond: bool = False  # of another network that a bridge joins to this one: it cannot be asked from here


async def crawl(
    transport: Transport,
    identity: Identity,
    swarm_id: str,
    addresses: Sequence[str],
    *,
    about: NodeAbout,
    clock: Clock,
    rng: random.Random,
    timeout_s: float,
    max_nodes: int,
) -> list[Crawled]:
    """Walk from the given addresses over whom nodes know of, with a started transport.

    Raises TransportError, ValueError or Refusal where none of the addresses can be begun with; the rest is data.
    """
    crawler = _Crawler(transport, identity, swarm_id, about, clock, timeout_s)
    error: Exception | None = None
    for address in addresses:
        try:
            node_id = await transport.connect(address, timeout_s=timeout_s)
            await crawler.visit(node_id)
        except (TransportError, ValueError, Refusal) as failure:
            error = failure
    if not crawler.found and error is not None:
        raise error
    while crawler.waiting and len(crawler.found) < max_nodes:
        ids = [crawler.waiting.popleft() for _ in range(min(_NUM_AT_ONCE, len(crawler.waiting)))]
        await asyncio.gather(*(crawler.try_visit(node_id) for node_id in ids))
    return list(crawler.found.values())


class _Crawler:
    def __init__(
        self, transport: Transport, identity: Identity, swarm_id: str, about: NodeAbout, clock: Clock, timeout_s: float
    ) -> None:
        self._transport, self._identity, self._swarm_id = transport, identity, swarm_id
        self._about, self._clock, self._timeout_s = about, clock, timeout_s
        self.found: dict[str, Crawled] = {}
        self.waiting: deque[str] = deque()

    async def try_visit(self, node_id: str) -> None:
        """Reach a node that another one told of; one that does not answer stays in the list as unreachable."""
        for address in self.found[node_id].record.addresses[:_MAX_ADDRESSES_TRIED]:
            try:
                if await self._transport.connect(address, timeout_s=self._timeout_s) == node_id:
                    await self.visit(node_id)
                    return
            except (TransportError, ValueError, Refusal):
                continue

    async def visit(self, node_id: str) -> None:
        """Greet a node and ask whom it knows. Raises TransportError or Refusal."""
        now_ms = int(self._clock() * 1000)
        record = sign_own_record(self._identity, self._transport, self._swarm_id, self._about, now_ms)
        start_s = asyncio.get_running_loop().time()
        answer = await self._transport.request(
            node_id,
            "hello",
            encode_hello(Hello(self._swarm_id, now_ms, False, record)),
            max_response_bytes=MAX_HELLO_BYTES,
            timeout_s=self._timeout_s,
        )
        rtt_ms = 1000 * (asyncio.get_running_loop().time() - start_s)
        theirs = decode_hello(answer).record
        verify_node_record(self._swarm_id, theirs)
        self.found[node_id] = Crawled(theirs, True, rtt_ms)
        for _ in range(_NUM_ASKED):
            if not await self._ask(node_id):
                break

    async def _ask(self, node_id: str) -> int:
        data = await self._transport.request(
            node_id,
            "peers",
            encode_peers_request(PeersRequest(MAX_PEERS)),
            max_response_bytes=MAX_PEERS_RESPONSE_BYTES,
            timeout_s=self._timeout_s,
        )
        num_new = 0
        for encoded in decode_peers_response(data).records:
            record = decode_node_record(encoded)
            is_beyond, known = record.transport != self._transport.name, self.found.get(record.node_id)
            is_news = known is None or (known.is_beyond and not is_beyond)  # a bridge is on both sides
            if not is_news or record.node_id == self._identity.node_id:
                continue
            verify_node_record(self._swarm_id, record)
            self.found[record.node_id] = Crawled(record, False, None, is_beyond)
            if not is_beyond:
                self.waiting.append(record.node_id)
            num_new += 1
        return num_new
