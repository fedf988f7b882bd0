"""How requests and responses share one byte stream that both sides authenticate.

The side that opened a stream asks on it, the other answers; each opens one of its own for what it asks. Many requests
are under way at one time, so everything travels in frames, and a large body in pieces between which others pass.
Integers are big-endian.

    frame      1 byte   kind
               4 bytes  number of the request; a new one has a larger number than all before it on this stream
               2 bytes  length of what follows
               n bytes

    asker      1 REQUEST    4 bytes length of the body, 4 bytes the most that the answer may have, 1 byte length of
                            the name, name (a-z and _), first piece of the body
               3 CANCEL     nothing: the asker has given up; what it still had to send of the body does not come
    answerer   2 ANSWER     4 bytes length of the body, first piece of the body; no body where it is more than the asker
                            takes
               5 REFUSAL    1 byte length of the code, code (a-z and _), detail (UTF-8)
               6 CANCELLED  nothing: nothing more comes, because the asker has given up
               7 CLOSING    nothing: no request with a larger number is taken, and none after it; ask on another stream
    both       4 BODY       next piece of the body

A body has at most `MAX_FRAME_BYTES`. A piece that is not the last of its body has at least `MIN_PIECE_BYTES`. Whatever
else comes ends the stream: who sends it does not speak this protocol. Order and states are `asking` and `answering`'s.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from protocol.transport.base import MAX_FRAME_BYTES, RequestRefused
from protocol.transport.dispatch import MAX_NAME_CHARACTERS, check_name

__all__ = [
    "ANSWER",
    "ANSWER_OVERHEAD_BYTES",
    "BODY",
    "CANCEL",
    "CANCELLED",
    "CLOSING",
    "HEADER_BYTES",
    "MAX_NUMBER",
    "MAX_PIECE_BYTES",
    "MIN_PIECE_BYTES",
    "REFUSAL",
    "REFUSAL_OVERHEAD_BYTES",
    "REQUEST",
    "REQUEST_OVERHEAD_BYTES",
    "BrokenStream",
    "Frame",
    "FrameParser",
    "answer_head",
    "check_piece",
    "frame_bytes",
    "RequestHead",
    "parse_answer",
    "parse_refusal",
    "parse_request",
    "refusal_bytes",
    "request_head",
]

REQUEST, ANSWER, CANCEL, BODY, REFUSAL, CANCELLED, CLOSING = 1, 2, 3, 4, 5, 6, 7
MAX_PIECE_BYTES = 65_535  # that any frame holds
MIN_PIECE_BYTES = 1_024  # so that a body is not a million frames
MAX_NUMBER = 2**32 - 1
MAX_DETAIL_BYTES = 800  # 200 characters
LENGTH_BYTES = 4
_HEADER = struct.Struct(">BIH")
_LENGTHS = struct.Struct(">IIB")
HEADER_BYTES = _HEADER.size
REQUEST_OVERHEAD_BYTES = HEADER_BYTES + _LENGTHS.size  # of a request that is one frame, beside name and body
ANSWER_OVERHEAD_BYTES = HEADER_BYTES + LENGTH_BYTES  # of an answer that is one frame
REFUSAL_OVERHEAD_BYTES = HEADER_BYTES + 1  # beside code and detail
_NAME = re.compile(rb"[a-z_]{1,32}\Z")
_SIZES = {  # the least and the most bytes after the header, by kind
    REQUEST: (2 * LENGTH_BYTES + 2, MAX_PIECE_BYTES),
    ANSWER: (LENGTH_BYTES, MAX_PIECE_BYTES),
    CANCEL: (0, 0),
    BODY: (1, MAX_PIECE_BYTES),
    REFUSAL: (2, 1 + MAX_NAME_CHARACTERS + MAX_DETAIL_BYTES),
    CANCELLED: (0, 0),
    CLOSING: (0, 0),
}


class BrokenStream(Exception):
    """The peer does not keep to this framing, or not in time; counted under `reason`."""

    def __init__(self, detail: str, reason: str = "bad_framing") -> None:
        super().__init__(detail)
        self.reason = reason


class Frame(NamedTuple):
    """What stands between two headers."""

    kind: int
    number: int
    content: bytes


class FrameParser:
    """Cuts what a stream brings into frames; holds at most one that is not whole."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def is_within_frame(self) -> bool:
        """Whether a frame has begun and is not whole."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are whole now. Raises BrokenStream at a header that is none."""
        buffer, at = self._buffer, 0
        buffer += data
        try:
            while len(buffer) - at >= HEADER_BYTES:
                kind, number, size = _HEADER.unpack_from(buffer, at)
                least, most = _SIZES.get(kind, (1, 0))
                if not least <= size <= most:
                    raise BrokenStream(f"no frame of kind {kind} has {size} bytes")
                begin = at + HEADER_BYTES
                if len(buffer) < begin + size:
                    break
                at = begin + size
                yield Frame(kind, number, bytes(buffer[begin:at]))
        finally:
            del buffer[:at]


