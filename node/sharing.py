"""What a node gives to a swarm: its scored groups as shared ones, within what the protocol carries. Pure."""

from protocol.limits import MAX_COMPLETION_BYTES, MAX_COMPLETIONS, MAX_GROUP_BYTES
from protocol.messages import SharedCompletion, SharedGroup
from swarm.advantage import group_advantages
from swarm.config import SapoConfig
from swarm.types import RolloutGroup

__all__ = ["authors_of", "shared_group"]

_ROOM_BYTES = 4096  # of a group, for its task and the framing of its completions


def shared_group(group: RolloutGroup, config: SapoConfig) -> SharedGroup | None:
    """Return what others are given of a scored group; None where they could learn nothing from it.

    Completions that the protocol does not carry are left out: those that were broken off, too long, or too many.
    """
    completions: list[SharedCompletion] = []
    rewards: list[float] = []
    num_bytes = 0
    for completion, text, reward in zip(group.completions, group.texts, group.rewards, strict=True):
        size = len(text.encode("utf-8", "replace"))
        if completion.finish_reason == "aborted" or size > MAX_COMPLETION_BYTES or not _is_unicode(text):
            continue
        num_bytes += size
        if len(completions) == MAX_COMPLETIONS or num_bytes > MAX_GROUP_BYTES - _ROOM_BYTES:
            break
        completions.append(SharedCompletion(text, completion.finish_reason == "stop"))
        rewards.append(reward)
    if not completions or (config.publish == "informative" and not any(group_advantages(rewards, config))):
        return None
    return SharedGroup(group.task.ref, tuple(completions))


def authors_of(group: RolloutGroup) -> frozenset[int]:
    """Return the versions of this node's policy that wrote a group."""
    return frozenset(part.policy_version for completion in group.completions for part in completion.segments)


def _is_unicode(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which no encoding carries."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
