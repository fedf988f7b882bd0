"""The side of a stream that answers. Who asks has been proved; what he may ask, the `Dispatcher` says.

    arriving   admitted, and its body is not whole
    answered   its handler works
    leaving    its answer is being sent
    dropped    refused before its body was whole: the rest is dropped, until the asker has sent it or says that he stops

A request ends by the last piece of its ANSWER, by REFUSAL, or by CANCELLED after the asker's CANCEL. A CANCEL that
crosses one of these is nothing; there are no more of them than requests.
"""

import asyncio
from collections import Counter
from contextlib import ExitStack

from protocol.transport import pace
from protocol.transport.base import RequestRefused
from protocol.transport.dispatch import BUSY, FAILED, Dispatcher
from protocol.transport.framing import (
    ANSWER,
    BODY,
    CANCEL,
    CANCELLED,
    CLOSING,
    REQUEST,
    BrokenStream,
    Frame,
    RequestHead,
    answer_head,
    check_piece,
    frame_bytes,
    parse_request,
    refusal_bytes,
)
from protocol.transport.mux import MAX_OPEN_REQUESTS, Mux, Tally

__all__ = ["Answerer", "AnswerSpace"]

MAX_UNSENT_BYTES = 128 * 2**20  # of all answers that peers have not taken
MAX_UNSENT_BYTES_PER_ASKER = 32 * 2**20  # all that one may have asked for at one time, at its largest


class AnswerSpace:
    """The room for answers that wait until their askers take them, shared by all streams of a node."""

    def __init__(self) -> None:
        self._num_bytes: Counter[str] = Counter()  # by asker
        self._num_all = 0

    def take(self, asker: str, num_bytes: int) -> None:
        """Make room for an answer. Raises RequestRefused where there is none."""
        held = self._num_bytes[asker]
        if held + num_bytes > MAX_UNSENT_BYTES_PER_ASKER or self._num_all + num_bytes > MAX_UNSENT_BYTES:
            raise RequestRefused(BUSY, "too much waits to be taken; ask again later")
        self._num_bytes[asker] += num_bytes
        self._num_all += num_bytes

    def give_back(self, asker: str, num_bytes: int) -> None:
        """An answer has been taken, or is not wanted any more."""
        self._num_all -= num_bytes
        self._num_bytes[asker] -= num_bytes
        if not self._num_bytes[asker]:
            del self._num_bytes[asker]


class _Request:
    """A request that has not ended."""

    __slots__ = ("head", "num_left", "num_unsent", "pieces", "place", "task")

    def __init__(self, head: RequestHead, num_left: int) -> None:
        self.head, self.num_left = head, num_left
        self.pieces: list[bytes] = []
        self.place: ExitStack | None = None  # at the dispatcher; None where it was refused
        self.task: asyncio.Task[bytes] | None = None
        self.num_unsent = 0  # bytes of the answer


