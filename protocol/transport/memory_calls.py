"""One request on its way through a simulated network and back, with what the network's faults make of it."""

import asyncio
from typing import TYPE_CHECKING, Any

from protocol.transport.base import PeerUnreachable, RequestRefused, ResponseTooLarge
from protocol.transport.framing import ANSWER_OVERHEAD_BYTES, REFUSAL_OVERHEAD_BYTES, REQUEST_OVERHEAD_BYTES

if TYPE_CHECKING:
    from protocol.transport.memory import MemoryTransport

__all__ = ["Call", "fail", "succeed"]


class Call:
    """One request on its way to a peer and back. `name` None asks whether the peer is there: a connection."""

    __slots__ = ("asker", "future", "max_response_bytes", "name", "network", "payload", "peer", "task")

    def __init__(
        self, asker: "MemoryTransport", peer: str, name: str | None, payload: bytes, max_response_bytes: int
    ) -> None:
        self.asker, self.peer, self.name, self.payload = asker, peer, name, payload
        self.max_response_bytes = max_response_bytes
        self.network = asker.network
        self.future: asyncio.Future[bytes] = asker.loop.create_future()
        self.task: asyncio.Task[None] | None = None

    def send(self) -> None:
        """Put the request on its way, as often as the network's faults say."""
        num_bytes = REQUEST_OVERHEAD_BYTES + len(self.name or "") + len(self.payload)
        delay_s, faults, rng = self.asker.send_after_s(num_bytes), self.network.faults, self.network.rng
        if faults.loss and rng.random() < faults.loss:
            return
        payload = self._spoilt(self.payload)
        self.asker.loop.call_later(delay_s, self._arrive, payload, num_bytes)
        if faults.duplication and rng.random() < faults.duplication:
            self.asker.loop.call_later(delay_s + self.network.delay_s(), self._arrive, payload, num_bytes)

    def give_up(self) -> None:
        """Stop the peer's work on it, which notices when the message that says so arrives."""
        if self.task is not None and not self.task.done():
            self.asker.loop.call_later(self.network.delay_s(), self.task.cancel)

    def _arrive(self, payload: bytes, num_bytes: int) -> None:
        if self.network.parted(self.asker.node_id, self.peer):
            return  # into nothing: the asker's timer ends it
        peer = self.network.live(self.peer)
        if peer is None or not peer.take(self, payload, num_bytes):
            self.break_off(f"{self.peer} does not answer")

    def respond(self, peer: "MemoryTransport", response: bytes, refusal: RequestRefused | None) -> None:
        """Put the peer's response on its way back."""
        network = self.network
        error: Exception | None = None
        num_bytes = ANSWER_OVERHEAD_BYTES + len(response)
        if refusal is not None:
            num_bytes = REFUSAL_OVERHEAD_BYTES + len(refusal.code) + len(refusal.detail.encode())
            error = RequestRefused(refusal.code, refusal.detail)
        elif len(response) > self.max_response_bytes:
            num_bytes = ANSWER_OVERHEAD_BYTES
            error = ResponseTooLarge(f"{len(response)} bytes, over the cap of {self.max_response_bytes}")
        delay_s = peer.send_after_s(num_bytes)
        if network.faults.loss and network.rng.random() < network.faults.loss:
            return
        self.asker.loop.call_later(delay_s, self._come_home, self._spoilt(response), error, num_bytes)

    def _come_home(self, response: bytes, error: Exception | None, num_bytes: int) -> None:
        if self.network.parted(self.asker.node_id, self.peer) or self.future.done():
            return
        self.asker.count_in(num_bytes)
        if error is not None:
            fail(self.future, error)
        else:
            succeed(self.future, response)

    def break_off(self, why: str) -> None:
        """Let the asker hear that no response will come."""
        self.asker.loop.call_later(self.network.delay_s(), fail, self.future, PeerUnreachable(why))

    def _spoilt(self, payload: bytes) -> bytes:
        rng, corruption = self.network.rng, self.network.faults.corruption
        if not payload or not corruption or rng.random() >= corruption:
            return payload
        position = rng.randrange(len(payload))
        return payload[:position] + bytes([payload[position] ^ rng.randrange(1, 256)]) + payload[position + 1 :]


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    """End a wait with an error, unless it has ended."""
    if not future.done():
        future.set_exception(error)


def succeed(future: "asyncio.Future[Any]", result: Any) -> None:
    """End a wait with a result, unless it has ended."""
    if not future.done():
        future.set_result(result)
