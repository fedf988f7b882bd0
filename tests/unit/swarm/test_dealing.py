"""Microbatches are dealt so that every process runs equally many, and every completion counts once."""

import random

import pytest

from swarm.dealing import deal
from swarm.packing import num_tokens_of
from swarm.types import TrainingGroup


def group(prompt, *completions):
    ids = tuple((7,) * length for length in completions)
    return TrainingGroup((5,) * prompt, ids, (0.0,) * len(ids), (None,) * len(ids))


def counted(dealt):
    return sorted((part.group, one) for own in dealt for parts, counts in own if counts for part in parts
                  for one in part.completions)  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_all_run_equally_many_and_each_completion_counts_once(num_ranks, shares_prompts):
    rng = random.Random(num_ranks)
    for _ in range(50):
        groups = [
            group(rng.randint(1, 40), *(rng.randint(1, 60) for _ in range(rng.randint(2, 6))))
            for _ in range(rng.randint(1, 7))
        ]
        chosen = range(0, len(groups), rng.randint(1, 2))
        dealt = deal(groups, chosen, 150, num_ranks, shares_prompts=shares_prompts)
        assert len(dealt) == num_ranks
        assert len({len(own) for own in dealt}) == 1
        assert counted(dealt) == sorted(
            (index, number) for index in chosen for number in range(len(groups[index].completion_ids))
        )
        sizes = [num_tokens_of(groups, parts, shares_prompts=shares_prompts) for own in dealt for parts, _ in own]
        assert max(sizes) <= 150


def test_what_fits_one_microbatch_is_shared_out_all_the_same():
    groups = [group(10, 20, 20)] * 4
    for own in deal(groups, range(4), 4096, 2, shares_prompts=True):
        [(parts, counts)] = own
        assert counts
        assert num_tokens_of(groups, parts, shares_prompts=True) == 100


def test_who_lacks_a_microbatch_runs_the_smallest_again_and_it_does_not_count():
    groups = [group(1, 50)]
    first, second = deal(groups, range(1), 4096, 2, shares_prompts=True)
    assert [counts for _, counts in (*first, *second)] == [True, False]
    assert first[0][0] == second[0][0]
