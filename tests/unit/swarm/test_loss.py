"""The objective and its gradient against scalar arithmetic written out from the definitions."""

import math

import pytest
import torch

from swarm.config import TrainerConfig
from swarm.loss import TokenTerms, policy_loss, token_weight

# Two completions, of 3 tokens and of 1. Ratios are chosen so that every branch of the clipped minimum occurs.
ADVANTAGES = [1.5, -0.5]
OLD = [[-1.0, -2.0, -0.5], [-1.2]]
LOG_RATIOS = [[0.1, math.log(1.5), -0.4], [math.log(0.6)]]
BEHAVIOR = [[-1.3, -0.1, -3.0], [None]]  # weights exp(0.3), exp(-1.9), 2 (capped, exp(2.5)), 1 (unknown)
REFERENCE = [[-1.1, -1.5, -0.9], [-2.0]]
LENGTHS = [3, 1]
BUDGET = 8
NORMALIZATIONS = ["grpo", "dapo", "dr_grpo", "gspo"]


def current():
    return [[o + d for o, d in zip(os, ds, strict=True)] for os, ds in zip(OLD, LOG_RATIOS, strict=True)]


def make_terms(config, *, old=OLD, behavior=BEHAVIOR, reference=None):
    def flat(rows):
        return torch.tensor([math.nan if x is None else x for row in rows for x in row], dtype=torch.float64)

    weights = [
        [token_weight(config, length=n, num_completions=2, num_tokens=4, max_completion_tokens=BUDGET)] * n
        for n in LENGTHS
    ]
    return TokenTerms(
        old_logprobs=None if old is None else flat(old),
        behavior_logprobs=flat(behavior),
        reference_logprobs=None if reference is None else flat(reference),
        advantages=flat([[a] * n for a, n in zip(ADVANTAGES, LENGTHS, strict=True)]),
        weights=flat(weights),
        completion_numbers=torch.tensor([0, 0, 0, 1]),
        completion_lengths=torch.tensor(LENGTHS, dtype=torch.float64),
    )


UNKNOWN = [[None] * 3, [None]]


def scalar_loss(logprobs, normalization, *, old=OLD, behavior=BEHAVIOR, reference=None, kl_coef=0.0):
    """The loss from the definitions, one number at a time."""
    total = 0.0
    for i, advantage in enumerate(ADVANTAGES):
        n = len(logprobs[i])
        sequence_ratio = math.exp(sum(logprobs[i][t] - old[i][t] for t in range(n)) / n)
        for t in range(n):
            ratio = sequence_ratio if normalization == "gspo" else math.exp(logprobs[i][t] - old[i][t])
            gain = min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)
            if behavior[i][t] is not None:
                gain *= min(math.exp(old[i][t] - behavior[i][t]), 2.0)
            loss = -gain
            if reference is not None:
                difference = reference[i][t] - logprobs[i][t]
                loss += kl_coef * (math.exp(difference) - difference - 1.0)
            total += loss / {"grpo": 2 * n, "gspo": 2 * n, "dapo": 4, "dr_grpo": 2 * BUDGET}[normalization]
    return total


def finite_differences(function, logprobs, step=1e-6):
    gradient = []
    for i, row in enumerate(logprobs):
        for t in range(len(row)):
            values = []
            for sign in (1, -1):
                moved = [list(r) for r in logprobs]
                moved[i][t] += sign * step
                values.append(function(moved))
            gradient.append((values[0] - values[1]) / (2 * step))
    return gradient


def value_and_gradient(config, terms):
    logprobs = torch.tensor([x for row in current() for x in row], dtype=torch.float64, requires_grad=True)
    result = policy_loss(logprobs, terms, config)
    result.loss.backward()
    return result, logprobs.grad.tolist()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_value_and_gradient(normalization):
    config = TrainerConfig(normalization=normalization)
    behavior = UNKNOWN if normalization == "gspo" else BEHAVIOR
    result, gradient = value_and_gradient(config, make_terms(config, behavior=behavior))
    assert result.loss.item() == pytest.approx(scalar_loss(current(), normalization, behavior=behavior), rel=1e-9)
    expected = finite_differences(lambda x: scalar_loss(x, normalization, behavior=behavior), current())
    assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_dapo_written_out():
    config = TrainerConfig(normalization="dapo")
    result, gradient = value_and_gradient(config, make_terms(config))
    # Token 1: ratio e^0.1, weight e^0.3. Token 2: 1.5 clipped to 1.28, weight e^-1.9. Token 3: e^-0.4, weight 2.
    # Token 4: advantage -0.5 with ratio 0.6 is clipped to 0.8, weight 1.
    gains = [1.5 * math.exp(0.4), 1.5 * 1.28 * math.exp(-1.9), 1.5 * 2 * math.exp(-0.4), -0.5 * 0.8]
    assert result.loss.item() == pytest.approx(-sum(gains) / 4)
    assert gradient == pytest.approx([-gains[0] / 4, 0.0, -gains[2] / 4, 0.0])
    assert result.num_clipped.item() == 2
    assert result.tis_sum.item() == pytest.approx(math.exp(0.3) + math.exp(-1.9) + 2.0 + 1.0)


