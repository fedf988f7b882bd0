"""One node's membership in a swarm: what the process sees of the network.

    publish    own groups become a signed batch, announced to a few neighbours        (gossip)
    sample     unused groups of others, as this node's verifier scored them           (pool)
    status     everything that is known about the above, as plain data

    neighbours ◀─ directory ◀─ upkeep (DHT shards, peer exchange, disk)
    gossip ─▶ announcements ─▶ pulling ─▶ admission (re-scoring by the node) ─▶ pool
                                  └─▶ store ─▶ whoever asks

Nothing here waits for a peer: without any, `sample` returns nothing, and the node goes on alone.
"""

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.about import NodeAbout
from protocol.admission import Admission, Rescore, Rescored
from protocol.announcements import Announcements
from protocol.clock import Clock
from protocol.clocks import ClockOffsets
from protocol.config import SwarmConfig
from protocol.demand import MAX_RESERVE_FACTOR
from protocol.digests import leaf_of
from protocol.directory import REMEMBERED, Directory
from protocol.gossip import Gossip
from protocol.identity import Identity
from protocol.limits import MAX_BATCH_BYTES, MAX_FRAMES
from protocol.local import Local
from protocol.messages import SharedGroup
from protocol.neighbours import Neighbour, Neighbours
from protocol.own_record import OwnRecord
from protocol.pool import Pool, Weight
from protocol.pulling import Pulling
from protocol.refusals import Refusal
from protocol.reputation import Reputation
from protocol.rescoring import RescoreJob
from protocol.saved_state import read_state, write_state
from protocol.shards import Shards
from protocol.signing import sign_announcement, verify_node_record
from protocol.status import status_of
from protocol.store import FrameStore
from protocol.tasks import first_of
from protocol.transport.base import Transport
from protocol.upkeep import Upkeep
from protocol.wire import decode_node_record, encode_frame

__all__ = ["ExternalGroup", "Member", "NodeAbout", "Rescore", "Rescored"]

MIN_POOL_GROUPS = 16
RATE_S = 300.0  # over which the rate of published completions is taken
NEWS_S = 1.0  # after a link, within which others that come are saved with it


@dataclass(frozen=True, slots=True)
class ExternalGroup:
    """A group of another author, to train on once."""

    author: str  # node id
    group: SharedGroup
    rewards: tuple[float, ...]  # of its first completions, by this node's verifier; of all, unless there are very many
    payload: object  # what the node's `Rescore` gave
    age_s: float  # since its author created the batch


