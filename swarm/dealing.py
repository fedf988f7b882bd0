"""Which process runs which microbatches of an optimizer step, where several share a policy.

Weights are gathered and gradients added up in every pass, so that all processes run equally many, and the slowest of
a pass is waited for. Who lacks a microbatch runs one of another again, which does not count there.
"""

from collections.abc import Sequence

from swarm.packing import Part, num_tokens_of, split_into_microbatches
from swarm.types import TrainingGroup

__all__ = ["Dealt", "deal"]

_SLACKS = (1.0, 1.1, 1.25, 1.5)  # of a microbatch over an even share: groups are rarely cut as shares are

Dealt = list[tuple[list[Part], bool]]  # microbatches of a process, and whether each counts there


def deal(
    groups: Sequence[TrainingGroup],
    chosen: Sequence[int],
    max_tokens: int,
    num_ranks: int,
    *,
    shares_prompts: bool,
) -> list[Dealt]:
    """Return what each process runs of the chosen groups, in the split that takes the least time."""

    def size(parts: Sequence[Part]) -> int:
        return num_tokens_of(groups, parts, shares_prompts=shares_prompts)

    whole = [Part(index, tuple(range(len(groups[index].completion_ids)))) for index in chosen]
    total = size(whole)
    num_passes = max(1, -(-total // (num_ranks * max_tokens)))
    share = total / (num_ranks * num_passes)
    splits = []
    for limit in sorted({min(max_tokens, max(1, int(share * slack) + 1)) for slack in _SLACKS} | {max_tokens}):
        microbatches = split_into_microbatches(groups, chosen, limit, shares_prompts=shares_prompts)
        microbatches.sort(key=size, reverse=True)
        splits.append(microbatches)
    best = min(splits, key=lambda split: sum(size(parts) for parts in split[::num_ranks]))  # the longest of each pass
    fillers = -len(best) % num_ranks
    dealt = [(parts, True) for parts in best] + [(best[-1], False)] * fillers
    return [dealt[rank::num_ranks] for rank in range(num_ranks)]
