"""Bring frames of this side's network for the other side of a bridge, when one is asked for.

Bridges may form rings, and each offers what others offered to it. So that no request runs in a circle, a frame is
asked for only from the author and from those who offered it before this bridge first offered it to anybody: along any
chain of such requests the first offer was made ever earlier, back to the author's. Where none of them gives it, those
who offered it later are asked too; while that goes on nobody else is kept waiting for the same frame, which is what
would close a circle.

A frame is brought once at one time, however many ask. It is checked like any pulled frame (the announced digest, then
whether it is a group at all); what its verifier says is for nodes that have one.
"""

import asyncio
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from protocol.admission import Admission
from protocol.announcements import LiveBatch
from protocol.bridge.store import BridgeStore
from protocol.local import Local
from protocol.neighbours import Neighbours
from protocol.pulling import Pulling

__all__ = ["Fetching", "Sources"]

ASK_S = 3.0  # for one holder
ASK_SLOW_S = 0.5  # for one that has let that time pass lately: it is asked last
SLOW_FOR_S = 60.0
BRING_S = 8.0  # for all of them: a node waits ten seconds for a pull
MAX_FLIGHTS = 256  # frames that are being brought at one time
MAX_HOLDERS_ASKED = 3  # of those that may be, and of the others


@dataclass(slots=True)
class Sources:
    """Who may be asked for the frames of a batch that this network has."""

    holders: dict[str, int] = field(default_factory=dict)  # node id -> frames as bits, each from before it was offered
    offered: int = 0  # frames that the other side has been told of, as bits
    refused: int = 0  # of these, frames that are no groups


@dataclass(eq=False, slots=True)
class _Flight:
    """A frame, or some of one batch, on its way."""

    landed: asyncio.Event = field(default_factory=asyncio.Event)
    is_late: bool = False  # asked of those who offered it after this bridge had


class Fetching:
    """One side's errands for the other."""

    def __init__(
        self, local: Local, store: BridgeStore, admission: Admission, pulling: Pulling, neighbours: Neighbours
    ) -> None:
        self._local, self._store, self._admission = local, store, admission
        self._pulling, self._neighbours = pulling, neighbours
        self._slow_until_s: dict[str, float] = {}  # by holder
        self._flights: dict[tuple[bytes, int], _Flight] = {}
        self.num_fetched = self.num_missed = 0  # frames

    async def bring(self, batch: LiveBatch, sources: Sources, numbers: Collection[int]) -> None:
        """Have these frames in the store, as far as somebody gives them in time."""
        held, waits, new = self._store.held(batch.root), set[_Flight](), set[int]()
        for number in numbers:
            flight = self._flights.get((batch.root, number))
            if flight is None and not (held | sources.refused) >> number & 1:
                new.add(number)
            elif flight is not None and not flight.is_late:
                waits.add(flight)
        if new and len(self._flights) + len(new) <= MAX_FLIGHTS:
            flight = _Flight()
            self._flights |= {(batch.root, number): flight for number in new}
            self._local.tasks.spawn(self._fly(flight, batch, sources, new), "fetch")
            waits.add(flight)
        try:
            async with asyncio.timeout(BRING_S):
                for flight in waits:
                    await flight.landed.wait()
        except TimeoutError:
            return  # what has come is in the store

    async def _fly(self, flight: _Flight, batch: LiveBatch, sources: Sources, numbers: set[int]) -> None:
        """Ask one holder after the other. Ends when all is here, or nobody is left."""
        wanted, asked = set(numbers), set[str]()
        try:
            await self._ask_some(batch, sources, sources.holders, wanted, asked)
            flight.is_late = True
            await self._ask_some(batch, sources, batch.holders | {batch.author: batch.all_frames}, wanted, asked)
        finally:
            for number in numbers:
                del self._flights[batch.root, number]
            flight.landed.set()
            self.num_missed += len(wanted)

    async def _ask_some(
        self, batch: LiveBatch, sources: Sources, holders: dict[str, int], wanted: set[int], asked: set[str]
    ) -> None:
        for holder in self._in_turn(batch, holders, wanted, asked):
            answer = await self._ask(holder, batch, sorted(wanted))
            if answer is None:
                continue
            leaves, frames = answer
            expires_at_s = batch.created_at_s + self._local.config.freshness_s
            for number, frame in frames.items():
                wanted.discard(number)
                if self._admission.is_well_formed(batch.author, frame):
                    self._store.add(batch.root, leaves, number, frame, expires_at_s)
                    self.num_fetched += 1
                else:
                    sources.refused |= 1 << number

    async def _ask(
        self, holder: str, batch: LiveBatch, numbers: list[int]
    ) -> tuple[tuple[bytes, ...], dict[int, bytes]] | None:
        """Ask one holder, for as long as it has earned; return what `Pulling.ask` does."""
        patience_s, loop = ASK_SLOW_S if self._is_slow(holder) else ASK_S, asyncio.get_running_loop()
        began_s = loop.time()
        answer = await self._pulling.ask(holder, batch, numbers, patience_s)
        if answer is None and loop.time() - began_s >= patience_s:
            now_s = self._local.clock()
            self._slow_until_s = {holder: until_s for holder, until_s in self._slow_until_s.items() if until_s > now_s}
            self._slow_until_s[holder] = now_s + SLOW_FOR_S
        return answer

    def _is_slow(self, holder: str) -> bool:
        return self._slow_until_s.get(holder, 0.0) > self._local.clock()

    def _in_turn(self, batch: LiveBatch, holders: dict[str, int], wanted: set[int], asked: set[str]) -> Iterator[str]:
        """Yield whom to ask next for what is still wanted: neighbours first, those that are slow last."""
        local, near = self._local, self._neighbours.ids
        for holder in sorted(holders, key=lambda holder: (self._is_slow(holder), holder not in near))[
            : MAX_HOLDERS_ASKED + len(asked)
        ]:
            mask = sum(1 << number for number in wanted)
            if not holders[holder] & mask or holder in asked or local.reputation.is_banned(holder, local.clock()):
                continue
            asked.add(holder)
            yield holder
