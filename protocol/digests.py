"""How an announcement commits to its frames, so that each can be checked alone, whoever hands it over.

    leaf = first 16 bytes of SHA-256(0x00 ‖ frame)
    root = SHA-256(0x01 ‖ author's public key ‖ all leaves in order)

The leading byte keeps leaf and root apart. A leaf of 128 bits costs half the bytes; to pass off another frame takes a
second preimage. The author's key stands in the root so that nobody can announce another's batch as their own under the
same root, and have the author's announcement taken for the duplicate.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence

from protocol.identity import public_key_of
from protocol.limits import DIGEST_BYTES
from protocol.messages import Announcement
from protocol.refusals import Reason, Refusal

__all__ = ["check_frames", "leaf_of", "root_of"]


def leaf_of(frame: bytes) -> bytes:
    """Return the digest of one frame."""
    return hashlib.sha256(b"\x00" + frame).digest()[:DIGEST_BYTES]


def root_of(author: str, leaves: Sequence[bytes]) -> bytes:
    """Return the digest of an author's batch from those of its frames."""
    return hashlib.sha256(b"\x01" + public_key_of(author) + b"".join(leaves)).digest()


def check_frames(
    announcement: Announcement, asked: Collection[int], leaves: Sequence[bytes], frames: Mapping[int, bytes]
) -> None:
    """Raise Refusal unless these frames are some of those asked for, and are the announced ones byte for byte.

    Nothing is decompressed, and a frame that passes is the author's own, whoever sent it.
    """
    if len(leaves) != len(announcement.frame_sizes) or root_of(announcement.author, leaves) != announcement.root:
        raise Refusal(Reason.WRONG_DIGEST, "the frames' digests are not those announced")
    for number, frame in frames.items():
        if number not in asked:
            raise Refusal(Reason.UNASKED, f"frame {number} was not asked for")
        if len(frame) != announcement.frame_sizes[number] or leaf_of(frame) != leaves[number]:
            raise Refusal(Reason.WRONG_DIGEST, f"frame {number} is not the one announced")
