"""Which questions get how many of a round's completions, once each has had a few (`sapo.first_completions`).

    first    so many completions of every question, scored
    more     the rest of the round's completions, where they teach most

This is the idea of DARS (arXiv 2508.13755): plain groups spend most on questions of middling difficulty, and on hard
ones a success is too rare to learn from. Departures from it: the number of completions of a round is what it is
without, so that what hard questions get others do not; and a question without any success waits until the others are
served, since one more try at it seldom brings any.

The noise of a completion depends on its index in the question's group, whichever stage writes it (`collector`).
"""

from collections.abc import Sequence
from typing import Final

from swarm.types import RolloutGroup

__all__ = ["allocate", "later_spans"]

_MOST: Final = 4  # times the usual number of completions that one question may get


def later_spans(first: Sequence[RolloutGroup], num_completions: int) -> list[range]:
    """Return which completions of each question come after its first ones, for `num_completions` a question overall."""
    nums_first = [len(group.completions) for group in first]
    num_more = num_completions * len(first) - sum(nums_first)
    nums = allocate([group.rewards for group in first], num_more, _MOST * num_completions)
    return [range(begin, begin + num) for begin, num in zip(nums_first, nums, strict=True)]


def allocate(rewards: Sequence[Sequence[float]], num_more: int, most: int) -> list[int]:
    """Share out `num_more` completions among questions, of which none gets more than `most` in all.

    First come questions whose rewards differ, in proportion to how hard they are, 1 - mean; then, evenly, those whose
    rewards are all the same and not full; last, evenly, those that were answered right every time. Ties go to the
    question that is asked first. Raises ValueError where `num_more` does not fit.
    """
    nums = [0] * len(rewards)
    means = [sum(group) / len(group) for group in rewards]
    mixed = [place for place, group in enumerate(rewards) if min(group) < max(group)]
    unsolved = [place for place, group in enumerate(rewards) if min(group) == max(group) < 1]
    solved = [place for place, group in enumerate(rewards) if min(group) == max(group) >= 1]
    shares = [1 - mean if place in mixed else 1.0 for place, mean in enumerate(means)]
    left = num_more
    for places in (mixed, unsolved, solved):
        while left and (open_ := [place for place in places if len(rewards[place]) + nums[place] < most]):
            nums[max(open_, key=lambda place: shares[place] / (nums[place] + 1))] += 1
            left -= 1
    if left:
        raise ValueError(f"{num_more} more completions for {len(rewards)} questions are over {most} for each")
    return nums
