"""The records that outlive a request, as bytes: frames, announcements and node records.

    frame          one SharedGroup: a zstd frame around a canonical record
    announcement   signature, then a canonical record
    node record    the same

Everything here is checked for size and schema, and nothing for truth: signatures are `signing`'s. A decoder raises
Refusal and no other error, whatever the bytes; an encoder raises it for what no node would take. What nodes ask
one another is `requests`'s, and how a batch commits to its frames is `digests`'s.
"""

from itertools import pairwise
from typing import Literal

from protocol.compression import compress, decompress
from protocol.fields import Fields, open_record, write_record
from protocol.identity import node_id_of, public_key_of
from protocol.limits import (
    DIGEST_BYTES,
    MAX_ADDRESS_BYTES,
    MAX_ADDRESSES,
    MAX_ANNOUNCEMENT_BYTES,
    MAX_BATCH_BYTES,
    MAX_COMPLETION_BYTES,
    MAX_COMPLETIONS,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_GROUP_BYTES,
    MAX_LABEL_BYTES,
    MAX_NODE_RECORD_BYTES,
    MAX_POLICY_VERSIONS,
    MAX_SOURCE_BYTES,
    MAX_TASKS,
    PUBLIC_KEY_BYTES,
    ROOT_BYTES,
    SIGNATURE_BYTES,
)
from protocol.messages import Announcement, NodeRecord, SharedCompletion, SharedGroup, TaskRef
from protocol.refusals import Reason, Refusal

__all__ = [
    "announcement_body",
    "decode_announcement",
    "decode_frame",
    "decode_group",
    "decode_node_record",
    "encode_frame",
    "encode_group",
    "node_record_body",
]


def encode_frame(group: SharedGroup) -> bytes:
    """Return the frame of a group."""
    frame = compress(encode_group(group))
    if len(frame) > MAX_FRAME_BYTES:
        raise Refusal(Reason.OVERSIZE, f"frame: {len(frame)} bytes are over the limit of {MAX_FRAME_BYTES}")
    return frame


def decode_frame(frame: bytes) -> SharedGroup:
    """Return the group in a frame."""
    if len(frame) > MAX_FRAME_BYTES:
        raise Refusal(Reason.OVERSIZE, f"frame: {len(frame)} bytes are over the limit of {MAX_FRAME_BYTES}")
    return decode_group(decompress(frame, MAX_GROUP_BYTES))


def encode_group(group: SharedGroup) -> bytes:
    """Return what is compressed into a frame."""
    task = group.task
    ref = [task.source, bytes.fromhex(task.digest), task.seed, task.index]
    completions = [[completion.text, completion.finished] for completion in group.completions]
    data = write_record("group", [ref, completions], MAX_GROUP_BYTES)
    decode_group(data)
    return data


def decode_group(data: bytes) -> SharedGroup:
    """Return the group in a decompressed frame."""
    fields = open_record("group", data, num_fields=2, max_bytes=MAX_GROUP_BYTES, max_values=9 + 3 * MAX_COMPLETIONS)
    task = fields.inner("task", 4)
    ref = TaskRef(
        source=task.label("source", MAX_SOURCE_BYTES),
        digest=task.binary("digest", DIGEST_BYTES).hex(),
        seed=task.integer("seed"),
        index=task.integer("index"),
    )
    items, num_items = fields.each("completions", MAX_COMPLETIONS)
    if num_items == 0:
        raise fields.bad("completions", "is empty")
    completions = []
    for _ in range(num_items):
        item = items.inner("completion", 2)
        completions.append(SharedCompletion(item.text("text", MAX_COMPLETION_BYTES), item.boolean("finished")))
    return SharedGroup(ref, tuple(completions))


def announcement_body(
    *,
    author: str,
    sequence: int,
    created_at_ms: int,
    frame_sizes: tuple[int, ...],
    root: bytes,
    policy_versions: tuple[int, ...],
) -> bytes:
    """Return what an author signs."""
    fields = [public_key_of(author), sequence, created_at_ms, list(frame_sizes), root, list(policy_versions)]
    return write_record("announcement", fields, MAX_ANNOUNCEMENT_BYTES - SIGNATURE_BYTES)


