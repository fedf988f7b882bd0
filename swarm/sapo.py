"""One round of SAPO, Swarm sAmpling Policy Optimization: what a node learns from (arXiv 2509.08721, section 3).

A round, and who does what:

    exchange    up to J groups of others that are there already
    tasks       I questions, and one for every group of others that is missing
    rollout     L completions of each, by the node's own policy
    scoring     rewards, by the node's own verifier, for own and external groups alike
    exchange    a group of others for every own one that has no advantage (`SapoConfig.fill`)
    sapo        own and external groups become one training batch of I + J groups  <- this module
    advantage   rewards become advantages, within each group
    trainer     one policy-gradient update

With J = 0 this is ordinary reinforcement learning on one machine.

Departures from the paper:
- The paper leaves the choice of own groups open. Here it is uniform among them, and own groups without any
  advantage are left out after the choice: they carry no gradient, and filling up with other own groups would
  train on more than I questions. They are counted.
- External groups are filtered (zero advantage first, then uniform sampling) as in the paper's controlled
  experiment, not as in its large demonstration, which did not filter.
- External groups are sampled when a round begins, not when it ends. Those that are not there then are missing:
  they are counted, and as many more own questions are asked in the same round. So a node never waits for a peer,
  a batch has I + J groups whoever is there, and a node that is cut off learns as it would alone. A group that
  arrives while the round is under way is there for the next one. Without `replace_missing` the batch is smaller.
- With `fill`, groups of others also take the places of own groups without any advantage, as far as they are there:
  J adapts to each round, and is larger where own rewards are sparse. A batch never has more than I + J groups.
- What others wrote and their siblings did better is pushed down with `external_negative_weight`, not in full. The own
  policy would hardly write it, and making the improbable less probable teaches nothing: the mass goes anywhere. This
  is the tapering of off-policy REINFORCE (arXiv 2503.14286, section 3) with a constant for the ratio to the author's
  policy, which is not known here.
- Beyond the paper, each an option that is off: groups of others are drawn by what they teach this policy
  (`learning_value`), their questions are asked again and answered in one broad group (`broad`), completions go to
  hard questions (`rollout.allocation`), and J is smaller, and I larger, while held-out reward falls (`swing`).
- Advantages have a floor on the spread of a group (see `advantage`).
"""

import math
import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from protocol.messages import TaskRef
from swarm.advantage import group_advantages
from swarm.broad import merge
from swarm.config import SapoConfig
from swarm.types import RolloutGroup, TrainingBatch, TrainingGroup

__all__ = ["build_batch", "damped", "num_own_groups", "num_to_fill", "share_of"]

T = TypeVar("T")


def build_batch(
    own: Sequence[RolloutGroup],
    external: Sequence[RolloutGroup],
    config: SapoConfig,
    rng: random.Random,
    *,
    again: Collection[TaskRef] = (),
) -> TrainingBatch:
    """Choose external groups and as many own ones as make up the batch, and compute advantages.

    External groups are `num_external`; with `fill`, as many as leave room for the useful own ones. Own groups are
    `num_local`, and with `replace_missing` one for every external group that is missing, as far as there are so many.
    All groups have been scored. `rng` is drawn from only where there is more to choose from than is needed.
    `again` are own questions that others have asked: their answers join the own group, which counts as an own one, and
    each of them as an external group.
    Raises ValueError for a group that has not been scored.
    """
    parts, alone = merge(own, external, again)
    num_merged = len(external) - len(alone)
    own_groups = [_training_group(group, others, config) for group, *others in parts]
    useful_own = [group for group in own_groups if group is not None]
    external_groups = [_training_group(None, [group], config) for group in alone]
    useful_external = [group for group in external_groups if group is not None]
    room = config.num_external
    if config.fill:
        room = max(room, config.num_local + config.num_external - len(useful_own))
    chosen_external = _choose(useful_external, max(0, room - num_merged), rng)
    num_external = len(chosen_external) + num_merged
    num_own = num_own_groups(config, num_external)
    chosen_own = _choose(useful_own if config.fill else own_groups, num_own, rng)
    kept_own = [group for group in chosen_own if group is not None]
    return TrainingBatch(
        groups=(*kept_own, *chosen_external),
        num_own_zero_advantage=len(own_groups if config.fill else chosen_own) - len(kept_own),
        num_external_zero_advantage=len(external_groups) - len(useful_external),
        num_external_missing=max(0, config.num_external - num_external),
    )


