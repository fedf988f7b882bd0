"""What nodes ask one another, as bytes: the payloads of hello, announce, pull, repair and peers.

    hello      Hello            →  Hello              who are you, of which swarm, by which clock
    announce   AnnounceRequest  →  AnnounceResponse   I hold frames of these batches
    pull       PullRequest      →  PullResponse       give me these frames of this batch
    repair     RepairRequest    →  RepairResponse     which batches do you hold that I lack
    peers      PeersRequest     →  PeersResponse      whom do you know

Signed records stand in payloads as they came, undecoded, so that one bad record is refused and counted alone. A
decoder raises Refusal and no other error. What is asked when, and whom to believe, is `gossip`'s and `directory`'s.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.digests import check_frames
from protocol.fields import Fields, open_record, write_record
from protocol.identity import node_id_of, public_key_of
from protocol.limits import (
    DIGEST_BYTES,
    MAX_ANNOUNCE_REQUEST_BYTES,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_BLOOM_BYTES,
    MAX_BLOOM_HASHES,
    MAX_BROADCAST_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HELLO_BYTES,
    MAX_NODE_RECORD_BYTES,
    MAX_OFFERS,
    MAX_PEERS,
    MAX_PEERS_RESPONSE_BYTES,
    MAX_PULL_REQUEST_BYTES,
    MAX_PULL_RESPONSE_BYTES,
    MAX_QUIET_S,
    MAX_REPAIR_REQUEST_BYTES,
    MAX_REPAIR_RESPONSE_BYTES,
    MAX_SMALL_REQUEST_BYTES,
    MAX_SWARM_ID_BYTES,
    PUBLIC_KEY_BYTES,
    ROOT_BYTES,
    SALT_BYTES,
)
from protocol.messages import PROTOCOL_VERSION, Announcement, NodeRecord
from protocol.wire import decode_node_record

__all__ = [
    "AnnounceRequest",
    "AnnounceResponse",
    "Broadcast",
    "Hello",
    "Offer",
    "PeersRequest",
    "PeersResponse",
    "PullRequest",
    "PullResponse",
    "RepairRequest",
    "RepairResponse",
    "check_pull",
    "decode_announce_request",
    "decode_announce_response",
    "decode_broadcast",
    "decode_hello",
    "decode_peers_request",
    "decode_peers_response",
    "decode_pull_request",
    "decode_pull_response",
    "decode_repair_request",
    "decode_repair_response",
    "encode_announce_request",
    "encode_announce_response",
    "encode_broadcast",
    "encode_hello",
    "encode_peers_request",
    "encode_peers_response",
    "encode_pull_request",
    "encode_pull_response",
    "encode_repair_request",
    "encode_repair_response",
    "fitting_offers",
    "max_pull_response_bytes",
]


@dataclass(frozen=True, slots=True)
class Hello:
    """Request and response alike: each side says who it is, and learns whether the two belong together."""

    swarm_id: str  # 1 to 64 bytes of UTF-8
    now_ms: int  # unix milliseconds by the sender's clock
    link: bool  # request: be my neighbour; response: I am yours
    record: NodeRecord  # the sender's own
    version: tuple[int, int] = PROTOCOL_VERSION  # the newest protocol that the sender speaks


@dataclass(frozen=True, slots=True)
class Offer:
    """An announcement, and which frames of it the sender holds."""

    encoded: bytes  # signed announcement, for `wire.decode_announcement`
    held: int  # 64-bit mask: bit i is set where the sender holds frame i; bits past the last frame mean nothing


@dataclass(frozen=True, slots=True)
class Broadcast:
    """An announcement to all nodes. Nobody signs for the holder: whoever asks it in vain asks the author."""

    encoded: bytes  # signed announcement, for `wire.decode_announcement`
    holder: str  # node id of who holds the whole batch: its author, or whoever has brought it from elsewhere


@dataclass(frozen=True, slots=True)
class AnnounceRequest:
    """Batches that the sender holds frames of; none at all asks only for the response."""

    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class AnnounceResponse:
    """How much the answerer wants to hear."""

    quiet_s: int  # seconds for which it has enough, and wants no announcements from this asker; 0: go on


@dataclass(frozen=True, slots=True)
class PullRequest:
    """Frames of one batch."""

    root: bytes  # of the announcement
    numbers: tuple[int, ...]  # frames asked for, ascending, 0 to 63


@dataclass(frozen=True, slots=True)
class PullResponse:
    """The frames that the answerer holds of those asked for, with what proves them."""

    leaves: tuple[bytes, ...]  # digests of all frames of the batch, 16 bytes each
    frames: dict[int, bytes]  # by number, ascending


@dataclass(frozen=True, slots=True)
class RepairRequest:
    """The batches that the asker knows, as a Bloom filter over their roots (see `bloom`)."""

    salt: bytes  # 8 bytes, new for each request
    num_hashes: int  # bits set for each root, 1 to 16
    bits: bytes  # the filter; empty: knows none
    max_offers: int  # how many batches the asker wants to hear of, 1 to 256


@dataclass(frozen=True, slots=True)
class RepairResponse:
    """Batches that the answerer holds frames of and that are not in the filter."""

    offers: tuple[Offer, ...]


@dataclass(frozen=True, slots=True)
class PeersRequest:
    """Node records, not more than so many."""

    max_records: int  # 1 to 64


@dataclass(frozen=True, slots=True)
class PeersResponse:
    """Live nodes that the answerer knows, chosen at random."""

    records: tuple[bytes, ...]  # signed node records, for `wire.decode_node_record`


def encode_hello(hello: Hello) -> bytes:
    """Return a hello as bytes."""
    fields = [hello.swarm_id, hello.now_ms, hello.link, hello.record.encoded]
    return write_record("hello", fields, MAX_HELLO_BYTES)


def decode_hello(data: bytes) -> Hello:
    """Return a hello. Whether it comes from its record's node, and of which swarm, is not checked."""
    fields = open_record("hello", data, num_fields=4, max_bytes=MAX_HELLO_BYTES, max_values=7)
    return Hello(
        swarm_id=fields.label("swarm_id", MAX_SWARM_ID_BYTES),
        now_ms=fields.integer("now_ms"),
        link=fields.boolean("link"),
        record=decode_node_record(fields.blob("record", MAX_NODE_RECORD_BYTES)),
        version=fields.version,
    )