class Answerer(Mux):
    """Answers on one stream."""

    def __init__(
        self,
        asker: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tally: Tally,
        dispatcher: Dispatcher,
        space: AnswerSpace,
    ) -> None:
        super().__init__(reader, writer, tally)
        self.asker = asker
        self._dispatcher, self._space = dispatcher, space
        self._open: dict[int, _Request] = {}
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._last_number = 0
        self._num_requests = self._num_cancels = 0
        self._closing: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has been used, and nothing is under way."""
        return not self._open and self._last_number > 0 and self._closing is None

    @property
    def is_closing(self) -> bool:
        """Whether the asker has been told to close it."""
        return self._closing is not None

    def close(self) -> None:
        """Take no more requests on an idle stream: the asker closes it, or it is cut off."""
        assert self.is_idle
        self._closing = self._loop.call_later(pace.GRACE_S, self.cut_off)
        self._outbox.send(frame_bytes(CLOSING, self._last_number))

    async def run(self) -> None:
        """Serve the stream until it ends, and its handlers have."""
        try:
            await super().run()
        finally:
            if self._tasks:
                await asyncio.wait(self._tasks)

    def _take(self, frame: Frame) -> None:
        kind, number, content = frame
        if self._closing is not None and number > self._last_number:
            return  # it crossed the closing, and will be asked elsewhere
        if kind == REQUEST:
            self._begin(number, *parse_request(content))
        elif kind == BODY:
            self._arrive(number, content)
        elif kind == CANCEL:
            self._cancel(number)
        else:
            raise BrokenStream("what an answerer says")

    def _begin(self, number: int, head: RequestHead, piece: bytes) -> None:
        if number <= self._last_number:
            raise BrokenStream("a number that was used")
        self._last_number = number
        self._num_requests += 1
        if len(self._open) >= MAX_OPEN_REQUESTS:
            raise BrokenStream("too many requests at one time", "too_many_requests")
        self._tally.num_requests_in += head.name not in self._tally.own_names
        request = _Request(head, check_piece(len(piece), head.num_bytes))
        self._open[number] = request
        try:
            with ExitStack() as place:
                place.enter_context(self._dispatcher.admit(self.asker, head.name, head.num_bytes))
                request.place = place.pop_all()
        except RequestRefused as refusal:
            self._outbox.send(refusal_bytes(number, refusal))
            if not request.num_left:
                del self._open[number]
            return
        request.pieces.append(piece)
        if not request.num_left:
            self._answer(number, request)

    def _arrive(self, number: int, piece: bytes) -> None:
        request = self._open.get(number)
        if request is None or not request.num_left:
            raise BrokenStream("a body of no request")
        request.num_left = check_piece(len(piece), request.num_left)
        if request.place is not None:
            request.pieces.append(piece)
            if not request.num_left:
                self._answer(number, request)
        elif not request.num_left:
            del self._open[number]

    def _cancel(self, number: int) -> None:
        self._num_cancels += 1
        if number > self._last_number or self._num_cancels > self._num_requests:
            raise BrokenStream("a cancelling of no request")
        request = self._open.get(number)
        if request is None:
            return
        was_refused = request.place is None
        self._outbox.drop(number)
        self._free(number, request)
        if not was_refused:
            self._outbox.send(frame_bytes(CANCELLED, number))

    def _answer(self, number: int, request: _Request) -> None:
        payload, request.pieces = b"".join(request.pieces), []
        task = asyncio.create_task(self._dispatcher.answer(self.asker, request.head.name, payload))
        request.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._answered(number, request, task))

    def _answered(self, number: int, request: _Request, task: "asyncio.Task[bytes]") -> None:
        self._tasks.discard(task)
        refusal = RequestRefused(FAILED, "the handler was cancelled") if task.cancelled() else task.exception()
        if self._open.get(number) is not request:
            return  # given up, or the stream has ended
        assert request.place is not None
        request.place.close()
        try:
            if refusal is not None:
                raise refusal
            self._send_answer(number, request, task.result())
        except RequestRefused as error:
            del self._open[number]
            self._outbox.send(refusal_bytes(number, error))

    def _send_answer(self, number: int, request: _Request, answer: bytes) -> None:
        head = answer_head(len(answer))
        if len(answer) > request.head.max_answer_bytes:
            del self._open[number]
            self._outbox.send(frame_bytes(ANSWER, number, head))
            return
        self._space.take(self.asker, len(answer))
        request.num_unsent = len(answer)
        self._outbox.send_body(number, ANSWER, head, answer, lambda: self._free(number, request))

    def _free(self, number: int, request: _Request) -> None:
        """Forget a request, whatever its state."""
        del self._open[number]
        self._note_use()
        if request.task is not None:
            request.task.cancel()
        if request.place is not None:
            request.place.close()
        self._space.give_back(self.asker, request.num_unsent)

    def _is_owed(self) -> bool:
        """The first request, and bodies that have begun."""
        return not self._last_number or any(request.num_left for request in self._open.values())

    def _end(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        for number, request in list(self._open.items()):
            self._free(number, request)
