"""What every transport does with a request once it knows who asks: caps, bounded concurrency, bugs made loud.

How a request travels, and how its size is known before it is read, is the transport's.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from protocol.transport.base import MAX_FRAME_BYTES, Handler, RequestRefused

__all__ = ["BUSY", "FAILED", "MAX_NAME_CHARACTERS", "TOO_LARGE", "UNKNOWN_NAME", "Dispatcher", "check_name"]

BUSY, FAILED, TOO_LARGE, UNKNOWN_NAME = "busy", "handler_failed", "too_large", "unknown_name"  # codes of refusals

MAX_NAME_CHARACTERS = 32
MAX_REQUESTS = 64  # handled at one time
MAX_REQUESTS_PER_ASKER = 8
_NAME = re.compile(r"[a-z_]{1,32}\Z")
_MAX_DETAIL_CHARACTERS = 200


def check_name(name: str) -> str:
    """Return the name of a request or code of a refusal. Raises ValueError for one that cannot be sent."""
    if not _NAME.match(name):
        raise ValueError(f"not a name of a request or a refusal: {name!r}; use at most 32 characters of a-z and _")
    return name


class _Places:
    """How many requests are under way, in all and of one asker, and how many may be."""

    def __init__(self, max_requests: int, max_requests_per_asker: int) -> None:
        self._max_requests, self._max_requests_per_asker = max_requests, max_requests_per_asker
        self._num_under_way: Counter[str] = Counter()  # by asker
        self.num_all = 0

    def take(self, asker: str) -> None:
        """Take a place. Raises RequestRefused where there is none."""
        if self.num_all >= self._max_requests or self._num_under_way[asker] >= self._max_requests_per_asker:
            raise RequestRefused(BUSY, "too many requests at one time; ask again later")
        self.num_all += 1
        self._num_under_way[asker] += 1

    def give_back(self, asker: str) -> None:
        """Give a place back."""
        self.num_all -= 1
        self._num_under_way[asker] -= 1
        if not self._num_under_way[asker]:
            del self._num_under_way[asker]


class Dispatcher:
    """The handlers of one node, with the count of requests that are under way."""

    def __init__(
        self, *, max_requests: int = MAX_REQUESTS, max_requests_per_asker: int = MAX_REQUESTS_PER_ASKER
    ) -> None:
        self._handlers: dict[str, tuple[Handler, int, _Places]] = {}
        self._places = _Places(max_requests, max_requests_per_asker)
        self._places_apart = _Places(MAX_REQUESTS, MAX_REQUESTS_PER_ASKER)
        self.failure: BaseException | None = None  # the first bug in a handler
        self._failed = asyncio.Event()

    @property
    def num_under_way(self) -> int:
        """Requests that are handled now, without those apart."""
        return self._places.num_all

    def handle(self, name: str, handler: Handler, max_request_bytes: int, *, apart: bool = False) -> None:
        """Register a handler. Requests that are handled `apart`, the transport's own, take no place from the others."""
        if check_name(name) in self._handlers:
            raise ValueError(f"requests called {name!r} have a handler already")
        if not 0 <= max_request_bytes <= MAX_FRAME_BYTES:
            raise ValueError(
                f"max_request_bytes is {max_request_bytes}; the most that can be sent is {MAX_FRAME_BYTES}"
            )
        self._handlers[name] = (handler, max_request_bytes, self._places_apart if apart else self._places)

    @contextmanager
    def admit(self, asker: str, name: str, num_bytes: int) -> Iterator[None]:
        """Hold a place for a request of this size. Raises RequestRefused where it is not to be read."""
        handler = self._handlers.get(name)
        if handler is None:
            raise RequestRefused(UNKNOWN_NAME, f"no request is called {name[:32]}")
        if num_bytes > handler[1]:
            raise RequestRefused(TOO_LARGE, f"a {name} request has at most {handler[1]} bytes")
        places = handler[2]
        places.take(asker)
        try:
            yield
        finally:
            places.give_back(asker)

    async def answer(self, asker: str, name: str, payload: bytes) -> bytes:
        """Return the handler's response to an admitted request. Raises RequestRefused.

        A handler that raises anything else has a bug: the asker hears `handler_failed`, and `wait_failed` raises it.
        """
        try:
            return await self._call(asker, name, payload)
        except RequestRefused:
            raise
        except Exception as error:  # the boundary: recorded here, raised by `wait_failed`
            self.fail(error)
            raise RequestRefused(FAILED, "the handler has a bug") from error

    async def _call(self, asker: str, name: str, payload: bytes) -> bytes:
        try:
            response = await self._handlers[name][0](asker, payload)
        except RequestRefused as refusal:
            raise RequestRefused(check_name(refusal.code), refusal.detail[:_MAX_DETAIL_CHARACTERS]) from None
        if len(response) > MAX_FRAME_BYTES:
            raise ValueError(
                f"a response to {name} has {len(response)} bytes; the most that can be sent is {MAX_FRAME_BYTES}"
            )
        return response

    def fail(self, error: BaseException) -> None:
        """Record what kills the transport; the first one counts."""
        if self.failure is None:
            self.failure = error
            self._failed.set()

    async def wait_failed(self) -> None:
        """Return never; raise the first failure."""
        await self._failed.wait()
        assert self.failure is not None
        raise self.failure
