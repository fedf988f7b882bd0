"""How a request and its response stand on a byte stream that both sides authenticate.

One stream carries one request and one response, then it is closed. Integers are big-endian.

    request    1 byte   length of the name, 1 to 32
               n bytes  name, of a-z and _
               4 bytes  length of the payload
               n bytes  payload
    response   1 byte   0: answered, 1: refused
               4 bytes  length of the body, at most 4 MiB; at most 1,024 where refused
               n bytes  body: the response, or where refused
                            1 byte length of the code, code (a-z and _), detail (the rest, UTF-8)

Each side checks a length against its cap before it reads what follows, and ends the stream where the other is
slower than `MIN_BYTES_PER_S`. Whoever closes the stream early has given up: the other stops its work on it.
"""

import asyncio
import re

from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable, RequestRefused, ResponseTooLarge
from protocol.transport.dispatch import MAX_NAME_CHARACTERS, check_name

__all__ = [
    "BrokenStream",
    "read_request_head",
    "read_response",
    "request_head",
    "response_head",
    "refusal_bytes",
    "transfer_timeout_s",
    "write_all",
]

MIN_BYTES_PER_S = 65_536  # a peer that sends or takes slower than this, after the grace, is cut off
GRACE_S = 5.0  # for the head of a request, and on top of the time that a body may take
ANSWERED, REFUSED = 0, 1
LENGTH_BYTES = 4
RESPONSE_HEAD_BYTES = 1 + LENGTH_BYTES
MAX_REFUSAL_BYTES = 1024
CHUNK_BYTES = 65_536
_NAME = re.compile(rb"[a-z_]+\Z")


class BrokenStream(Exception):
    """The peer does not keep to this framing."""


def transfer_timeout_s(num_bytes: int) -> float:
    """Return how long so many bytes may take."""
    return GRACE_S + num_bytes / MIN_BYTES_PER_S


def request_head(name: str, num_bytes: int) -> bytes:
    """Return what stands before a payload."""
    return bytes([len(check_name(name))]) + name.encode() + num_bytes.to_bytes(LENGTH_BYTES, "big")


def response_head(status: int, num_bytes: int) -> bytes:
    """Return what stands before a body."""
    return bytes([status]) + num_bytes.to_bytes(LENGTH_BYTES, "big")


def refusal_bytes(refusal: RequestRefused) -> bytes:
    """Return a refusal as a whole response."""
    body = bytes([len(refusal.code)]) + refusal.code.encode() + refusal.detail.encode()
    return response_head(REFUSED, len(body)) + body


async def read_request_head(reader: asyncio.StreamReader) -> tuple[str, int]:
    """Return the name of a request and the length of its payload. Raises BrokenStream or IncompleteReadError."""
    length = (await reader.readexactly(1))[0]
    if not 1 <= length <= MAX_NAME_CHARACTERS:
        raise BrokenStream("no name")
    head = await reader.readexactly(length + LENGTH_BYTES)
    if not _NAME.match(head[:length]):
        raise BrokenStream("not a name")
    return head[:length].decode(), int.from_bytes(head[length:], "big")


async def read_response(reader: asyncio.StreamReader, max_response_bytes: int) -> bytes:
    """Return the body of an answer. Raises RequestRefused, ResponseTooLarge, PeerUnreachable, IncompleteReadError."""
    head = await reader.readexactly(RESPONSE_HEAD_BYTES)
    status, num_bytes = head[0], int.from_bytes(head[1:], "big")
    if status == ANSWERED:
        if num_bytes > min(max_response_bytes, MAX_FRAME_BYTES):
            raise ResponseTooLarge(f"{num_bytes} bytes, over the cap of {max_response_bytes}")
        return await reader.readexactly(num_bytes)
    if status != REFUSED or not 2 <= num_bytes <= MAX_REFUSAL_BYTES:
        raise PeerUnreachable("the peer does not speak this protocol")
    body = await reader.readexactly(num_bytes)
    code, detail = body[1 : 1 + body[0]], body[1 + body[0] :]
    try:
        if len(code) != body[0]:
            raise ValueError("the code is cut short")
        raise RequestRefused(check_name(code.decode()), detail.decode()[:200])
    except ValueError:  # a code that is none, or bytes that are no text
        raise PeerUnreachable("the peer does not speak this protocol") from None


async def write_all(writer: asyncio.StreamWriter, head: bytes, body: bytes) -> None:
    """Write piece by piece, so that a slow reader costs one piece of memory and not a second copy of the body."""
    writer.write(head)
    view = memoryview(body)
    for offset in range(0, len(body), CHUNK_BYTES):
        writer.write(view[offset : offset + CHUNK_BYTES])
        await writer.drain()
    await writer.drain()
