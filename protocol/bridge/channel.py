"""What joins the two sides of a bridge: requests with a name and a payload, answered or refused, nothing else.

Both sides ask and answer. They are parts of one node, so neither has to prove who it is; caps are kept all the same,
since what passes was written by strangers. `pipe` carries it between two processes, and `memory_channels` within one.
"""

import asyncio
from abc import ABC, abstractmethod

from protocol.tasks import first_of
from protocol.transport.base import Handler, RequestTimedOut, ResponseTooLarge, TransportError
from protocol.transport.dispatch import Dispatcher

__all__ = ["FAR", "Channel", "ChannelBroken", "MemoryChannel", "memory_channels"]

FAR = "the other side of the bridge"  # who asks, in the place of a node id
MAX_REQUESTS = 128  # handled at one time, of each side
_DELAY_S = 0.001  # of a message in memory


class ChannelBroken(TransportError):
    """The other side is gone: the bridge cannot go on."""

    reason = "channel_broken"


class Channel(ABC):
    """One side's end."""

    def __init__(self) -> None:
        self._dispatcher = Dispatcher(max_requests=MAX_REQUESTS, max_requests_per_asker=MAX_REQUESTS)

    def handle(self, name: str, handler: Handler, *, max_request_bytes: int) -> None:
        """Answer requests called `name`. Called before `start`."""
        self._dispatcher.handle(name, handler, max_request_bytes)

    @abstractmethod
    async def start(self) -> None:
        """Answer from now on."""

    @abstractmethod
    async def request(self, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float) -> bytes:
        """Ask the other side; return its response. Raises a TransportError."""

    @abstractmethod
    async def close(self) -> None:
        """Hang up; requests under way fail with ChannelBroken. A second call does nothing."""

    @abstractmethod
    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug, or ChannelBroken once the other side is gone."""


class MemoryChannel(Channel):
    """An end within one process and one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._other: MemoryChannel | None = None
        self._is_closed = False
        self._broken = asyncio.Event()

    async def start(self) -> None:
        """Nothing is to be opened."""

    async def request(self, name: str, payload: bytes, *, max_response_bytes: int, timeout_s: float) -> bytes:
        """Let the other end answer."""
        other = self._other
        if other is None or other._is_closed or self._is_closed:
            raise ChannelBroken("the other side has hung up")
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.sleep(_DELAY_S)
                with other._dispatcher.admit(FAR, name, len(payload)):
                    response = await other._dispatcher.answer(FAR, name, payload)
                await asyncio.sleep(_DELAY_S)
        except TimeoutError:
            raise RequestTimedOut(f"no response within {timeout_s:g} s") from None
        if len(response) > max_response_bytes:
            raise ResponseTooLarge(f"{len(response)} bytes, over the cap of {max_response_bytes}")
        return response

    async def close(self) -> None:
        """Hang up."""
        self._is_closed = True
        if self._other is not None:
            self._other._broken.set()

    async def wait_failed(self) -> None:
        """Return never; raise a handler's bug, or ChannelBroken."""
        await first_of(self._dispatcher.wait_failed(), self._broken.wait())
        raise ChannelBroken("the other side has hung up")


def memory_channels() -> tuple[MemoryChannel, MemoryChannel]:
    """Return two ends of one channel."""
    one, other = MemoryChannel(), MemoryChannel()
    one._other, other._other = other, one
    return one, other
