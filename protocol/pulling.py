"""Pull what the pool lacks, frame by frame, from whoever holds it; and give frames to whoever asks.

    demand     reserve (`demand`) - unused groups - frames under way; nothing is pulled beyond it
    pull       neighbours that hold the frame first, then the author, then other holders; each frame is checked
               against the announced digest before anything of it is decompressed; who sends wrong bytes pays, and
               the next holder is asked
    admit      `rescoring`'s queue → `admission` → pool, store, and on to `relay`

A frame that no holder gives is tried again later a few times, and then given up. A pull that takes long goes on, but
no longer counts: others are begun in its place, and its holder is asked last for a while, so that slow peers delay
nobody. What is worth pulling is `planning`'s to say.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from protocol.admission import Admission
from protocol.announcements import Announcements, LiveBatch
from protocol.demand import Demand
from protocol.gossip import Gossip
from protocol.limits import MAX_PULL_REQUEST_BYTES, MAX_PULL_RESPONSE_BYTES
from protocol.local import Local
from protocol.neighbours import Neighbours
from protocol.planning import num_known_frames, plan_pulls
from protocol.pool import MIN_AUTHORS_FOR_CAPS, Pool, PoolEntry
from protocol.quota import Quotas
from protocol.refusals import Reason, Refusal
from protocol.requests import (
    PullRequest,
    PullResponse,
    check_pull,
    decode_pull_request,
    decode_pull_response,
    encode_pull_request,
    encode_pull_response,
    max_pull_response_bytes,
)
from protocol.rescoring import RescoreJob, RescoreQueue
from protocol.store import FrameStore
from protocol.transport.base import RequestRefused, TransportError

__all__ = ["Pulling"]

MAX_HOLDERS_ASKED = 3  # for one frame at one time
MAX_FAILURES = 3  # times that all of them may fail
RETRY_S = 5.0  # until a batch is tried again
SLOW_S = 1.5  # after which a pull no longer counts
COUNT_AGAIN_S = 1.0  # how often authors with a record are counted
SLOW_FOR_S = 60.0  # how long its holder is asked last
MAX_SLOW_FACTOR = 8  # frames in slow pulls, for each group of the reserve: they may all come in the end
_SERVED_BURST_S = 8.0


@dataclass(eq=False, slots=True)
class _Pull:
    """Frames of one batch that are being asked for."""

    batch: LiveBatch
    wanted: set[int]
    holder: str = ""  # who is being asked
    counts: bool = True  # as demand that is being met, and as one of `num_pulls`
    num_slow: int = 0  # frames that were missing when it ceased to count


class Pulling:
    """One node's demand for groups, and its supply."""

    def __init__(
        self,
        local: Local,
        announcements: Announcements,
        store: FrameStore,
        pool: Pool,
        admission: Admission,
        neighbours: Neighbours,
        gossip: Gossip,
    ) -> None:
        self._local, self._announcements, self._store, self._pool = local, announcements, store, pool
        self._admission, self._neighbours, self._gossip = admission, neighbours, gossip
        config = local.config
        self.demand = Demand(config.reserve_groups)
        self.queue = RescoreQueue(config.max_rescore_queue, config.max_rescore_share)
        self._under_way = Counter[str]()  # frames by author: asked for, or being re-scored
        self._num_pulls = 0  # that count
        self._num_slow_frames = 0
        self._num_established, self._counted_at_s = 0, 0.0
        self._slow_until_s: dict[str, float] = {}  # by holder
        self._retries: list[tuple[float, LiveBatch, int]] = []  # (when, batch, frames)
        self._served = Quotas(config.max_served_bytes_per_s, config.max_served_bytes_per_s * _SERVED_BURST_S, 1024)
        self._hungry, self._work = asyncio.Event(), asyncio.Event()
        self._started = False
        self.bring: Callable[[str, PullRequest], Awaitable[None]] = _bring_nothing  # into the store, for an asker
        local.transport.handle("pull", self._handle_pull, max_request_bytes=MAX_PULL_REQUEST_BYTES)

    def start(self) -> None:
        """Start the background work; without it the node gives frames and pulls none."""
        self._started = True
        self._gossip.num_unknown, self._gossip.num_lacking = lambda: self.num_unknown, lambda: self.num_lacking
        self._gossip.on_news = self.wake
        self._gossip.is_wanted = lambda author: not self.newcomers_are_capped or not self.is_newcomer(author)
        self._local.tasks.spawn(self._pull_loop(), "pull")
        for number in range(self._local.config.num_rescore_workers):
            self._local.tasks.spawn(self._rescore_loop(), f"rescore {number}")

    def wake(self) -> None:
        """Look again whether something is lacking that can be had."""
        self._hungry.set()

    @property
    def num_under_way(self) -> int:
        """Frames that are asked for, wait for re-scoring, or are being re-scored."""
        return self._under_way.total()

    @property
    def reserve(self) -> int:
        """How many groups are to be ready, as things are."""
        return self.demand.reserve(self._local.clock())

    @property
    def num_lacking(self) -> int:
        """How many groups the reserve lacks."""
        return max(0, self.reserve - len(self._pool) - self.num_under_way)

    @property
    def num_unknown(self) -> int:
        """How many groups the reserve lacks of which no frame is known: what repair can bring."""
        lacking = self.num_lacking
        return lacking - num_known_frames(self._announcements, lacking) if lacking else 0

    @property
    def newcomers_are_capped(self) -> bool:
        """Whether enough authors have a record that those without one share a part."""
        now_s = self._local.clock()
        if now_s - self._counted_at_s >= COUNT_AGAIN_S:
            is_established = self._local.reputation.is_established
            self._num_established = sum(is_established(author, now_s) for author in self._announcements.authors)
            self._counted_at_s = now_s
        return self._num_established >= MIN_AUTHORS_FOR_CAPS

    def is_newcomer(self, author: str) -> bool:
        """Whether an author has no record of useful groups."""
        return not self._local.reputation.is_established(author, self._local.clock())

    def enqueue(self, job: RescoreJob) -> None:
        """Let a frame be re-scored, if there is room for it."""
        self._under_way[job.author] += 1
        if self.queue.put(job):
            self._work.set()
        else:
            self._local.refuse(Reason.QUOTA)
            self._done(job.author)

    async def _pull_loop(self) -> None:
        """Start pulls for what is lacking. Waits for `wake` or for a retry that is due; ends with the member."""
        while True:
            self._hungry.clear()
            self._reopen()
            free = self._local.config.num_pulls - self._num_pulls
            lacking = self.num_lacking
            if lacking and free > 0:
                for batch, numbers in self._plan(lacking)[:free]:
                    self._announcements.take(batch, _mask(numbers))
                    self._under_way[batch.author] += len(numbers)
                    self._num_pulls += 1
                    self._local.tasks.spawn(self._pull(_Pull(batch, set(numbers))), "pull one")
            timeout_s = max(0.0, self._retries[0][0] - self._local.clock()) if self._retries else None
            try:
                async with asyncio.timeout(timeout_s):
                    await self._hungry.wait()
            except TimeoutError:
                continue

    def _plan(self, lacking: int) -> list[tuple[LiveBatch, list[int]]]:
        config = self._local.config
        kept = self._pool.num_by_author()
        kept.update(self._under_way)
        plan = plan_pulls(
            self._announcements,
            num_frames=lacking,
            reserve=self.reserve,
            kept=kept,
            neighbours={node_id for node_id in self._neighbours.ids if not self._is_slow(node_id)},
            is_newcomer=self.is_newcomer if self.newcomers_are_capped else None,
            is_deferred=lambda author: self._admission.is_deferred(author) or self._is_slow(author),
            max_author_share=config.max_author_share,
            max_newcomer_share=config.max_newcomer_share,
            rng=self._local.rng,
        )
        return [(batch, _fitting(batch, numbers, config.max_pull_bytes)) for batch, numbers in plan]

    async def _pull(self, pull: _Pull) -> None:
        """Ask holders for frames of one batch, one holder after the other. Ends when all are here, or given up."""
        batch, wanted, asked = pull.batch, pull.wanted, set[str]()
        timer = asyncio.get_running_loop().call_later(SLOW_S, self._is_taking_long, pull)
        try:
            while wanted and len(asked) < MAX_HOLDERS_ASKED:
                holder = self._choose_holder(batch, wanted, asked)
                if holder is None:
                    break
                asked.add(holder)
                pull.holder = holder
                answer = await self.ask(holder, batch, sorted(wanted), self._local.config.pull_timeout_s)
                if answer is not None:
                    leaves, frames = answer
                    wanted.difference_update(frames)  # the set that the pull is counted by
                    for number, frame in frames.items():
                        if pull.counts:
                            self._under_way[batch.author] -= 1
                        self.enqueue(
                            RescoreJob(batch.author, batch.created_at_s, frame, leaves[number], batch, number, leaves)
                        )
        finally:
            timer.cancel()
            if pull.counts:
                self._release(pull)
            else:
                self._num_slow_frames -= pull.num_slow
        if wanted:
            self._fail(batch, wanted)
        self.wake()

    def _is_taking_long(self, pull: _Pull) -> None:
        """Begin others in its place, unless too much is slow already."""
        config = self._local.config
        if self._num_slow_frames + len(pull.wanted) > MAX_SLOW_FACTOR * max(self.reserve, config.num_pulls):
            return
        self._ask_last(pull.holder)
        self._release(pull)
        pull.counts = False
        pull.num_slow = len(pull.wanted)
        self._num_slow_frames += pull.num_slow
        self.wake()

    def _release(self, pull: _Pull) -> None:
        self._num_pulls -= 1
        self._under_way[pull.batch.author] -= len(pull.wanted)
        self._forget_nobody(pull.batch.author)

    def _ask_last(self, holder: str) -> None:
        now_s = self._local.clock()
        self._slow_until_s = {holder: s for holder, s in self._slow_until_s.items() if s > now_s}
        self._slow_until_s[holder] = now_s + SLOW_FOR_S

    def _is_slow(self, node_id: str) -> bool:
        return self._slow_until_s.get(node_id, 0.0) > self._local.clock()

    async def ask(
        self, holder: str, batch: LiveBatch, numbers: list[int], timeout_s: float
    ) -> tuple[tuple[bytes, ...], dict[int, bytes]] | None:
        """Ask one holder; return the digests of the batch and the frames that it gave, or None."""
        local = self._local
        request = PullRequest(batch.root, tuple(numbers))
        try:
            data = await local.transport.request(
                holder,
                "pull",
                encode_pull_request(request),
                max_response_bytes=min(MAX_PULL_RESPONSE_BYTES, max_pull_response_bytes(batch.announcement, numbers)),
                timeout_s=timeout_s,
            )
            response = decode_pull_response(data)
            frames = check_pull(batch.announcement, numbers, response)
        except Refusal as refusal:
            batch.holders.pop(holder, None)
            local.refuse(refusal.reason, blame=holder)
            return None
        except TransportError as error:
            local.counters.requests_failed += 1
            batch.holders.pop(holder, None)
            if not isinstance(error, RequestRefused):
                local.reputation.unresponsive(holder, local.clock())
                self._neighbours.failed(holder)
                if holder not in self._neighbours.ids:  # gone, or beyond a bridge
                    self._ask_last(holder)
            return None
        local.reputation.served(holder, local.clock())
        local.counters.frames_pulled += len(frames)
        self._gossip.appetite.pulled(batch.author, len(frames), local.clock())
        if holder in self._neighbours.ids:
            self._neighbours.heard(holder)
            local.counters.pulls_from_neighbours += 1
        else:
            local.counters.pulls_from_strangers += 1
        if len(frames) < len(numbers) and holder in batch.holders:
            batch.holders[holder] &= ~(_mask(numbers) & ~_mask(frames))
        return response.leaves, frames

    def _choose_holder(self, batch: LiveBatch, wanted: set[int], asked: set[str]) -> str | None:
        """A neighbour that says it holds a wanted frame, or else the author, or else anyone that says so."""
        local, mask = self._local, _mask(wanted)
        now_s = local.clock()
        holders = [
            holder
            for holder, held in batch.holders.items()
            if held & mask and holder not in asked and not local.reputation.is_banned(holder, now_s)
        ]
        near = [holder for holder in holders if holder in self._neighbours.ids]
        if batch.author in self._neighbours.ids and batch.author not in asked and batch.author not in near:
            near.append(batch.author)
        fast = [holder for holder in near if not self._is_slow(holder)]
        if fast:
            return local.rng.choice(fast)
        if batch.author not in asked and not self._is_slow(batch.author):
            return batch.author
        rest = [holder for holder in holders if not self._is_slow(holder)] or near or holders
        if rest:
            return local.rng.choice(rest)
        return batch.author if batch.author not in asked else None

    def _fail(self, batch: LiveBatch, wanted: set[int]) -> None:
        batch.num_failures += 1
        if batch.num_failures >= MAX_FAILURES or len(self._retries) >= self._local.config.max_live_batches:
            self._local.counters.frames_failed += len(wanted)
            batch.given_up |= _mask(wanted)
        else:
            self._retries.append((self._local.clock() + RETRY_S, batch, _mask(wanted)))

    def _reopen(self) -> None:
        now_s = self._local.clock()
        while self._retries and self._retries[0][0] <= now_s:
            _, batch, mask = self._retries.pop(0)
            self._announcements.give_back(batch, mask)

    async def _rescore_loop(self) -> None:
        """Re-score one group after the other. Waits for `enqueue`; ends with the member, or by the verifier's bug."""
        loop = asyncio.get_running_loop()
        while True:
            job = self.queue.get(loop.time())
            if job is None:
                self._work.clear()
                await self._work.wait()
                continue
            start_s = loop.time()
            entry = await self._admission.frame(job.author, job.created_at_s, job.frame, job.key)
            self.queue.spent(job.author, loop.time() - start_s, loop.time())
            if entry is not None:
                self._admit(job, entry)
            self._done(job.author)
            self.wake()

    def _admit(self, job: RescoreJob, entry: PoolEntry) -> None:
        local, batch, now_s = self._local, job.batch, self._local.clock()
        if not self._pool.add(entry):
            local.refuse(Reason.POOL_FULL)
            return
        counters = local.counters
        counters.groups_admitted += 1
        counters.latency_s.add(max(0.0, now_s - entry.created_at_s))
        counters.reward_of_admitted.add(sum(entry.rewards) / len(entry.rewards))
        local.reputation.useful(job.author, now_s)
        if batch is None or self._announcements.get(batch.root) is None:
            return  # it comes from the saved pool, or has expired meanwhile: nobody is to be told
        counters.batches_admitted += not self._store.mask(batch.root)
        self._store.add(batch.root, job.leaves, job.number, job.frame, batch.created_at_s + local.config.freshness_s)
        self._gossip.relay(batch)

    def _done(self, author: str) -> None:
        self._under_way[author] -= 1
        self._forget_nobody(author)

    def _forget_nobody(self, author: str) -> None:
        """Keep the counter as small as what is under way."""
        if self._under_way[author] <= 0:
            del self._under_way[author]

    async def _handle_pull(self, asker: str, payload: bytes) -> bytes:
        """Give frames that are held, as many as fit, to anyone who is not banned."""
        local, now_s = self._local, self._local.clock()
        if local.reputation.is_banned(asker, now_s):
            raise local.refuse_request(Reason.BANNED)
        try:
            request = decode_pull_request(payload)
        except Refusal as refusal:
            raise local.refuse_malformed(refusal, asker) from None
        await self.bring(asker, request)
        held = self._store.get(request.root)
        if held is None:
            raise local.refuse_request(Reason.NOT_HELD)
        frames, size = dict[int, bytes](), 0
        for number in request.numbers:
            frame = held.frames.get(number)
            if frame is not None and size + len(frame) <= local.config.max_pull_bytes:
                frames[number] = frame
                size += len(frame)
        if not self._served.take(asker, now_s, max(size, 1)):
            raise local.refuse_request(Reason.QUOTA, "more frames than one peer may have at a time; ask again later")
        local.counters.frames_served += len(frames)
        return encode_pull_response(PullResponse(held.digests, frames))


async def _bring_nothing(asker: str, request: PullRequest) -> None:
    """Give what is held."""


def _mask(numbers: Sequence[int] | set[int] | dict[int, bytes]) -> int:
    return sum(1 << number for number in numbers)


def _fitting(batch: LiveBatch, numbers: list[int], max_bytes: int) -> list[int]:
    """As many frames as one request may ask for, at least one."""
    fitting, size = list[int](), 0
    for number in numbers:
        size += batch.announcement.frame_sizes[number]
        if fitting and size > max_bytes:
            break
        fitting.append(number)
    return fitting