def damped(config: SapoConfig, share: float, rng: random.Random) -> SapoConfig:
    """Return the settings of a round with only a share of J groups of others, and as many more own ones."""
    num_external = share_of(config.num_external, share, rng)
    num_local = config.num_local + config.num_external - num_external
    return config.model_copy(update={"num_local": num_local, "num_external": num_external})


def share_of(count: int, share: float, rng: random.Random) -> int:
    """Return `count` times `share`, rounded up or down at random so that it is right on average."""
    exact = count * share
    return math.floor(exact) + (rng.random() < exact - math.floor(exact))


def num_own_groups(config: SapoConfig, num_external: int) -> int:
    """Return how many own groups go with `num_external` groups of others: I, and those that replace missing ones."""
    room = config.num_local + config.num_external - num_external
    return room if config.replace_missing else min(config.num_local, room)


def num_to_fill(
    own: Sequence[RolloutGroup], external: Sequence[RolloutGroup], config: SapoConfig, again: Collection[TaskRef] = ()
) -> int:
    """Return how many more groups of others there is room for, once own groups have been scored."""
    if not config.fill or not config.num_external:
        return 0
    parts, _ = merge(own, external, again)
    num_useful = sum(_training_group(group, others, config) is not None for group, *others in parts)
    return max(0, config.num_local + config.num_external - num_useful - len(external))


def _choose(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """Return `count` items drawn uniformly without replacement, in their order; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in sorted(rng.sample(range(len(items)), count))]


def _training_group(
    own: RolloutGroup | None, external: Sequence[RolloutGroup], config: SapoConfig
) -> TrainingGroup | None:
    """Return all answers to one question as the trainer sees them, or None where none of them has an advantage.

    Without the filter, an own group without any is trained on: it moves nothing, and weighs in the batch's mean.
    What others wrote has no behaviour log-probabilities: it is trained on as if the own policy had written it.
    A completion without tokens counts for the advantages of its siblings and cannot be trained on itself.
    """
    groups = [*([] if own is None else [own]), *external]
    for group in groups:
        if len(group.rewards) != len(group.completions):
            raise ValueError(f"a group of {len(group.completions)} completions has {len(group.rewards)} rewards")
    completions = [completion for group in groups for completion in group.completions]
    masked = [num for group in groups for num in group.num_masked or (0,) * len(group.completions)]
    advantages = group_advantages([reward for group in groups for reward in group.rewards], config)
    kept = [index for index, completion in enumerate(completions) if completion.token_ids]
    is_filtered = config.own_filter or len(external) > 0
    if not kept or (is_filtered and not any(advantages[index] for index in kept)):
        return None
    num_own = 0 if own is None else len(own.completions)
    weighed = [_weigh(value, index < num_own, config) for index, value in enumerate(advantages)]
    return TrainingGroup(
        prompt_ids=groups[0].prompt_ids,
        completion_ids=tuple(completions[index].token_ids for index in kept),
        advantages=tuple(weighed[index] for index in kept),
        behavior_logprobs=tuple(completions[index].logprobs if index < num_own else None for index in kept),
        num_masked=tuple(masked[index] for index in kept) if any(masked) else (),
    )


def _weigh(advantage: float, is_own: bool, config: SapoConfig) -> float:
    """Return the advantage of an own completion, or of one that another node wrote, as far as it counts."""
    negative = config.own_negative_weight if is_own else config.external_negative_weight
    return advantage * negative if advantage < 0 else advantage
