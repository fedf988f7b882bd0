"""Signatures: which bytes an author signs, and what a verified record then proves.

    message   = length of the swarm id (one byte) ‖ swarm id in UTF-8 ‖ the record's bytes
    signature = Ed25519 over "swarm-node/1" ‖ length of the tag (one byte) ‖ tag ‖ message      (`identity`)

The tag names the kind of record, so that no signature serves for two. The swarm id is signed and not sent: a record
that was made for another swarm cannot be told from a forged one, and is refused like one. The record's bytes hold
version, author, sequence, time and content, and are verified as they came: also where a newer minor version wrote more
fields than are known here.
"""

from collections.abc import Collection, Sequence
from typing import Literal

from protocol.digests import leaf_of, root_of
from protocol.identity import Identity, public_key_of, verify
from protocol.limits import (
    MAX_ADDRESSES,
    MAX_LABEL_BYTES,
    MAX_POLICY_VERSIONS,
    MAX_SWARM_ID_BYTES,
    MAX_TASKS,
    SIGNATURE_BYTES,
)
from protocol.messages import Announcement, NodeRecord
from protocol.refusals import Reason, Refusal
from protocol.wire import announcement_body, decode_announcement, decode_node_record, node_record_body

__all__ = [
    "ANNOUNCEMENT_TAG",
    "NODE_RECORD_TAG",
    "sign_announcement",
    "sign_node_record",
    "verify_announcement",
    "verify_node_record",
]

ANNOUNCEMENT_TAG = b"announcement"
NODE_RECORD_TAG = b"node record"


def sign_announcement(
    identity: Identity,
    swarm_id: str,
    *,
    sequence: int,
    created_at_ms: int,
    frames: Sequence[bytes],
    policy_versions: Collection[int] = (),
) -> Announcement:
    """Return the announcement of a batch. Raises Refusal where the batch is one that nobody takes.

    policy_versions: of the author's policy, those that wrote the batch; the newest of them where they are very many.
    """
    body = announcement_body(
        author=identity.node_id,
        sequence=sequence,
        created_at_ms=created_at_ms,
        frame_sizes=tuple(len(frame) for frame in frames),
        root=root_of(identity.node_id, [leaf_of(frame) for frame in frames]),
        policy_versions=tuple(sorted(set(policy_versions))[-MAX_POLICY_VERSIONS:]),
    )
    return decode_announcement(identity.sign(ANNOUNCEMENT_TAG, _message(swarm_id, body)) + body)


def verify_announcement(swarm_id: str, announcement: Announcement) -> None:
    """Raise Refusal(BAD_SIGNATURE) unless the author signed this announcement for this swarm."""
    _verify(swarm_id, announcement.author, ANNOUNCEMENT_TAG, announcement.encoded)


def sign_node_record(
    identity: Identity,
    swarm_id: str,
    *,
    transport: str,
    addresses: Sequence[str],
    created_at_ms: int,
    role: Literal["trainer", "bootstrap"],
    software: str,
    model: str,
    tasks: Sequence[str],
    rollouts_per_minute: int,
) -> NodeRecord:
    """Return a node's record of itself.

    It is made to fit: labels are cut, then tasks and then addresses left out from the end. The first address, and
    everything that names the node, always fits.
    """
    kept_addresses, kept_tasks = list(addresses[:MAX_ADDRESSES]), list(tasks[:MAX_TASKS])
    while True:
        try:
            body = node_record_body(
                node_id=identity.node_id,
                transport=transport,
                addresses=tuple(kept_addresses),
                created_at_ms=created_at_ms,
                role=role,
                software=_cut(software),
                model=_cut(model),
                tasks=tuple(kept_tasks),
                rollouts_per_minute=rollouts_per_minute,
            )
            break
        except Refusal as refusal:
            shortened = kept_tasks or kept_addresses
            if refusal.reason is not Reason.OVERSIZE or not shortened:
                raise
            shortened.pop()
    return decode_node_record(identity.sign(NODE_RECORD_TAG, _message(swarm_id, body)) + body)


def verify_node_record(swarm_id: str, record: NodeRecord) -> None:
    """Raise Refusal(BAD_SIGNATURE) unless the node signed this record of itself for this swarm."""
    _verify(swarm_id, record.node_id, NODE_RECORD_TAG, record.encoded)


def _verify(swarm_id: str, node_id: str, tag: bytes, encoded: bytes) -> None:
    signature, body = encoded[:SIGNATURE_BYTES], encoded[SIGNATURE_BYTES:]
    if not verify(public_key_of(node_id), tag, _message(swarm_id, body), signature):
        raise Refusal(Reason.BAD_SIGNATURE, f"not signed by {node_id} for this swarm")


def _message(swarm_id: str, body: bytes) -> bytes:
    """Return what is signed under the tag; the length keeps swarm id and body from sharing a byte."""
    name = swarm_id.encode()
    if not 0 < len(name) <= MAX_SWARM_ID_BYTES:
        raise ValueError(f"a swarm id has 1 to {MAX_SWARM_ID_BYTES} bytes of UTF-8, not {len(name)}")
    return bytes([len(name)]) + name + body


def _cut(label: str) -> str:
    """Return as much of a label as a record holds."""
    return label.encode()[:MAX_LABEL_BYTES].decode(errors="ignore")
