"""Two-level Gumbel-max against the softmax it has to draw from."""

import math

import pytest
import torch

from swarm.engine.torch import sampling
from swarm.engine.torch.sampling import block_size, sample

NUM_DRAWS = 100_000


def random_logits(vocab: int, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def draw(
    logits: torch.Tensor, num_draws: int = NUM_DRAWS, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
):
    """Draw with consecutive seeds, as the worst case that users give. returns: tokens, logprobs, both [num_draws]."""
    tokens, logprobs = [], []
    for start in range(0, num_draws, 10_000):
        rows = torch.arange(start, min(start + 10_000, num_draws))
        truncation = [None, None]
        if top_k or top_p < 1:
            truncation = [torch.full((len(rows),), top_k), torch.full((len(rows),), top_p)]
        drawn = sample(logits.expand(len(rows), -1), rows, rows % 7, torch.full((len(rows),), temperature), *truncation)
        tokens.append(drawn[0])
        logprobs.append(drawn[1])
    return torch.cat(tokens), torch.cat(logprobs)


def deviation(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of the counts in standard deviations (Wilson and Hilferty); rare tokens are counted together."""
    expected = probabilities.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    assert bool((counts[expected == 0] == 0).all()), "a token outside the support was drawn"
    often = expected >= 10
    if bool((~often & (expected > 0)).any()):
        counts = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([expected[often], expected[~often].sum()[None]])
    else:
        counts, expected = counts[often], expected[often]
    degrees = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The definition: the k largest, renormalised, then the smallest set of them with mass p, renormalised."""
    weights = (logits.double() / temperature).softmax(-1).tolist()
    ranked = sorted(range(len(weights)), key=lambda token: -weights[token])[: top_k or None]
    total, mass, kept = sum(weights[token] for token in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        mass += weights[token] / total
        if mass >= top_p < 1:
            break
    out = torch.zeros(len(weights), dtype=torch.float64)
    out[kept] = torch.tensor([weights[token] for token in kept], dtype=torch.float64)
    return out / out.sum()


@pytest.mark.parametrize("vocab", [2, 5, 64, 200, 1000, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_follow_the_softmax(vocab, temperature):
    logits = random_logits(vocab)
    tokens, logprobs = draw(logits, temperature=temperature)
    expected = (logits.double() / temperature).softmax(-1)
    assert abs(deviation(tokens, expected)) < 4
    torch.testing.assert_close(logprobs, expected.log().float()[tokens], rtol=0, atol=1e-5)


def test_draws_of_a_flat_and_of_a_steep_distribution():
    assert abs(deviation(draw(torch.zeros(200))[0], torch.full((200,), 1 / 200))) < 4
    steep = random_logits(64, scale=6.0)
    assert abs(deviation(draw(steep)[0], steep.double().softmax(-1))) < 4
    for vocab in (65, 1024):  # whole blocks without any mass
        certain = torch.full((vocab,), -math.inf)
        certain[64] = 3.0
        tokens, logprobs = draw(certain, num_draws=100)
        assert tokens.tolist() == [64] * 100
        assert logprobs.tolist() == [0.0] * 100


@pytest.mark.parametrize("vocab", [200, 1024])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 9, 1.0), (1.0, 0, 0.6), (0.8, 40, 0.9), (1.6, 0, 0.95), (1.0, 1, 1.0)]
)
def test_truncated_draws_follow_the_truncated_softmax(vocab, temperature, top_k, top_p):
    logits = random_logits(vocab)
    expected = truncated(logits, temperature, top_k, top_p)
    num_draws = NUM_DRAWS * 200 // vocab  # sorting is what takes the time
    tokens, logprobs = draw(logits, num_draws, temperature=temperature, top_k=top_k, top_p=top_p)
    if int((expected > 0).sum()) > 1:
        assert abs(deviation(tokens, expected)) < 4
    else:
        assert tokens.unique().tolist() == [int(logits.argmax())]
    torch.testing.assert_close(logprobs, expected.log().float()[tokens], rtol=0, atol=1e-5)


def test_the_check_sees_a_small_error():
    """What the tests above would say of a sampler whose logits are off by a fiftieth of their spread."""
    logits = random_logits(200)
    assert deviation(draw(logits * 1.02)[0], logits.double().softmax(-1)) > 4


def test_block_and_token_are_independent():
    """Counts of (block, place in it) for equal logits: a noise shared by both levels would show here first."""
    width = block_size(64)
    tokens, _ = draw(torch.zeros(64))
    table = torch.bincount(tokens, minlength=64).view(-1, width).double()
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / len(tokens)
    statistic = float(((table - expected) ** 2 / expected).sum())
    degrees = (table.shape[0] - 1) * (width - 1)
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_every_row_has_its_own_settings():
    logits = random_logits(50)
    temperature = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 0.0])
    top_k, top_p = torch.tensor([0, 0, 0, 3, 0, 2]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    seeds, positions = torch.arange(6), torch.arange(6) + 4
    tokens, logprobs = sample(logits.expand(6, -1), seeds, positions, temperature, top_k, top_p)
    for row in range(6):
        one = slice(row, row + 1)
        token, logprob = sample(logits[None], seeds[one], positions[one], temperature[one], top_k[one], top_p[one])
        assert (int(tokens[row]), float(logprobs[row])) == (int(token), float(logprob))
        settings = float(temperature[row]) or 1.0, int(top_k[row]), float(top_p[row])
        expected = float(truncated(logits, *settings)[tokens[row]].log())
        assert float(logprobs[row]) == pytest.approx(expected, abs=1e-5)
    assert int(tokens[0]) == int(tokens[5]) == int(logits.argmax())


@pytest.mark.parametrize("vocab", [5, 203, 1000, 1024, 49152])
def test_a_row_has_the_same_bits_in_every_batch(vocab):
    logits = torch.stack([random_logits(vocab, seed=seed) for seed in range(33)])
    seeds, positions, temperature = torch.arange(33) * 977, torch.arange(33) % 5, torch.full((33,), 0.9)
    whole = sample(logits, seeds, positions, temperature)
    for rows in (slice(0, 1), slice(3, 4), slice(5, 22), slice(32, 33)):
        part = sample(logits[rows], seeds[rows], positions[rows], temperature[rows])
        assert torch.equal(part[0], whole[0][rows])
        assert torch.equal(part[1], whole[1][rows])


@pytest.mark.parametrize("vocab", [5, 200, 1000])
@pytest.mark.parametrize("change", [0.02, 0.3])
def test_close_distributions_mostly_draw_the_same_token(vocab, change):
    """Each level agrees with probability (1 - TV) / (1 + TV) or more; together at least the product for both."""
    logits = random_logits(vocab)
    other = logits + random_logits(vocab, scale=change, seed=1)
    width = block_size(vocab)
    p, q = logits.double().softmax(-1), other.double().softmax(-1)
    pad = (0, -vocab % width)
    block_p, block_q = (torch.nn.functional.pad(x, pad).view(-1, width).sum(-1) for x in (p, q))

    def bound(a: torch.Tensor, b: torch.Tensor) -> float:
        distance = float((a - b).abs().sum()) / 2
        return (1 - distance) / (1 + distance)

    inside = 0.0
    for block in range(len(block_p)):
        rows = slice(block * width, (block + 1) * width)
        inside += min(float(block_p[block]), float(block_q[block])) * bound(
            p[rows] / p[rows].sum(), q[rows] / q[rows].sum()
        )
    lowest = inside - (1 - bound(block_p, block_q))
    agreement = float((draw(logits)[0] == draw(other)[0]).double().mean())
    assert agreement >= lowest - 4 * math.sqrt(0.25 / NUM_DRAWS)
    independent = float((p * q).sum())
    assert agreement > independent + 0.2


@pytest.mark.parametrize("vocab", [5, 200, 1024])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_a_change_that_is_less_than_the_margin_changes_no_token(vocab, temperature):
    """Block masses move by no more than logits do, and differences of two by twice that."""
    rows = torch.arange(2000)
    settings = rows * 31, rows % 5, torch.full((2000,), temperature)
    logits = random_logits(vocab).expand(2000, -1)
    tokens, logprobs, margins = sampling.draw(logits, *settings)
    assert torch.equal(
        torch.stack([tokens.float(), logprobs]), torch.stack([x.float() for x in sample(logits, *settings)])
    )
    assert bool((margins >= 0).all())
    generator = torch.Generator().manual_seed(2)
    change = torch.rand(2000, vocab, generator=generator) * 2 - 1
    small = change * margins.clamp(max=50)[:, None] * (0.49 * (temperature or 1))
    assert torch.equal(sample(logits + small, *settings)[0], tokens)
    large = change * 2 * (temperature or 1)
    moved = sample(logits + large, *settings)[0] != tokens
    close = margins < margins.median()
    if temperature:  # else all rows are alike
        assert float(moved[close].float().mean()) > 1.5 * float(moved[~close].float().mean())


def test_bf16_logits_are_sampled_in_float32():
    logits = random_logits(200).bfloat16()
    assert abs(deviation(draw(logits)[0], logits.double().softmax(-1))) < 4


@pytest.mark.parametrize(
    ("vocab", "width"), [(2, 1), (5, 2), (64, 8), (200, 16), (1024, 32), (49152, 256), (151936, 128)]
)
def test_block_sizes(vocab, width):
    assert block_size(vocab) == width
