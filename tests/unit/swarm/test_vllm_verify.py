"""What the vLLM engine keeps along drafts, without vLLM: by hand, and by what it is distributed as."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from swarm.engine.torch.sampling import sample
from swarm.engine.vllm.verify import NOT_KEPT, kept_along, spread

VOCABULARY, NUM_SAMPLES = 8, 100_000
LEAST_P = 1e-6  # seeds are fixed: one number that was looked at once


def test_rows_of_any_length():
    assert spread(torch.tensor([1, 2, 3, 4]), [0, 3, 1], -9).tolist() == [[-9] * 3, [1, 2, 3], [4, -9, -9]]
    assert spread(torch.tensor([0.5]), [1], 0.0).tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("drawn", "drafted", "kept"),
    [
        ([5], [], [5]),  # nothing was drafted
        ([5, 6], [5], [5, 6]),
        ([5, 6], [4], [5, NOT_KEPT]),
        ([5, 6, 7, 8], [5, 6, 7], [5, 6, 7, 8]),
        ([5, 6, 7, 8], [5, 0, 7], [5, 6, NOT_KEPT, NOT_KEPT]),  # right again behind a wrong one is nothing
        ([5, 6, 7, 8], [0, 6, 7], [5, NOT_KEPT, NOT_KEPT, NOT_KEPT]),
    ],
)
def test_one_row_by_hand(drawn, drafted, kept):
    assert kept_along(torch.tensor(drawn), torch.tensor(drafted, dtype=torch.int64), [len(drafted)]).tolist() == [kept]


def test_rows_do_not_touch():
    drawn, drafted = torch.tensor([1, 2, 3, 9, 4, 5]), torch.tensor([1, 7, 4])
    assert kept_along(drawn, drafted, [2, 0, 1]).tolist() == [[1, 2, -1], [9, -1, -1], [4, 5, -1]]


def p_values(kept=kept_along) -> list[float]:
    """Write three tokens of a Markov chain, some drafted, and say how likely so large a deviation is at each place."""
    rng = np.random.default_rng(0)
    table = rng.normal(0, 1.5, (VOCABULARY, VOCABULARY)).astype(np.float32)  # the logits after each token
    seeds = torch.arange(NUM_SAMPLES) * 7919 + 1
    written = torch.zeros(NUM_SAMPLES, 4, dtype=torch.int64)
    nums = torch.ones(NUM_SAMPLES, dtype=torch.int64)
    while bool((nums < 4).any()):
        rows = (nums < 4).nonzero()[:, 0]
        last = written[rows, nums[rows] - 1]
        drafted = torch.from_numpy(rng.choice(VOCABULARY, len(rows), p=[0.6, *[0.4 / 7] * 7]))
        before = torch.stack([last, drafted], dim=1).reshape(-1)
        places = torch.stack([nums[rows] - 1, nums[rows]], dim=1).reshape(-1)
        logits = torch.from_numpy(table)[before]
        drawn, _ = sample(logits, seeds[rows].repeat_interleave(2), places, torch.ones(len(before)))
        out = kept(drawn, drafted, [1] * len(rows))
        for column in range(2):
            has = (out[:, column] != NOT_KEPT) & (nums[rows] < 4)
            written[rows[has], nums[rows[has]]] = out[has, column]
            nums[rows[has]] += 1
    chances, found = np.eye(VOCABULARY)[0], []
    transition = np.exp(table.astype(np.float64))
    transition /= transition.sum(-1, keepdims=True)
    for place in range(1, 4):
        chances = chances @ transition
        counts = np.bincount(written[:, place].numpy(), minlength=VOCABULARY)
        deviation = ((counts - chances * NUM_SAMPLES) ** 2 / (chances * NUM_SAMPLES)).sum()
        found.append(float(chi2.sf(deviation, VOCABULARY - 1)))
    return found


def test_what_is_kept_is_distributed_as_the_model_says():
    assert min(p_values()) > LEAST_P


def keeps_the_draft(drawn, drafted, nums):
    tokens = kept_along(drawn, drafted, nums)
    tokens[:, 0] = drafted
    return tokens


def throws_a_failed_token_away(drawn, drafted, nums):
    """And takes the one drawn behind the draft in its place, as if that followed the same prefix."""
    tokens = spread(drawn, [num + 1 for num in nums], NOT_KEPT)
    failed = tokens[:, 0] != drafted
    tokens[failed, 0] = tokens[failed, 1]
    tokens[failed, 1] = NOT_KEPT
    return tokens


def keeps_what_follows_a_wrong_draft(drawn, drafted, nums):
    return spread(drawn, [num + 1 for num in nums], NOT_KEPT)


@pytest.mark.parametrize(
    "wrong", [keeps_the_draft, throws_a_failed_token_away, keeps_what_follows_a_wrong_draft]
)  # fmt: skip
def test_a_wrong_verifier_does_not_pass(wrong):
    assert min(p_values(wrong)) < LEAST_P / 1000