def decode_announcement(data: bytes) -> Announcement:
    """Return a signed announcement. Its signature is not verified."""
    max_values = 9 + MAX_FRAMES + MAX_POLICY_VERSIONS
    signature, fields = _open_signed("announcement", data, 5, MAX_ANNOUNCEMENT_BYTES, max_values, added=(1,))
    author = node_id_of(fields.binary("author", PUBLIC_KEY_BYTES))
    sequence = fields.integer("sequence")
    created_at_ms = fields.integer("created_at_ms")
    sizes, num_sizes = fields.each("frame_sizes", MAX_FRAMES)
    frame_sizes = tuple(sizes.integer("size") for _ in range(num_sizes))
    if not frame_sizes or 0 in frame_sizes:
        raise fields.bad("frame_sizes", "has no frame, or an empty one")
    if max(frame_sizes) > MAX_FRAME_BYTES or sum(frame_sizes) > MAX_BATCH_BYTES:
        raise Refusal(Reason.OVERSIZE, f"announcement: frames of {frame_sizes} bytes")
    root = fields.binary("root", ROOT_BYTES)
    versions = _policy_versions(fields) if fields.has_since(1) else ()
    return Announcement(
        fields.version, author, sequence, created_at_ms, frame_sizes, root, versions, signature=signature, encoded=data
    )


def node_record_body(
    *,
    node_id: str,
    transport: str,
    addresses: tuple[str, ...],
    created_at_ms: int,
    role: Literal["trainer", "bootstrap"],
    software: str,
    model: str,
    tasks: tuple[str, ...],
    rollouts_per_minute: int,
) -> bytes:
    """Return what a node signs of itself."""
    fields = [
        public_key_of(node_id), transport, list(addresses), created_at_ms, role, software, model, list(tasks),
        rollouts_per_minute,
    ]  # fmt: skip
    return write_record("node record", fields, MAX_NODE_RECORD_BYTES - SIGNATURE_BYTES)


def decode_node_record(data: bytes) -> NodeRecord:
    """Return a signed node record. Its signature is not verified."""
    max_values = 12 + MAX_ADDRESSES + MAX_TASKS
    signature, fields = _open_signed("node record", data, 9, MAX_NODE_RECORD_BYTES, max_values)
    return NodeRecord(  # the arguments are read in this order
        version=fields.version,
        node_id=node_id_of(fields.binary("node_id", PUBLIC_KEY_BYTES)),
        transport=fields.label("transport", MAX_LABEL_BYTES),
        addresses=_labels(fields, "addresses", MAX_ADDRESSES, MAX_ADDRESS_BYTES),
        created_at_ms=fields.integer("created_at_ms"),
        role=_role(fields),
        software=fields.label("software", MAX_LABEL_BYTES),
        model=fields.label("model", MAX_LABEL_BYTES),
        tasks=_labels(fields, "tasks", MAX_TASKS, MAX_SOURCE_BYTES),
        rollouts_per_minute=fields.integer("rollouts_per_minute"),
        signature=signature,
        encoded=data,
    )


def _open_signed(
    what: str, data: bytes, num_fields: int, max_bytes: int, max_values: int, *, added: tuple[int, ...] = ()
) -> tuple[bytes, Fields]:
    """Return the signature of a signed record, and its fields."""
    if len(data) > max_bytes:
        raise Refusal(Reason.OVERSIZE, f"{what}: {len(data)} bytes are over the limit of {max_bytes}")
    body = data[SIGNATURE_BYTES:]
    return data[:SIGNATURE_BYTES], open_record(
        what, body, num_fields=num_fields, max_bytes=max_bytes, max_values=max_values, added=added
    )


def _labels(fields: Fields, name: str, max_items: int, max_bytes: int) -> tuple[str, ...]:
    """Return an array of labels."""
    items, num_items = fields.each(name, max_items)
    return tuple(items.label("item", max_bytes) for _ in range(num_items))


def _policy_versions(fields: Fields) -> tuple[int, ...]:
    """Return numbers in ascending order, none twice."""
    items, num_items = fields.each("policy_versions", MAX_POLICY_VERSIONS)
    versions = tuple(items.integer("policy_version") for _ in range(num_items))
    if any(one >= other for one, other in pairwise(versions)):
        raise fields.bad("policy_versions", "are not in ascending order")
    return versions


def _role(fields: Fields) -> Literal["trainer", "bootstrap"]:
    """Return the role; a newer minor version may have roles that are not known here."""
    role = fields.label("role", MAX_LABEL_BYTES)
    if role == "trainer":
        return "trainer"
    if role == "bootstrap":
        return "bootstrap"
    if fields.newer:
        raise Refusal(Reason.UNKNOWN_MINOR, f"node record: unknown role {role}")
    raise fields.bad("role", "is neither trainer nor bootstrap")