def encode_announce_request(request: AnnounceRequest) -> bytes:
    """Return an announce request as bytes; `fitting_offers` says how many offers have room."""
    return write_record("announce", [_pack_offers(request.offers)], MAX_ANNOUNCE_REQUEST_BYTES)


def decode_announce_request(data: bytes) -> AnnounceRequest:
    """Return an announce request."""
    return AnnounceRequest(_read_offers("announce", data, MAX_ANNOUNCE_REQUEST_BYTES))


def encode_announce_response(response: AnnounceResponse) -> bytes:
    """Return an announce response as bytes."""
    return write_record("announce response", [response.quiet_s], MAX_SMALL_REQUEST_BYTES)


def decode_announce_response(data: bytes) -> AnnounceResponse:
    """Return an announce response."""
    fields = open_record("announce response", data, num_fields=1, max_bytes=MAX_SMALL_REQUEST_BYTES, max_values=4)
    return AnnounceResponse(fields.integer("quiet_s", MAX_QUIET_S))


def encode_broadcast(broadcast: Broadcast) -> bytes:
    """Return a broadcast as bytes."""
    return write_record("broadcast", [public_key_of(broadcast.holder), broadcast.encoded], MAX_BROADCAST_BYTES)


def decode_broadcast(data: bytes) -> Broadcast:
    """Return a broadcast, the announcement in it undecoded."""
    fields = open_record("broadcast", data, num_fields=2, max_bytes=MAX_BROADCAST_BYTES, max_values=5)
    holder = node_id_of(fields.binary("holder", PUBLIC_KEY_BYTES))
    return Broadcast(fields.blob("announcement", MAX_ANNOUNCEMENT_BYTES), holder)


def encode_pull_request(request: PullRequest) -> bytes:
    """Return a pull request as bytes."""
    return write_record("pull", [request.root, sum(1 << n for n in set(request.numbers))], MAX_PULL_REQUEST_BYTES)


def decode_pull_request(data: bytes) -> PullRequest:
    """Return a pull request."""
    fields = open_record("pull", data, num_fields=2, max_bytes=MAX_PULL_REQUEST_BYTES, max_values=5)
    root, mask = fields.binary("root", ROOT_BYTES), fields.integer("numbers")
    return PullRequest(root, tuple(n for n in range(MAX_FRAMES) if mask >> n & 1))


def encode_pull_response(response: PullResponse) -> bytes:
    """Return a pull response as bytes."""
    frames = [[number, frame] for number, frame in sorted(response.frames.items())]
    return write_record("pull response", [b"".join(response.leaves), frames], MAX_PULL_RESPONSE_BYTES)


def decode_pull_response(data: bytes) -> PullResponse:
    """Return a pull response. Nothing in it is proven before `check_pull`."""
    fields = open_record(
        "pull response", data, num_fields=2, max_bytes=MAX_PULL_RESPONSE_BYTES, max_values=5 + 3 * MAX_FRAMES
    )
    joined = fields.blob("leaves", MAX_FRAMES * DIGEST_BYTES)
    if not joined or len(joined) % DIGEST_BYTES:
        raise fields.bad("leaves", f"is not a number of digests of {DIGEST_BYTES} bytes")
    leaves = tuple(joined[start : start + DIGEST_BYTES] for start in range(0, len(joined), DIGEST_BYTES))
    items, num_items = fields.each("frames", MAX_FRAMES)
    frames: dict[int, bytes] = {}
    for _ in range(num_items):
        item = items.inner("frame", 2)
        number = item.integer("number", len(leaves) - 1)
        if frames and number <= max(frames):
            raise fields.bad("frames", "are not in ascending order")
        frames[number] = item.blob("content", MAX_FRAME_BYTES)
    return PullResponse(leaves, frames)


