"""The exchange of a node that has peers: own groups go to the swarm, groups of others come from its pool.

Member        protocol's part: who is there, gossip, admission, the pool
Rescorer      judges what comes in, in a thread of its own (`node.rescoring`)
shared_group  what goes out (`node.sharing`)
LearningValue what a group of the pool is worth to this policy, where groups are drawn by that
Connection    says when the node finds itself alone, and when no longer (`node.connection`)
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final

from node.connection import Connection
from node.exchange import Exchange
from node.sharing import authors_of, shared_group
from protocol.about import NodeAbout
from protocol.admission import Rescore, Rescored
from protocol.member import Member
from protocol.messages import SharedGroup
from protocol.pool import PoolEntry
from swarm.config import SapoConfig
from swarm.learning_value import LearningValue
from swarm.types import RolloutGroup

if TYPE_CHECKING:
    from node.parts import Parts
    from node.rescoring import Rescorer

__all__ = ["MakeMember", "SwarmExchange"]

_WATCH_INTERVAL_S: Final = 0.5
_PUBLISH_INTERVAL_S: Final = 1.0  # rounds that are shorter share a batch: a signature and an announcement for all

MakeMember = Callable[[Rescore, Callable[[], NodeAbout]], Awaitable[Member]]


class SwarmExchange(Exchange):
    """Publishes, samples, counts. `make_member` is called once, by `start`."""

    def __init__(
        self,
        make_member: MakeMember,
        build_rescorer: "Callable[[Parts], Rescorer]",
        config: SapoConfig,
        about: NodeAbout,
        *,
        note: Callable[[str], None],
        on_started: Callable[[Member], None],
        watch_interval_s: float = _WATCH_INTERVAL_S,
    ) -> None:
        """`note` is given lines for the user; `on_started` is called once the node listens.

        `watch_interval_s` says how often it is looked whether the node is alone, and whether something is to be sent.
        """
        self._make_member, self._build_rescorer = make_member, build_rescorer
        self._config, self._about, self._note, self._on_started = config, about, note, on_started
        self._watch_interval_s = watch_interval_s
        self._value = LearningValue(config.uniform_share) if config.sampling == "value" else None
        self._member: Member | None = None
        self._is_started = False
        self._rescorer: Rescorer | None = None
        self._can_rescore = asyncio.Event()
        self._unsent: list[tuple[SharedGroup, frozenset[int]]] = []  # with the versions that wrote it
        self._sent_at_s = 0.0  # on the loop's clock
        self._counted = {"groups_admitted": 0, "bytes_in": 0, "bytes_out": 0}
        self._refused: dict[str, int] = {}
        self._has_failed = asyncio.Event()
        self._error: BaseException | None = None  # of the first background task that has died
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Listen, and join in the background. What is pulled waits in the member's queue until `attach`."""
        self._member = await self._make_member(self._rescore, self.about)
        await self._member.start()
        self._is_started = True
        self._on_started(self._member)
        self._spawn(self._member.wait_failed())
        self._spawn(self._watch(self._member))

    def attach(self, parts: "Parts") -> None:
        """Let what waits be judged, with the tokenizer and the tasks of these parts."""
        self._rescorer = self._build_rescorer(parts)
        self._can_rescore.set()

    async def wait_ready(self) -> None:
        """Wait for the scoring process: it starts while the policy is evaluated for the first time."""
        if self._rescorer is not None:
            await self._rescorer.wait_ready()

    async def _rescore(self, group: SharedGroup) -> Rescored:
        await self._can_rescore.wait()
        assert self._rescorer is not None
        return await self._rescorer(group)

    async def wait_failed(self) -> None:
        """Return never; raise what has killed a background task of the member or of this object."""
        await self._has_failed.wait()
        assert self._error is not None
        raise self._error

    async def publish(self, groups: Sequence[RolloutGroup]) -> None:
        """Offer own groups, as far as `sapo.publish` wants; those of rounds in quick succession together."""
        if self._value is not None:
            self._value.observe_own(groups)
        if self._config.publish == "none" or self._member is None:
            return
        for group in groups:
            if (shared := shared_group(group, self._config)) is not None:
                self._unsent.append((shared, authors_of(group)))
        await self._send_if_due(self._member)

    async def sample(self, num_groups: int) -> list[RolloutGroup]:
        """Return groups of others that are there now, as this node's own tokenizer and verifier see them."""
        return self._drawn(num_groups)

    async def fill(self, num_groups: int) -> list[RolloutGroup]:
        """Return more of them, and leave those that the next round begins with."""
        return self._drawn(num_groups, num_left=self._config.num_external)

    def _drawn(self, num_groups: int, *, num_left: int = 0) -> list[RolloutGroup]:
        if self._member is None or num_groups == 0:
            return []
        groups: list[RolloutGroup] = []
        weight = None if self._value is None else self._weight
        for external in self._member.sample(num_groups, num_left=num_left, weight=weight):
            assert isinstance(external.payload, RolloutGroup)
            groups.append(external.payload)
            if self._value is not None:
                self._value.observe_drawn(external.author, external.group.task, external.rewards)
        return groups

    def _weight(self, entry: PoolEntry) -> float:
        assert self._value is not None
        return self._value.weight(entry.author, entry.group.task, entry.rewards)

    def describe_round(self) -> dict[str, Any]:
        """Return the counts since the last call."""
        status = self.status()
        if status is None:
            return {"num_admitted": 0, "num_refused": {}, "bytes_in": 0, "bytes_out": 0, "num_peers": 0}
        grown = {name: status[name] - count for name, count in self._counted.items()}
        refused = {name: count - self._refused.get(name, 0) for name, count in status["refusals"].items()}
        self._counted = {name: status[name] for name in self._counted}
        self._refused = dict(status["refusals"])
        return {
            "num_admitted": grown["groups_admitted"],
            "num_refused": {name: count for name, count in refused.items() if count},
            "bytes_in": grown["bytes_in"],
            "bytes_out": grown["bytes_out"],
            "num_peers": status["num_peers"],
        }

    def status(self) -> dict[str, Any] | None:
        """Return the member's status; None before it listens."""
        return self._member.status() if self._member is not None and self._is_started else None

    def about(self) -> NodeAbout:
        """What the node says of itself to others, with its rollouts per minute as they are now."""
        rate = 0 if self._member is None else self._member.rollouts_per_minute
        return NodeAbout(self._about.role, self._about.software, self._about.model, self._about.tasks, rate)

    async def close(self) -> None:
        """Leave the swarm, then end the scoring of what others wrote."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            if self._member is not None:
                await self._member.close()
        finally:
            if self._rescorer is not None:
                await self._rescorer.close()

    async def _send_if_due(self, member: Member) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._unsent and now_s - self._sent_at_s >= _PUBLISH_INTERVAL_S:
            unsent, self._unsent, self._sent_at_s = self._unsent, [], now_s
            await member.publish([group for group, _ in unsent], [authors for _, authors in unsent])

    async def _watch(self, member: Member) -> None:
        """Say when the node finds itself alone, and when no longer; send what waits. Ends by being cancelled."""
        loop, status = asyncio.get_running_loop(), member.status()
        connection = Connection(len(status["given_peers"]), status["num_known_nodes"], loop.time())
        while True:
            await self._send_if_due(member)
            status = member.status()
            reasons = dict.fromkeys(status["given_peers"].values())
            line = connection.update(status["num_peers"], loop.time(), "; ".join(reasons))
            if line is not None:
                self._note(line)
            await asyncio.sleep(self._watch_interval_s)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and self._error is None:
            self._error = error
            self._has_failed.set()
