"""Broad groups: a question that another node has asked is asked again here, and all answers to it are one group.

A larger group has a better mean to compare a completion with, and a hard question has a right answer in it more
often (BroRL, arXiv 2510.01180, which makes a group broad on one machine; here the swarm does). Which questions are
asked again is decided before the rollouts, which groups belong together after scoring. Pure.
"""

from collections.abc import Collection, Sequence

from protocol.messages import TaskRef
from swarm.config import SapoConfig
from swarm.types import RolloutGroup, Task

__all__ = ["ask_again", "merge"]


def ask_again(
    uniform: Sequence[Task], external: Sequence[RolloutGroup], config: SapoConfig, *, max_prompt_tokens: int
) -> list[Task]:
    """Return the questions of others to ask again, at most `num_broad`, in place of as many of the `uniform` ones.

    Each once, and none that is asked anyway. One that is too long for the engine is left out: what others ask must
    not stop this node.
    """
    asked = {task.ref for task in uniform}
    found: dict[TaskRef, Task] = {}
    for group in external:
        ref = group.task.ref
        if len(found) < config.num_broad and ref not in asked and len(group.prompt_ids) <= max_prompt_tokens:
            found.setdefault(ref, group.task)
    return list(found.values())


def merge(
    own: Sequence[RolloutGroup], external: Sequence[RolloutGroup], again: Collection[TaskRef]
) -> tuple[list[tuple[RolloutGroup, ...]], list[RolloutGroup]]:
    """Return each own group with those of others that belong to it, and the groups of others that belong to none.

    Only questions that were asked `again` are merged.
    """
    if not again:
        return [(group,) for group in own], list(external)
    answered = {group.task.ref for group in own if group.task.ref in again}
    broad = [
        (group, *(other for other in external if other.task.ref == group.task.ref))
        if group.task.ref in answered
        else (group,)
        for group in own
    ]
    return broad, [other for other in external if other.task.ref not in answered]
