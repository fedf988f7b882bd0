"""Active partial rollouts (APRIL, arXiv 2509.18521) over the engine contract: more groups in flight than a round needs.

A run ends when its groups are whole; what else is in flight is aborted with its tokens, and goes on in the next run
from its token ids with the budget that is left. Nothing is thrown away but what a new policy would not have written.

    order       "submission"  a run returns the groups that were asked first; later ones are written ahead, in
                              the slots that the tail of these leaves idle. A batch is then the batch of a synchronous
                              run, so its lengths have that distribution over any window.
                "arrival"     a run returns the groups that are whole first (the paper's). Short groups enter
                              training early and long ones late; the age cap bounds how late.
    recycling   "verify"      what an older policy wrote is a draft for the new one (`Request.draft`): a returned
                              group is what the new policy writes from the start with the same noise.
                "keep"        it is kept as it is, with its log-probabilities and versions; the trainer corrects.

Departures from the paper: the unit is counted once and never dropped, also where groups become whole in the step
that ends the run; a group has an age cap, at which a run waits for it; the order of submission is the default.
What a group asks, and how many are in flight, is the collector's.
"""

from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from swarm.engine.base import Engine, Request, SamplingParams
from swarm.rollout.groups import Group, GroupKey, Member
from swarm.types import Completion

__all__ = ["GroupScheduler", "Order", "RunCounts"]

Order: TypeAlias = Literal["submission", "arrival"]


@dataclass(frozen=True, slots=True)
class RunCounts:
    """What one run did. A function of the requests and the weights, not of the machine."""

    num_steps: int = 0
    num_slot_steps: int = 0  # busy slots, summed over steps
    num_tokens_generated: int = 0
    num_tokens_resumed: int = 0  # written in earlier runs and given back to the engine, so prefilled
    num_prompt_tokens_resumed: int = 0  # of prompts that earlier runs had prefilled, each once
    num_tokens_cut: int = 0  # of the resumed ones, tokens that the new policy does not write
    num_drafts_cut: int = 0  # completions that these were of
    num_groups_in_flight: int = 0  # at the beginning
    num_groups_recycled: int = 0  # returned ones that an earlier run had begun
    num_tokens_recycled: int = 0  # that these had when the run began


