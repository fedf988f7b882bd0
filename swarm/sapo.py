"""One round of SAPO, Swarm sAmpling Policy Optimization: what a node learns from (arXiv 2509.08721, section 3).

A round, and who does what:

    tasks       a batch of questions
    rollout     L completions of each, by the node's own policy
    scoring     rewards, by the node's own verifier, for own and external groups alike
    sapo        I own groups and J external groups become one training batch        <- this module
    advantage   rewards become advantages, within each group
    trainer     one policy-gradient update

With J = 0 this is ordinary reinforcement learning on one machine.

Departures from the paper:
- The paper leaves the choice of own groups open. Here it is uniform among them, and own groups without any
  advantage are left out after the choice: they carry no gradient, and filling up with other own groups would
  train on more than I questions. They are counted.
- External groups are filtered (zero advantage first, then uniform sampling) as in the paper's controlled
  experiment, not as in its large demonstration, which did not filter.
- Missing external groups are replaced by nothing. A node never waits for a peer, and never learns more from
  itself because peers are silent. They are counted.
- Advantages have a floor on the spread of a group (see `advantage`).
"""

import random
from collections.abc import Sequence
from typing import TypeVar

from swarm.advantage import group_advantages
from swarm.config import SapoConfig
from swarm.types import RolloutGroup, TrainingBatch, TrainingGroup

__all__ = ["build_batch"]

T = TypeVar("T")


def build_batch(
    own: Sequence[RolloutGroup], external: Sequence[RolloutGroup], config: SapoConfig, rng: random.Random
) -> TrainingBatch:
    """Choose `num_local` own and `num_external` external groups, all scored, and compute their advantages.

    `rng` is drawn from only where there is more to choose from than is needed. Raises ValueError for a
    group that has not been scored.
    """
    own_groups = [_training_group(group, config, is_own=True) for group in _choose(own, config.num_local, rng)]
    useful_own = [group for group in own_groups if group is not None]
    external_groups = [_training_group(group, config, is_own=False) for group in external]
    useful_external = [group for group in external_groups if group is not None]
    chosen_external = _choose(useful_external, config.num_external, rng)
    return TrainingBatch(
        groups=(*useful_own, *chosen_external),
        num_own_zero_advantage=len(own_groups) - len(useful_own),
        num_external_zero_advantage=len(external_groups) - len(useful_external),
        num_external_missing=config.num_external - len(chosen_external),
    )


def _choose(items: Sequence[T], count: int, rng: random.Random) -> list[T]:
    """Return `count` items drawn uniformly without replacement, in their order; all where there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[index] for index in sorted(rng.sample(range(len(items)), count))]


def _training_group(group: RolloutGroup, config: SapoConfig, *, is_own: bool) -> TrainingGroup | None:
    """Return the group as the trainer sees it, or None where no completion of it has an advantage.

    An external group has no behaviour log-probabilities: it is trained on as if the own policy had written it.
    A completion without tokens counts for the advantages of its siblings and cannot be trained on itself.
    """
    if len(group.rewards) != len(group.completions):
        raise ValueError(f"a group of {len(group.completions)} completions has {len(group.rewards)} rewards")
    advantages = group_advantages(group.rewards, config)
    kept = [index for index, completion in enumerate(group.completions) if completion.token_ids]
    if not any(advantages[index] for index in kept):
        return None
    return TrainingGroup(
        prompt_ids=group.prompt_ids,
        completion_ids=tuple(group.completions[index].token_ids for index in kept),
        advantages=tuple(advantages[index] for index in kept),
        behavior_logprobs=tuple(group.completions[index].logprobs if is_own else None for index in kept),
    )
