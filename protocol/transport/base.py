"""The contract of a transport: authenticated requests between nodes, and a table of small signed records.

A transport moves bytes and knows nothing of rollouts. Peers are named by their node id (the Ed25519 public key
in base32, see `identity`), on every transport: what carries the bytes proves the id, so a handler knows who asks.
What is *said* is trusted by its signature alone, never by who carried it.

    request   one frame to one peer, one frame back, both capped before they are read
    record    a signed value of at most `MAX_RECORD_VALUE_BYTES` under (key, owner), stored in the DHT until it expires
    connect   an address that a person typed, or a record told, becomes a peer that can be asked
    broadcast where the transport has it: one small message to all nodes, which pass it on if they accept it

`tests/contract/` holds every transport to this.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from protocol.errors import ProtocolError

__all__ = [
    "MAX_BROADCAST_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_RECORD_VALUE_BYTES",
    "ClockSkewed",
    "Handler",
    "Judge",
    "Judgement",
    "NotConnected",
    "PeerUnreachable",
    "Record",
    "RecordValidator",
    "RequestRefused",
    "RequestTimedOut",
    "ResponseTooLarge",
    "Traffic",
    "Transport",
    "TransportDown",
    "TransportError",
]

MAX_FRAME_BYTES = 4 * 2**20  # the largest request or response that any handler may allow
MAX_RECORD_VALUE_BYTES = 1024  # a record in the DHT
MAX_BROADCAST_BYTES = 4096  # a message to all nodes


class TransportError(ProtocolError):
    """A request or a lookup that brought nothing back. Each subclass is counted under its `reason`."""

    reason = "transport_error"


class PeerUnreachable(TransportError):
    """No connection to the peer could be made, or it broke before the response was whole."""

    reason = "unreachable"


class NotConnected(PeerUnreachable):
    """There is no connection to the peer: nothing was asked."""


class ClockSkewed(PeerUnreachable):
    """The clocks of the two nodes differ by too much for what one signs to be fresh to the other."""

    reason = "clock_skew"


class RequestTimedOut(TransportError):
    """The response was not whole in time."""

    reason = "timed_out"


class ResponseTooLarge(TransportError):
    """The peer announced a response over the cap; nothing of it was read."""

    reason = "response_too_large"


class TransportDown(TransportError):
    """The node's own transport is not running just now; it is being restarted."""

    reason = "transport_down"


class RequestRefused(TransportError):
    """The peer's handler answered with a refusal.

    A handler refuses by raising it: `code` (at most 32 characters of a-z and _) and `detail` (at most 200
    characters) reach the asker. A handler that raises anything else is a bug: it stops the node.
    """

    reason = "refused"

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code, self.detail = code, detail


Handler = Callable[[str, bytes], Awaitable[bytes]]  # (node id of the asker, request) -> response


class Judgement(Enum):
    """What becomes of a message that was broadcast."""

    ACCEPT = "accept"  # passed on
    IGNORE = "ignore"  # not passed on; nobody is to blame
    REJECT = "reject"  # not passed on, and held against whoever passed it on to this node: no honest node does


Judge = Callable[[str, bytes], Judgement]  # (node id of who passed it on, message); must not raise


@dataclass(frozen=True, slots=True)
class Record:
    """A value that its owner stored in the DHT."""

    owner: str  # node id
    value: bytes  # at most MAX_RECORD_VALUE_BYTES; signed by the owner, which the validator has checked
    expires_at: float  # unix seconds


RecordValidator = Callable[[bytes, str, bytes, float, float], bool]
"""(key, owner, value, expires_at, now) -> whether to store, return or believe this record. Must not raise."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What has crossed the wire since the start, frames and stream headers included as far as they are known."""

    bytes_in: int
    bytes_out: int
    num_requests_in: int
    num_requests_out: int
    num_restarts: int  # of what carries the bytes (p2pd)


class Transport(ABC):
    """One node's connection to the others. All methods belong to the event loop that called `start`."""

    name: str  # "memory", "hivemind", ...: stands in node records, since transports do not interoperate
    broadcasts: bool = False  # whether it has `broadcast`: known by its kind

    def __init__(self) -> None:
        self.on_found: Callable[[str], None] = lambda address: None  # told of addresses nearby; set before `start`

    @property
    @abstractmethod
    def node_id(self) -> str:
        """The node's own id."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[str, ...]:
        """Multiaddresses under which others may reach this node, each ending in its peer id; known after `start`."""

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """Counters since the start."""

    @abstractmethod
    def handle(self, name: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer requests called `name` (at most 32 characters of a-z and _). Called before `start`.

        A request over `max_request_bytes` is refused with code "too_large" before it is read. The number of
        requests that are handled at one time is bounded, in all and per asker; beyond it the code is "busy".
        """

    def hear(self, judge: Judge) -> None:  # noqa: B027  # nothing to do where nothing is broadcast
        """Judge each message once that others broadcast. Called before `start`."""

    @abstractmethod
    async def start(self) -> None:
        """Listen. Raises TransportError where that is impossible, with the fix in one line."""

    @abstractmethod
    async def close(self) -> None:
        """Leave; requests under way fail with TransportDown. A second call does nothing."""

    @abstractmethod
    async def wait_failed(self) -> None:
        """Return never; raise what has killed the transport for good. A death that is mended by a restart is none."""

    @abstractmethod
    async def connect(self, address: str, *, timeout_s: float) -> str:
        """Reach the node behind a multiaddress; return its node id. Raises PeerUnreachable or RequestTimedOut.

        Raises ClockSkewed, a PeerUnreachable, where the transport sees that the two clocks disagree, and ValueError
        for text that is no address of this transport, or the node's own.
        """

    @abstractmethod
    async def disconnect(self, node_id: str) -> None:
        """Drop the connection to a peer, and refuse it until it is connected to again from here."""

    @abstractmethod
    async def request(
        self, node_id: str, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float
    ) -> bytes:
        """Ask a peer; return its response. Raises a TransportError.

        A peer that was never connected to is looked up in the DHT of the transport, as far as it has one.
        Cancelling the call frees everything that it holds.
        """

    async def broadcast(self, message: bytes) -> None:
        """Send a message to all nodes, as far as peers pass it on; that it arrives is not promised.

        Raises ValueError for one of more than MAX_BROADCAST_BYTES, TransportDown, and NotImplementedError where the
        transport has no broadcasts.
        """
        raise NotImplementedError(f"{self.name} has no broadcasts")

    @abstractmethod
    async def store(self, key: bytes, value: bytes, expires_at: float) -> int:
        """Put the node's own record under a key; it replaces the node's earlier one. Returns how many nodes hold it.

        Raises ValueError for a value that the transport's own validator refuses.
        """

    @abstractmethod
    async def lookup(self, key: bytes, *, timeout_s: float) -> Sequence[Record]:
        """Return the records under a key that pass the validator, in no order; none where nobody answers."""

    def details(self) -> dict[str, Any]:
        """What this kind of transport has to show beside `traffic`: plain data for statistics."""
        return {}
