"""The contract of `swarm.engine.base.Engine`: where speculation changes a token, rounding decided it, and nothing else.

An engine whose arithmetic depends on the shape of a pass computes slightly other scores where it verifies several
tokens than where it decodes one. A token may then be another one where two candidates' noisy scores are within that
rounding: a near tie. They are counted here; each difference has to be at one of them. `-rP` shows the numbers.
"""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch.noise import gumbel
from swarm.engine.torch.sampling import block_size, sample
from swarm.types import Completion

pytestmark = pytest.mark.speculation

ROUNDING = 1e-4  # what `Kind.check_same` allows log-probabilities to differ by
SAMPLINGS = (
    SamplingParams(40, ignore_eos=True),
    SamplingParams(40, temperature=0, ignore_eos=True),
    SamplingParams(40, temperature=0.3, ignore_eos=True),
    SamplingParams(40, temperature=0.9, top_k=20, top_p=0.9, ignore_eos=True),
)
FEW, MANY = 48, 1024


def requests_of(num: int) -> list[Request]:
    """Groups of eight with one prompt."""
    return [Request(at, (5, 9, 14, at // 8), 7919 * at + 1, SAMPLINGS[at % 4]) for at in range(num)]


def lead(scores: torch.Tensor) -> float:
    """By how much the best score is ahead of the second one."""
    first, second = scores.topk(2).values.tolist()
    return first - second


def margin(logits: torch.Tensor, request: Request, position: int) -> float:
    """How far the scores of a position are from drawing another token. logits: float64 [vocab]."""
    sampling = request.sampling
    if sampling.temperature == 0:
        return lead(logits)
    scores, edge = logits / sampling.temperature, float("inf")
    ordered, order = scores.sort(descending=True)
    if sampling.top_k:
        edge = float(ordered[sampling.top_k - 1] - ordered[sampling.top_k])
        ordered[sampling.top_k :] = -torch.inf
    if sampling.top_p < 1:
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        edge = min(edge, float((before - sampling.top_p).abs().min()))
        ordered[before >= sampling.top_p] = -torch.inf
    scores = torch.empty_like(scores).scatter_(0, order, ordered)
    width = block_size(len(scores))
    blocks = torch.nn.functional.pad(scores, (0, -len(scores) % width), value=-torch.inf).view(-1, width)
    noise = gumbel(torch.tensor([request.seed]), torch.tensor([position]), len(blocks) + width)[0].double()
    masses = blocks.logsumexp(-1) + noise[: len(blocks)]
    inside = blocks[masses.argmax()] + noise[len(blocks) :]
    return min(edge, lead(masses), lead(inside))


@dataclass
class Ties:
    """What was found on many positions."""

    num_positions: int = 0
    num_near: int = 0  # whose candidates are within rounding
    num_fallen: int = 0  # of those: where speculation and plain decoding drew different tokens


def compare(kind, got: Completion, plain: Completion, margins: list[float], ties: Ties) -> None:
    """The same up to the first near tie that fell the other way; behind it stand two different texts."""
    pairs = enumerate(zip(got.token_ids, plain.token_ids, strict=True))
    num = next((place for place, (one, other) in pairs if one != other), len(plain.token_ids))
    ties.num_positions += len(margins)
    ties.num_near += sum(one < ROUNDING for one in margins)
    if num < len(plain.token_ids):
        assert margins[num] < ROUNDING, f"request {got.request_id} differs at {num}, where nothing is near a tie"
        ties.num_fallen += 1
    kind.check_same(*(
        replace(one, token_ids=one.token_ids[:num], logprobs=one.logprobs[:num], segments=()) for one in (got, plain)
    ))  # fmt: skip


@cache
def plain(kind, num: int) -> dict[int, tuple[Completion, list[float]]]:
    """What is written without drafters, and the margin of each position by transformers' own forward pass."""
    found, requests = {}, requests_of(num)
    for request, completion in zip(requests, kind.engine(max_slots=64).generate(requests), strict=True):
        tokens = torch.tensor([request.prompt_ids + completion.token_ids], device=kind.model.device)
        with torch.no_grad():
            logits = kind.model(tokens).logits[0, len(request.prompt_ids) - 1 : -1].double().cpu()
        found[request.request_id] = completion, [margin(row, request, at) for at, row in enumerate(logits)]
    return found


@pytest.mark.parametrize(
    ("drafter", "num"),
    [(SuffixDrafter, FEW), *(pytest.param(one, MANY, marks=pytest.mark.soak) for one in (SuffixDrafter, NgramDrafter))],
)
def test_every_difference_is_a_near_tie(kind, drafter, num, record_property):
    if kind.batch_invariant:
        pytest.skip("the same bits, which is more; test_engine_speculation holds it to that")
    engine = kind.engine(max_slots=24, speculator=Speculator([drafter()], Strategy(drafter.name, 6, 96)))
    ties = Ties()
    for completion in engine.generate(requests_of(num)):
        compare(kind, completion, *plain(kind, num)[completion.request_id], ties)
    assert engine.stats.num_speculated_tokens_kept > num
    assert ties.num_fallen <= ties.num_near < ties.num_positions / 100, "what is near everywhere shows nothing"
    record_property("near_ties", vars(ties))
    print(f"{kind.name}, {drafter.name}: {ties}")


def test_the_margin_is_that_of_the_draw():
    """Scores pushed by more than the margin draw another token; by less they never do."""
    generator, num_changed = torch.Generator().manual_seed(0), 0
    for number in range(200):
        request = requests_of(200)[number]
        logits = torch.randn(203, generator=generator).double() * 3
        push = torch.randn(203, generator=generator).double()
        far = margin(logits, request, number)
        columns = torch.tensor([request.seed]), torch.tensor([number])
        settings = [torch.tensor([one]) for one in (
            request.sampling.temperature, request.sampling.top_k, request.sampling.top_p)]  # fmt: skip
        drawn = [int(sample((logits + size * push)[None], *columns, *settings)[0]) for size in (0, far / 20, 5)]
        assert drawn[0] == drawn[1]
        num_changed += drawn[0] != drawn[2]
    assert num_changed > 50


def test_a_difference_that_is_no_near_tie_is_seen(kind):
    completion, margins = plain(kind, FEW)[0]
    tokens = completion.token_ids
    other = replace(completion, token_ids=(*tokens[:7], tokens[7] ^ 1, *tokens[8:]))
    compare(kind, other, completion, [*margins[:7], ROUNDING / 2, *margins[8:]], ties := Ties())
    assert ties.num_fallen == 1
    with pytest.raises(AssertionError, match="differs at 7"):
        compare(kind, other, completion, [1.0] * len(margins), Ties())
