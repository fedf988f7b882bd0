"""The side of a stream that asks: every request is answered exactly once, or fails exactly once.

    begun       REQUEST and its body are being sent, or the answer is awaited
    answered    the whole of an ANSWER has come, or a REFUSAL: forgotten
    given up    CANCEL was sent; whatever comes of it is dropped, until it ends by ANSWER, REFUSAL or CANCELLED

A refusal may come before the body is sent: the rest is left out, and CANCEL says so.
"""

import asyncio

from protocol.transport.base import MAX_FRAME_BYTES, PeerUnreachable, ResponseTooLarge
from protocol.transport.framing import (
    ANSWER,
    BODY,
    CANCEL,
    CANCELLED,
    CLOSING,
    MAX_NUMBER,
    REFUSAL,
    REQUEST,
    BrokenStream,
    Frame,
    check_piece,
    frame_bytes,
    parse_answer,
    parse_refusal,
    request_head,
)
from protocol.transport.mux import MAX_OPEN_REQUESTS, Mux, Tally

__all__ = ["Asker", "NotTaken"]


class NotTaken(Exception):
    """The stream has ended before the peer took the request: another stream may bring it."""


class _Asked:
    """A request that has not ended."""

    __slots__ = ("future", "is_given_up", "is_sending", "max_response_bytes", "num_left", "pieces")

    def __init__(self, future: "asyncio.Future[bytes]", max_response_bytes: int) -> None:
        self.future, self.max_response_bytes = future, max_response_bytes
        self.is_sending, self.is_given_up = True, False
        self.num_left: int | None = None  # bytes of the answer; None before its length is known
        self.pieces: list[bytes] = []

    def sent(self) -> None:
        """The last piece of the body is handed over."""
        self.is_sending = False


class Asker(Mux):
    """Asks on one stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tally: Tally) -> None:
        super().__init__(reader, writer, tally)
        self._open: dict[int, _Asked] = {}
        self._num_given_up = 0  # of these
        self._last_number = 0
        self._slots = asyncio.Semaphore(MAX_OPEN_REQUESTS)
        self._num_waiting = 0
        self._is_closing = False

    @property
    def takes_requests(self) -> bool:
        """Whether the peer still takes requests on this stream."""
        return not (self.has_ended or self._is_closing or self._last_number >= MAX_NUMBER)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._open and not self._num_waiting

    async def request(self, name: str, payload: bytes, max_response_bytes: int) -> bytes:
        """Return the answer. Raises RequestRefused, ResponseTooLarge, PeerUnreachable, or NotTaken.

        Cancelling the call ends the work on both sides.
        """
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        if not self.takes_requests:
            self._slots.release()
            raise NotTaken
        self._last_number = number = self._last_number + 1
        max_response_bytes = min(max_response_bytes, MAX_FRAME_BYTES)
        asked = _Asked(self._loop.create_future(), max_response_bytes)
        self._open[number] = asked
        head = request_head(name, len(payload), max_response_bytes)
        self._outbox.send_body(number, REQUEST, head, payload, asked.sent)
        try:
            return await asked.future
        except asyncio.CancelledError:
            if self._open.get(number) is asked:
                self._give_up(number, asked)
            raise

    def close(self) -> None:
        """End an idle stream."""
        self._is_closing = True
        self._writer.close()

    def _give_up(self, number: int, asked: _Asked) -> None:
        if asked.is_given_up:
            return
        has_begun, _ = self._outbox.drop(number)
        if not has_begun:  # the peer has never heard of it
            self._forget(number)
            return
        asked.is_given_up, asked.pieces = True, []
        self._num_given_up += 1
        self._outbox.send(frame_bytes(CANCEL, number))
        self._watch()

    def _forget(self, number: int) -> None:
        asked = self._open.pop(number)
        self._num_given_up -= asked.is_given_up
        if self._is_closing and not self._open:
            self._writer.close()
        self._slots.release()
        self._note_use()

    def _take(self, frame: Frame) -> None:
        kind, number, content = frame
        if kind == CLOSING:
            self._close_after(number)
            return
        asked = self._open.get(number)
        if asked is None:
            raise BrokenStream("an answer to no request")
        if kind == ANSWER:
            if asked.num_left is not None or (asked.is_sending and not asked.is_given_up):
                raise BrokenStream("an answer out of turn")
            self._begin_answer(number, asked, content)
        elif kind == BODY and asked.num_left is not None:
            self._add(number, asked, content)
        elif kind == REFUSAL and asked.num_left is None:
            refusal = parse_refusal(content)
            if asked.is_sending and not asked.is_given_up:
                has_begun, _ = self._outbox.drop(number)
                if not has_begun:
                    raise BrokenStream("a refusal of what was not asked")
                self._outbox.send(frame_bytes(CANCEL, number))
            self._fail(asked, refusal)
            self._forget(number)
        elif kind == CANCELLED and asked.is_given_up:
            self._forget(number)
        else:
            raise BrokenStream("a frame out of turn")

    def _begin_answer(self, number: int, asked: _Asked, content: bytes) -> None:
        num_bytes, piece = parse_answer(content)
        if num_bytes > asked.max_response_bytes:
            if piece:
                raise BrokenStream("more than the asker takes")
            self._fail(asked, ResponseTooLarge(f"{num_bytes} bytes, over the cap of {asked.max_response_bytes}"))
            self._forget(number)
        else:
            asked.num_left = num_bytes
            self._add(number, asked, piece)

    def _add(self, number: int, asked: _Asked, piece: bytes) -> None:
        assert asked.num_left is not None
        asked.num_left = check_piece(len(piece), asked.num_left)
        if not asked.is_given_up:
            asked.pieces.append(piece)
        if asked.num_left == 0:
            self._forget(number)
            if not asked.future.done():
                asked.future.set_result(b"".join(asked.pieces))

    def _close_after(self, number: int) -> None:
        if number > self._last_number or self._is_closing:
            raise BrokenStream("a closing out of turn")
        self._is_closing = True
        for late in [other for other in self._open if other > number]:
            self._outbox.drop(late)
            self._fail(self._open[late], NotTaken())
            self._forget(late)
        if not self._open:
            self._writer.close()

    def _is_owed(self) -> bool:
        """What was given up must end, and an answer that has begun; how long one may take to begin, the caller says."""
        return self._num_given_up > 0 or any(asked.num_left is not None for asked in self._open.values())

    def _end(self) -> None:
        for number, asked in list(self._open.items()):
            self._fail(asked, PeerUnreachable("the peer broke off"))
            self._forget(number)
        for _ in range(self._num_waiting):
            self._slots.release()

    @staticmethod
    def _fail(asked: _Asked, error: Exception) -> None:
        if not asked.future.done():
            asked.future.set_exception(error)