class GroupScheduler:
    """Holds groups until they are whole. Owns every request of the engine while it runs, and none in between."""

    def __init__(self, engine: Engine, *, order: Order, max_age: int, verifies: bool) -> None:
        """max_age: runs or policy versions after which a run does not end without a group.

        verifies: whether what older policies wrote is verified by the engine, or kept.
        """
        if verifies and not engine.verifies_drafts:
            raise ValueError("this engine cannot verify drafts: what older policies wrote has to be kept")
        self._engine, self._order, self._max_age, self._verifies = engine, order, max_age, verifies
        self._groups: dict[GroupKey, Group] = {}
        self._queue: deque[tuple[Group, Member]] = deque()  # to be given to the engine when it has a slot for them
        self._asked: dict[int, tuple[Group, Member]] = {}  # by request id, what the engine holds
        self._held: set[int] = set()  # the members of both
        self._num_held: Counter[GroupKey] = Counter()  # of each group
        self._next_request_id = 0
        self._num_finished = 0
        self._num_resumed = 0  # tokens that this run has given back to the engine
        self._resumed: set[GroupKey] = set()  # groups that these are of
        self._num_drafts_cut = 0
        self._version = 0

    def __len__(self) -> int:
        """Groups that have been submitted and not returned."""
        return len(self._groups)

    def __contains__(self, key: GroupKey) -> bool:
        """Whether a group has been submitted and not returned."""
        return key in self._groups

    @property
    def groups(self) -> list[Group]:
        """The groups that have been submitted and not returned, oldest first."""
        return [self._groups[key] for key in sorted(self._groups)]

    def submit(
        self, key: GroupKey, prompt_ids: tuple[int, ...], seeds: Sequence[int], sampling: SamplingParams
    ) -> None:
        """Take a group. It is begun in the next run."""
        if key in self._groups:
            raise ValueError(f"group {key} has been submitted already")
        members = [Member(seed) for seed in seeds]
        self._groups[key] = Group(key, prompt_ids, sampling, members, self._engine.policy_version)

    def run(self, num_groups: int) -> tuple[list[Group], RunCounts]:
        """Write until `num_groups` groups are whole; return them, oldest first. The rest is held.

        Raises ValueError where fewer have been submitted.
        """
        if num_groups > len(self._groups):
            raise ValueError(f"{num_groups} groups are to be returned, {len(self._groups)} have been submitted")
        self._version = self._engine.policy_version
        before, had = replace(self._engine.stats), {key: group.num_tokens for key, group in self._groups.items()}
        due = {group.key for group in self._due(num_groups)}
        for group in self._groups.values():
            group.finished_as = group.finished_as if self._is_whole(group) else 0
        self._num_resumed, self._num_drafts_cut, num_in_flight = 0, 0, len(self._groups)
        self._resumed.clear()
        prompts = {key: len(group.prompt_ids) for key, group in self._groups.items()}
        self._write(due, num_groups)
        for completion in self._engine.abort():
            self._take(completion)
        returned = self._return(due, num_groups)
        for group in self._groups.values():
            group.num_runs += 1
        stats, recycled = self._engine.stats, [group for group in returned if had[group.key]]
        num_cut_before = before.num_draft_tokens - before.num_draft_tokens_kept
        return returned, RunCounts(
            num_steps=stats.num_steps - before.num_steps,
            num_slot_steps=stats.num_slot_steps - before.num_slot_steps,
            num_tokens_generated=stats.num_tokens_generated - before.num_tokens_generated,
            num_tokens_resumed=self._num_resumed,
            num_prompt_tokens_resumed=sum(prompts[key] for key in self._resumed),
            num_tokens_cut=stats.num_draft_tokens - stats.num_draft_tokens_kept - num_cut_before,
            num_drafts_cut=self._num_drafts_cut,
            num_groups_in_flight=num_in_flight,
            num_groups_recycled=len(recycled),
            num_tokens_recycled=sum(had[group.key] for group in recycled),
        )

    def _write(self, due: Collection[GroupKey], num_groups: int) -> None:
        """Let the engine write, what is due first, until there is enough. It gets what it has slots for, and no more:
        most of what is written ahead waits for rounds, and costs nothing meanwhile.
        """
        self._queue.clear()
        self._asked.clear()
        self._held.clear()
        self._num_held.clear()
        num_wanted = num_groups if self._order == "arrival" else 0
        missing = {group.key for group in self._groups.values() if not self._arrived(group)}
        if missing.isdisjoint(due) and len(self._groups) - len(missing) >= num_wanted:
            return
        for group in sorted(self.groups, key=lambda one: (one.key not in due, one.key[0], -one.expected_remaining())):
            self._enqueue(group, is_due=group.key in due)
        while not missing.isdisjoint(due) or len(self._groups) - len(missing) < num_wanted:
            self._fill_slots()
            if not self._engine.num_unfinished:
                raise RuntimeError("the engine has nothing left to write, and groups are not whole")
            for completion in self._engine.step():
                group = self._take(completion)
                if self._num_held[group.key]:
                    continue
                if self._arrived(group):
                    missing.discard(group.key)
                else:
                    self._enqueue(group, is_due=group.key in due)

    def state(self) -> list[dict[str, Any]]:
        """Return the groups in flight as plain data, for the disk."""
        return [group.to_plain() for group in self.groups]

    def load_state(self, plain: Sequence[dict[str, Any]], sampling: SamplingParams) -> None:
        """Hold the groups of `state` again, and no others."""
        groups = [Group.from_plain(one, sampling) for one in plain]
        self._groups = {group.key: group for group in groups}
        self._num_finished = max((group.finished_as for group in groups), default=0)

    def _due(self, num_groups: int) -> list[Group]:
        """Return the groups without which the run does not end, oldest first."""
        if self._order == "submission":
            return self.groups[:num_groups]
        late = [one for one in self.groups if one.finished_as or one.age(self._version) >= self._max_age]
        return late[:num_groups]

    def _is_whole(self, group: Group) -> bool:
        """Whether a group can be returned."""
        return all(member.is_finished and not self._is_stale(member) for member in group.members)

    def _arrived(self, group: Group) -> bool:
        """Whether a group can be returned; the first time, it gets its place in the order of arrival."""
        if not group.finished_as and self._is_whole(group):
            self._num_finished += 1
            group.finished_as = self._num_finished
        return bool(group.finished_as)

    def _return(self, due: Collection[GroupKey], num_groups: int) -> list[Group]:
        """Take out the groups that are due, and those that were whole first."""
        whole = [group for group in self._groups.values() if group.finished_as]
        whole.sort(key=lambda group: (group.key not in due, group.finished_as))
        chosen = sorted(whole[:num_groups], key=lambda group: group.key)
        for group in chosen:
            del self._groups[group.key]
        return chosen

    def _enqueue(self, group: Group, *, is_due: bool) -> None:
        """Queue the members that have to be written or verified now and are not on their way.

        Finished members that an older policy wrote are verified with a group that is due, else when nothing of
        the group is left to write; those of groups that are written ahead wait until they are due.
        """
        may_return = is_due or (self._order == "arrival" and group.is_finished)
        for member in group.members:
            is_wanted = not member.is_finished or (may_return and self._is_stale(member))
            if is_wanted and id(member) not in self._held:
                self._held.add(id(member))
                self._num_held[group.key] += 1
                self._queue.append((group, member))

    def _fill_slots(self) -> None:
        """Give the engine what it has slots for."""
        if self._queue and (num_free := self._engine.num_slots - self._engine.num_unfinished) > 0:
            self._engine.submit([self._request(*self._queue.popleft()) for _ in range(min(num_free, len(self._queue)))])

    def _is_stale(self, member: Member) -> bool:
        """Whether what a member has is to be verified before it counts."""
        return self._verifies and not member.is_of(self._version)

    def _request(self, group: Group, member: Member) -> Request:
        self._next_request_id += 1
        written, as_draft = member.written, False
        if written is not None:
            as_draft = self._is_stale(member)
            self._num_resumed += member.num_tokens
            self._resumed.add(group.key)
        self._asked[self._next_request_id] = group, member
        return Request(
            self._next_request_id,
            group.prompt_ids,
            member.seed,
            group.sampling,
            partial=None if as_draft else written,
            draft=written.token_ids if as_draft and written is not None else (),
        )

    def _take(self, completion: Completion) -> Group:
        """Keep what the engine gives back. A draft that it has not come to is still the member's own."""
        group, member = self._asked.pop(completion.request_id)
        self._held.discard(id(member))
        self._num_held[group.key] -= 1
        if completion.token_ids:
            before = () if member.written is None else member.written.token_ids
            self._num_drafts_cut += completion.token_ids[: len(before)] != before
            member.written = completion
        return group