def frame_bytes(kind: int, number: int, content: bytes = b"", num_more: int = 0) -> bytes:
    """Return a frame as it is sent; `num_more` bytes of its content are still to follow."""
    return _HEADER.pack(kind, number, len(content) + num_more) + content


def request_head(name: str, num_bytes: int, max_answer_bytes: int) -> bytes:
    """Return what stands before the first piece in a REQUEST."""
    return _LENGTHS.pack(num_bytes, max_answer_bytes, len(check_name(name))) + name.encode()


def answer_head(num_bytes: int) -> bytes:
    """Return what stands before the first piece in an ANSWER."""
    return num_bytes.to_bytes(LENGTH_BYTES, "big")


class RequestHead(NamedTuple):
    """What a REQUEST says before the first piece of its body."""

    name: str
    num_bytes: int  # of the body
    max_answer_bytes: int


def parse_request(content: bytes) -> tuple[RequestHead, bytes]:
    """Return the head and the first piece. Raises BrokenStream."""
    num_bytes, max_answer_bytes, length = _LENGTHS.unpack_from(content)
    name = content[_LENGTHS.size : _LENGTHS.size + length]
    if len(name) < length or not _NAME.match(name):
        raise BrokenStream("a request without a name")
    _check_length(num_bytes)
    return RequestHead(name.decode(), num_bytes, max_answer_bytes), content[_LENGTHS.size + length :]


def parse_answer(content: bytes) -> tuple[int, bytes]:
    """Return the length of the body and the first piece. Raises BrokenStream."""
    num_bytes = int.from_bytes(content[:LENGTH_BYTES], "big")
    _check_length(num_bytes)
    return num_bytes, content[LENGTH_BYTES:]


def _check_length(num_bytes: int) -> None:
    if num_bytes > MAX_FRAME_BYTES:
        raise BrokenStream(f"a body of {num_bytes} bytes")


def check_piece(num_bytes: int, num_left: int) -> int:
    """Return how much of a body is left after a piece of it. Raises BrokenStream for one too small or too large."""
    if num_bytes > num_left:
        raise BrokenStream("more than the body that was announced")
    if num_bytes < MIN_PIECE_BYTES and num_bytes < num_left:
        raise BrokenStream("a body in crumbs")
    return num_left - num_bytes


def refusal_bytes(number: int, refusal: RequestRefused) -> bytes:
    """Return a refusal as a frame."""
    detail = refusal.detail.encode()[:MAX_DETAIL_BYTES]
    return frame_bytes(REFUSAL, number, bytes([len(refusal.code)]) + refusal.code.encode() + detail)


def parse_refusal(content: bytes) -> RequestRefused:
    """Return a refusal that a peer sent. Raises BrokenStream."""
    code, detail = content[1 : 1 + content[0]], content[1 + content[0] :]
    if len(code) != content[0] or not _NAME.match(code):
        raise BrokenStream("a refusal without a code")
    try:
        return RequestRefused(code.decode(), detail.decode()[:200])
    except UnicodeDecodeError:
        raise BrokenStream("a refusal that is no text") from None