class Member:
    """A node of a swarm. Made, started, and closed once."""

    def __init__(
        self,
        identity: Identity,
        transport: Transport,
        config: SwarmConfig,
        *,
        rescore: Rescore | None,
        about: Callable[[], NodeAbout],
        state_path: Path | None,
        clock: Clock,
        rng: random.Random,
        store: FrameStore | None = None,
    ) -> None:
        """`rescore` None makes a node that routes and relays, and neither pulls nor publishes: a bootstrap.

        The transport is not started yet; its validator is `shards.record_validator`'s. The member starts and closes it.
        `store` is what frames are given from, where that is more than a store: a side of a bridge.
        """
        reputation = Reputation(
            half_life_s=config.half_life_s,
            min_score=config.min_reputation,
            ban_s=config.ban_s,
            min_useful=config.min_useful_groups,
            probation_s=config.probation_s,
        )
        self.config, self._state_path, self._scores = config, state_path, rescore is not None
        self.local = local = Local(identity, transport, config, clock, rng, reputation, identity.node_id)
        self.directory = Directory(max_nodes=config.max_known_nodes, own_id=identity.node_id, rng=rng)
        self.clocks = ClockOffsets()
        self._own_record = OwnRecord(identity, transport, config.swarm_id, about, clock)
        self.neighbours = Neighbours(local, self.directory, self.clocks, self._own_record)
        self.announcements = Announcements(
            max_batches=config.max_live_batches,
            max_batches_per_author=config.max_batches_per_author,
            freshness_s=config.freshness_s,
        )
        local.on_ban.append(self.announcements.forget_author)
        self.store = store if store is not None else FrameStore(config.max_store_bytes)
        self.pool = Pool(
            max_groups=max(MIN_POOL_GROUPS, MAX_RESERVE_FACTOR * config.reserve_groups),
            max_author_share=config.max_author_share,
            max_newcomer_share=config.max_newcomer_share,
            freshness_s=config.freshness_s,
            rng=rng,
        )
        self.admission = Admission(local, self.announcements, rescore)
        self.gossip = Gossip(
            local, self.announcements, self.store, self.admission, self.neighbours, relays_unscored=rescore is None
        )
        self.pulling = Pulling(
            local, self.announcements, self.store, self.pool, self.admission, self.neighbours, self.gossip
        )
        shards = Shards(transport, config.swarm_id, timeout_s=config.request_timeout_s, rng=rng)
        self.upkeep = Upkeep(
            local, self.directory, shards, self.neighbours, self._own_record, self.announcements, self.store, self.pool
        )
        self._sequence = 0
        self._published: deque[tuple[float, int]] = deque(maxlen=4096)  # (when, completions)
        self._saving: asyncio.Future[None] | None = None  # the last write that the thread was given
        self._num_links_saved, self._save_soon = 0, asyncio.Event()
        self.neighbours.on_link.append(self._note_link)
        self._closed = False

    @property
    def node_id(self) -> str:
        """The node's own id."""
        return self.local.node_id

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others reach this node; known after `start`."""
        return self.local.transport.addresses

    async def start(self) -> None:
        """Listen, and join in the background. Raises TransportError or SavedStateError, whose messages name the fix."""
        self._restore()
        await self.local.transport.start()
        if self._state_path is not None:  # whoever is killed before the next save must not begin with the same number
            write_state(self._state_path, self.config.swarm_id, self._state(closed=False))
        self.neighbours.start()
        self.gossip.start()
        self.upkeep.start()
        if self._scores:
            self.pulling.start()
        if self._state_path is not None:
            self.local.tasks.spawn(self._save_loop(self._state_path), "save")

    async def close(self) -> None:
        """Leave: background work ends, state is saved, the transport closes. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        await self.local.tasks.close()
        if self._saving is not None:  # a thread cannot be cancelled, and two may not write one file
            await asyncio.wait([self._saving])
        try:
            if self._state_path is not None:
                write_state(self._state_path, self.config.swarm_id, self._state(closed=True))
        finally:
            await self.local.transport.close()

    async def wait_failed(self) -> None:
        """Return never; raise what has killed a background task or the transport."""
        await first_of(self.local.tasks.wait_failed(), self.local.transport.wait_failed())

    async def publish(self, groups: Sequence[SharedGroup], authors: Sequence[Collection[int]] | None = None) -> None:
        """Offer own groups to the swarm. A group over a limit of the protocol is left out, and counted as refused.

        authors: for each group the versions of this node's policy that wrote it; None: not said.
        """
        frames: list[bytes] = []
        versions: set[int] = set()
        for group, wrote_it in zip(groups, authors or [()] * len(groups), strict=True):
            try:
                frame = encode_frame(group)
            except Refusal as refusal:
                self.local.refuse(refusal.reason)
                continue
            self.admission.note_own(group)
            self._count_published(len(group.completions))
            if len(frames) == MAX_FRAMES or sum(map(len, frames)) + len(frame) > MAX_BATCH_BYTES:
                self._publish(frames, versions)
                frames, versions = [], set()
            frames.append(frame)
            versions.update(wrote_it)
            await asyncio.sleep(0)  # compressing takes milliseconds, and others have requests to answer
        if frames:
            self._publish(frames, versions)

    def _publish(self, frames: list[bytes], policy_versions: Collection[int]) -> None:
        local, now_s = self.local, self.local.clock()
        # A number that grows with time needs no write to disk for each batch to survive a crash.
        self._sequence = max(self._sequence + 1, int(now_s * 1000))
        announcement = sign_announcement(
            local.identity,
            self.config.swarm_id,
            sequence=self._sequence,
            created_at_ms=int(now_s * 1000),
            frames=frames,
            policy_versions=policy_versions,
        )
        batch = self.announcements.add(announcement, local.node_id, now_s)
        self.announcements.take(batch, batch.all_frames)
        leaves = [leaf_of(frame) for frame in frames]
        self.store.add_own(announcement.root, leaves, frames, now_s + self.config.freshness_s)
        local.counters.batches_published += 1
        local.counters.groups_published += len(frames)
        self.gossip.announce(batch)

    def sample(self, num_groups: int, *, num_left: int = 0, weight: Weight | None = None) -> list[ExternalGroup]:
        """Draw unused groups by SAPO's rule; fewer than asked for where fewer are there. Waits for nothing.

        With `num_left` so many stay for the next time, and what is lacking beside them is not missing.
        `weight` says how likely a group is to be drawn, relative to others; None: all alike.
        """
        local, now_s = self.local, self.local.clock()
        self.pulling.demand.asked(num_groups, now_s)
        is_newcomer = self.pulling.is_newcomer if self.pulling.newcomers_are_capped else None
        num_drawn = min(num_groups, max(0, len(self.pool) - num_left)) if num_left else num_groups
        drawn = self.pool.sample(num_drawn, now_s, is_newcomer=is_newcomer, weight=weight)
        for entry in drawn:
            local.counters.age_of_sampled_s.add(now_s - entry.created_at_s)
            local.counters.authors_sampled.append(entry.author)
        local.counters.groups_sampled += len(drawn)
        local.counters.groups_missing += num_drawn - len(drawn)
        self.pulling.wake()
        return [ExternalGroup(e.author, e.group, e.rewards, e.payload, now_s - e.created_at_s) for e in drawn]

    @property
    def rollouts_per_minute(self) -> int:
        """Completions published in the last five minutes, per minute."""
        now_s = self.local.clock()
        return round(60 * sum(num for at_s, num in self._published if now_s - at_s <= RATE_S) / RATE_S)

    def _count_published(self, num_completions: int) -> None:
        now_s = self.local.clock()
        self._published.append((now_s, num_completions))
        while self._published[0][0] < now_s - RATE_S:
            self._published.popleft()

    def status(self) -> dict[str, Any]:
        """Everything that statistics show, as plain data with a schema version."""
        return status_of(self)

    async def _save_loop(self, path: Path) -> None:
        """Save what is remembered. Waits for its turn; ends with the member, or where the file cannot be written."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.save_s):
                    await self._save_soon.wait()
                    await asyncio.sleep(NEWS_S)
            self._save_soon.clear()
            self._num_links_saved = len(self.neighbours.ids)
            write = asyncio.to_thread(write_state, path, self.config.swarm_id, self._state(closed=False))
            self._saving = asyncio.ensure_future(write)
            await asyncio.shield(self._saving)

    def _note_link(self, _: Neighbour) -> None:
        """Have the first peers saved at once: a node that is killed before must not come back to wait for theirs."""
        if self._num_links_saved < self.config.num_outbound:
            self._save_soon.set()

    def _state(self, *, closed: bool) -> dict[str, Any]:
        return {
            "closed": closed,
            "sequence": self._sequence,
            "peers": [r.encoded for r in self.directory.worth_remembering(self.config.max_remembered_peers)],
            "reputation": self.local.reputation.state(),
            "authors": self.announcements.state(),
            "seen": self.admission.seen(),
            "pool": [[entry.author, entry.created_at_s, entry.frame] for entry in self.pool.entries()],
        }

    def _restore(self) -> None:
        state = read_state(self._state_path, self.config.swarm_id) if self._state_path is not None else None
        if state is None:
            return
        now_s = self.local.clock()
        # Whatever was published after the last save has a smaller number than this, also if the clock went back.
        self._sequence = state["sequence"] + int(2000 * self.config.save_s)
        self.local.reputation.restore(state["reputation"])
        self.announcements.restore(state["authors"])
        self.admission.restore_seen(state["seen"])
        for encoded in state["peers"]:
            record = decode_node_record(encoded)
            verify_node_record(self.config.swarm_id, record)
            self.directory.add(record, REMEMBERED, now_s)
        # After a crash nobody knows which of the saved groups were used since: none is used again.
        for author, created_at_s, frame in state["pool"] if self._scores and state["closed"] else ():
            self.admission.allow_again(frame)
            self.pulling.enqueue(RescoreJob(author, created_at_s, frame, leaf_of(frame)))
