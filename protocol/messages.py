"""Typed records that nodes exchange. Pure data: encoding is `wire`'s, signing is `signing`'s, limits are `limits`'s.

What is signed is made by `signing.sign_...` or read by `wire.decode_...`, never by hand: `encoded` is the truth, also
where a newer minor version wrote fields that this one does not know, and the other fields are what it says.
"""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["PROTOCOL_VERSION", "Announcement", "NodeRecord", "SharedCompletion", "SharedGroup", "TaskRef"]

PROTOCOL_VERSION = (1, 1)  # major: nodes that differ do not talk; minor: fields may be added at the end


@dataclass(frozen=True, slots=True, order=True)
class TaskRef:
    """A task by reference: enough to regenerate its question and its verifier anywhere, and nothing more.

    A reference carries no question, no answer and no reward, so that nobody needs to trust who sent it.
    """

    source: str  # name of the task source, e.g. "reasoning_gym/products"; at most 128 bytes of UTF-8
    digest: str  # 32 hex digits: what defines the source (config and generator version, or file content)
    seed: int  # unsigned 64-bit: the stream of items within the source
    index: int  # unsigned 64-bit: the item within the stream


@dataclass(frozen=True, slots=True)
class SharedCompletion:
    """One answer, as text: the receiver encodes it with its own tokenizer."""

    text: str  # special tokens removed
    finished: bool  # whether it ended by itself (the receiver then appends its own EOS), or at its budget


@dataclass(frozen=True, slots=True)
class SharedGroup:
    """All completions of one task by one author. A *frame* is a group's encoding, compressed."""

    task: TaskRef
    completions: tuple[SharedCompletion, ...]


@dataclass(frozen=True, slots=True)
class Announcement:
    """What an author says of one batch: the signed header under which its groups are pulled, one frame at a time.

    `root` commits to the digest of every frame, so that a frame can be checked alone, whoever holds it.
    """

    version: tuple[int, int]  # of the protocol that the batch is written in
    author: str  # node id
    sequence: int  # unsigned 64-bit: grows with every batch of this author, over restarts too
    created_at_ms: int  # unix milliseconds by the author's clock
    frame_sizes: tuple[int, ...]  # bytes of each frame, compressed
    root: bytes  # 32 bytes: over the author's key and the digests of all frames; the name of the batch
    policy_versions: tuple[int, ...]  # of the author's policy, ascending: those that wrote it; empty: not said
    signature: bytes  # 64 bytes, over the swarm id and every field above
    encoded: bytes = field(repr=False)  # signature and record as the author wrote them: what is verified and relayed


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """Who is there: what a node says of itself, small enough for a DHT."""

    version: tuple[int, int]  # the newest protocol that the node speaks
    node_id: str
    transport: str  # "hivemind", "libp2p", "memory": only nodes of one transport can connect
    addresses: tuple[str, ...]  # multiaddresses, each ending in the peer id; empty behind a NAT without a relay
    created_at_ms: int  # unix milliseconds by the node's clock; a newer record replaces an older one
    role: Literal["trainer", "bootstrap"]
    software: str  # e.g. "swarm-node/0.2.0"
    model: str  # label of the policy, e.g. "smollm2-135m"
    tasks: tuple[str, ...]  # sources that it trains on, as far as they fit
    rollouts_per_minute: int  # completions that it published in the last minutes, by its own account
    signature: bytes  # 64 bytes, over the swarm id and every field above
    encoded: bytes = field(repr=False)  # signature and record as the node wrote them: what is verified and relayed
