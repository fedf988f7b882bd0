"""Tokens that are masked do not train: an update with them is an update on what is left."""

import copy

import pytest
import torch

from swarm.config import ModelConfig, SapoConfig, TrainerConfig
from swarm.policy import load_policy
from swarm.sapo import build_batch
from swarm.trainer import Trainer
from swarm.types import Completion, RolloutGroup, Segment, TrainingBatch, TrainingGroup


@pytest.fixture(scope="module")
def tiny():
    return load_policy(ModelConfig(name="tiny"))


def weights_after(tiny, group, normalization):
    trainer = Trainer(
        copy.deepcopy(tiny.model), TrainerConfig(normalization=normalization), max_completion_tokens=12
    )  # fmt: skip
    stats = trainer.update(TrainingBatch((group,)))
    return torch.cat([tensor.flatten() for tensor in trainer.policy_state().values()]), stats


@pytest.mark.parametrize("normalization", ["dapo", "dr_grpo"])
def test_a_completion_that_is_masked_whole_teaches_nothing(tiny, normalization):
    ids = ((5, 6, 7, 8), (9, 10, 11))
    logprobs = ((-1.0,) * 4, (-2.0,) * 3)
    both = TrainingGroup((1, 2, 3), ids, (1.0, -1.0), logprobs, num_masked=(0, 3))
    alone = TrainingGroup((1, 2, 3), (ids[0], ids[0]), (1.0, 0.0), (logprobs[0],) * 2)
    unmasked = TrainingGroup((1, 2, 3), ids, (1.0, -1.0), logprobs)
    (masked, stats), (free, _) = (weights_after(tiny, group, normalization) for group in (both, unmasked))
    (expected, _) = weights_after(tiny, alone, normalization)
    assert stats.num_tokens == 7
    start = torch.cat([tensor.flatten() for tensor in tiny.model.state_dict().values()])
    assert torch.cosine_similarity(masked - start, expected - start, dim=0) > 0.99  # AdamW magnifies rounding
    assert torch.cosine_similarity(free - start, expected - start, dim=0) < 0.95


def test_a_masked_prefix_is_left_out_and_the_rest_weighs_as_before(tiny):
    """With the prefix as part of the prompt, the same tokens are trained on."""
    whole = TrainingGroup((1, 2, 3), ((5, 6, 7, 8),), (1.0,), ((-1.0,) * 4,), num_masked=(2,))
    rest = TrainingGroup((1, 2, 3, 5, 6), ((7, 8),), (1.0,), ((-1.0,) * 2,))
    got, expected = (weights_after(tiny, group, "dapo")[0] for group in (whole, rest))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


def test_a_batch_carries_the_masks_of_the_completions_that_are_kept():
    completions = tuple(
        Completion(0, ids, (-1.0,) * len(ids), (Segment(0, 0, len(ids)),) if ids else (), "stop")
        for ids in ((1, 2), (), (3, 4, 5))
    )
    group = RolloutGroup(None, (1,), completions, ("a", "", "b"), (1.0, 0.0, 0.0), num_masked=(1, 0, 2))
    batch = build_batch([group], [], SapoConfig(num_local=1), None)
    assert batch.groups[0].num_masked == (1, 2)
    free = build_batch([RolloutGroup(None, (1,), completions, ("a", "", "b"), (1.0, 0.0, 0.0))], [], SapoConfig(), None)
    assert free.groups[0].num_masked == ()