@pytest.mark.parametrize(("advantage", "loss"), [(-0.5, 0.5 * 0.8 / 4), (0.5, -0.5 * 0.6 / 4)])
@pytest.mark.parametrize(("probability", "weight"), [(0.0, 1.0), (0.2, 1.0), (0.6, math.exp(-1.2) / 0.6)])
def test_worse_answers_of_others_weigh_as_much_as_the_own_policy_would_have_written_them(
    advantage, loss, probability, weight, monkeypatch
):
    # The second completion is another node's: the own policy gave its token exp(-1.2) = 0.301.
    monkeypatch.setattr(f"{__name__}.ADVANTAGES", [-1.5, advantage])
    config = TrainerConfig(external_probability=probability)
    result, gradient = value_and_gradient(config, make_terms(config))
    plain, plain_gradient = value_and_gradient(TrainerConfig(), make_terms(config))
    expected = weight if advantage < 0 else 1.0
    assert result.loss.item() - plain.loss.item() == pytest.approx((expected - 1) * loss)
    assert gradient == pytest.approx([*plain_gradient[:3], expected * plain_gradient[3]])
    assert result.tis_sum.item() == pytest.approx(plain.tis_sum.item() - 1 + expected)


def test_clipping_is_one_sided():
    # A ratio above the range with a negative advantage, and below it with a positive one, keep their gradient.
    config = TrainerConfig(normalization="dapo")
    terms = make_terms(config, behavior=UNKNOWN)
    flipped = TokenTerms(
        terms.old_logprobs,
        terms.behavior_logprobs,
        None,
        -terms.advantages,
        terms.weights,
        terms.completion_numbers,
        terms.completion_lengths,
    )
    result, gradient = value_and_gradient(config, flipped)
    assert result.num_clipped.item() == 1  # e^-0.4 = 0.67 with advantage -1.5
    assert gradient == pytest.approx([1.5 * math.exp(0.1) / 4, 1.5 * 1.5 / 4, 0.0, -0.5 * 0.6 / 4])


def test_gspo_token_form_with_importance_weights():
    config = TrainerConfig(normalization="gspo")
    result, gradient = value_and_gradient(config, make_terms(config))
    ratio = math.exp((0.1 + math.log(1.5) - 0.4) / 3)  # 1.035: not clipped
    tis = [math.exp(0.3), math.exp(-1.9), 2.0]
    gains = [1.5 * ratio * weight / 6 for weight in tis]
    assert result.loss.item() == pytest.approx(-sum(gains) + 0.5 * 0.8 / 2)
    assert gradient == pytest.approx([*(-gain for gain in gains), 0.0])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_without_old_logprobs_it_is_reinforce(normalization):
    config = TrainerConfig(normalization=normalization)
    result, gradient = value_and_gradient(config, make_terms(config, old=None, behavior=UNKNOWN))
    weights = {"grpo": [1 / 6] * 3 + [1 / 2], "gspo": [1 / 6] * 3 + [1 / 2], "dapo": [1 / 4] * 4}.get(
        normalization, [1 / 16] * 4
    )
    expected = [-w * a for w, a in zip(weights, [1.5, 1.5, 1.5, -0.5], strict=True)]
    assert gradient == pytest.approx(expected)
    assert result.loss.item() == pytest.approx(sum(expected))
    assert result.num_clipped.item() == 0


@pytest.mark.parametrize("normalization", ["grpo", "dapo"])
def test_kl_penalty(normalization):
    config = TrainerConfig(normalization=normalization, kl_coef=0.3)
    result, gradient = value_and_gradient(config, make_terms(config, reference=REFERENCE))

    def function(logprobs):
        return scalar_loss(logprobs, normalization, reference=REFERENCE, kl_coef=0.3)

    assert result.loss.item() == pytest.approx(function(current()))
    assert gradient == pytest.approx(finite_differences(function, current()), rel=1e-5)
    assert result.kl_sum.item() > 0


def test_microbatches_add_up():
    # The weights are those of the whole step: the loss of both completions is the sum of the losses of each.
    config = TrainerConfig(normalization="dapo")
    whole = policy_loss(
        torch.tensor([x for r in current() for x in r], dtype=torch.float64), make_terms(config), config
    )
    terms = make_terms(config)
    total = 0.0
    for at, length in ((slice(0, 3), 3.0), (slice(3, 4), 1.0)):
        part = TokenTerms(
            terms.old_logprobs[at],
            terms.behavior_logprobs[at],
            None,
            terms.advantages[at],
            terms.weights[at],
            torch.zeros(int(length), dtype=torch.int64),
            torch.tensor([length], dtype=torch.float64),
        )
        flat = torch.tensor([x for r in current() for x in r], dtype=torch.float64)[at]
        total += policy_loss(flat, part, config).loss.item()
    assert total == pytest.approx(whole.loss.item())