def check_pull(announcement: Announcement, asked: Collection[int], response: PullResponse) -> dict[int, bytes]:
    """Return the frames of a response, each proven to be the announced one. Raises Refusal where one is not."""
    check_frames(announcement, asked, response.leaves, response.frames)
    return response.frames


def max_pull_response_bytes(announcement: Announcement, asked: Collection[int]) -> int:
    """Return how large the response to a pull can be, if it is an honest one."""
    leaves = b"".ljust(DIGEST_BYTES * len(announcement.frame_sizes))
    whole = [leaves, [[number, b""] for number in sorted(asked)]]
    overhead = len(write_record("pull response", whole, MAX_PULL_RESPONSE_BYTES)) + 3 * len(asked)
    return min(MAX_PULL_RESPONSE_BYTES, overhead + sum(announcement.frame_sizes[number] for number in asked))


def encode_repair_request(request: RepairRequest) -> bytes:
    """Return a repair request as bytes."""
    fields = [request.salt, request.num_hashes, request.bits, request.max_offers]
    return write_record("repair", fields, MAX_REPAIR_REQUEST_BYTES)


def decode_repair_request(data: bytes) -> RepairRequest:
    """Return a repair request."""
    fields = open_record("repair", data, num_fields=4, max_bytes=MAX_REPAIR_REQUEST_BYTES, max_values=7)
    salt = fields.binary("salt", SALT_BYTES)
    num_hashes = fields.positive("num_hashes", MAX_BLOOM_HASHES)
    bits = fields.blob("bits", MAX_BLOOM_BYTES)
    return RepairRequest(salt, num_hashes, bits, fields.positive("max_offers", MAX_OFFERS))


def encode_repair_response(response: RepairResponse) -> bytes:
    """Return a repair response as bytes; `fitting_offers` says how many offers have room."""
    return write_record("repair response", [_pack_offers(response.offers)], MAX_REPAIR_RESPONSE_BYTES)


def decode_repair_response(data: bytes) -> RepairResponse:
    """Return a repair response."""
    return RepairResponse(_read_offers("repair response", data, MAX_REPAIR_RESPONSE_BYTES))


def encode_peers_request(request: PeersRequest) -> bytes:
    """Return a peers request as bytes."""
    return write_record("peers", [request.max_records], MAX_SMALL_REQUEST_BYTES)


def decode_peers_request(data: bytes) -> PeersRequest:
    """Return a peers request."""
    fields = open_record("peers", data, num_fields=1, max_bytes=MAX_SMALL_REQUEST_BYTES, max_values=4)
    return PeersRequest(fields.positive("max_records", MAX_PEERS))


def encode_peers_response(response: PeersResponse) -> bytes:
    """Return a peers response as bytes."""
    return write_record("peers response", [list(response.records)], MAX_PEERS_RESPONSE_BYTES)


def decode_peers_response(data: bytes) -> PeersResponse:
    """Return a peers response."""
    fields = open_record(
        "peers response", data, num_fields=1, max_bytes=MAX_PEERS_RESPONSE_BYTES, max_values=4 + MAX_PEERS
    )
    items, num_items = fields.each("records", MAX_PEERS)
    return PeersResponse(tuple(items.blob("record", MAX_NODE_RECORD_BYTES) for _ in range(num_items)))


def fitting_offers(offers: Sequence[Offer]) -> tuple[Offer, ...]:
    """Return the first offers, as many as one `announce` request or one response to `repair` holds."""
    room = min(MAX_ANNOUNCE_REQUEST_BYTES, MAX_REPAIR_RESPONSE_BYTES) - 8  # version and array headers
    kept: list[Offer] = []
    for offer in offers[:MAX_OFFERS]:
        room -= len(offer.encoded) + 13  # headers of the pair and of the bytes, and the mask
        if room < 0:
            break
        kept.append(offer)
    return tuple(kept)


def _pack_offers(offers: Sequence[Offer]) -> list[Any]:
    return [[offer.encoded, offer.held] for offer in offers]


def _read_offers(what: str, data: bytes, max_bytes: int) -> tuple[Offer, ...]:
    fields = open_record(what, data, num_fields=1, max_bytes=max_bytes, max_values=4 + 3 * MAX_OFFERS)
    items, num_items = fields.each("offers", MAX_OFFERS)
    return tuple(_read_offer(items) for _ in range(num_items))


def _read_offer(items: Fields) -> Offer:
    offer = items.inner("offer", 2)
    return Offer(offer.blob("announcement", MAX_ANNOUNCEMENT_BYTES), offer.integer("held"))
