"""The contract of `swarm.engine.base.Engine`: what is written. How it is interrupted: test_engine_continuation.py."""

import math
from dataclasses import replace

import pytest
import torch

from swarm.engine.base import Request, SamplingParams
from swarm.types import Completion, Segment

LENGTHS = (1, 3, 15, 16, 17, 33, 40)


def prompt(length: int, salt: int = 0) -> tuple[int, ...]:
    return tuple((31 * salt + 17 * index + index * index) % 199 for index in range(1, length + 1))


def requests(sampling: SamplingParams, lengths=LENGTHS) -> list[Request]:
    return [
        Request(index, prompt(length, index), 0x9000_0000_0000_0000 + index, sampling)
        for index, length in enumerate(lengths)
    ]


def full_logits(model, request: Request, completion: Completion) -> torch.Tensor:
    """Logits before each token of the completion, from one plain forward pass: float64 [num_tokens, vocab]."""
    tokens = torch.tensor([request.prompt_ids + completion.token_ids], device=model.device)
    with torch.no_grad():
        return model(tokens).logits[0, len(request.prompt_ids) - 1 : -1].double().cpu()


def log_distribution(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The definition, token by token: temperature, then the k largest, then the smallest set of mass p. [vocab]."""
    values = (logits / sampling.temperature).tolist()
    ranked = sorted(range(len(values)), key=lambda token: -values[token])
    kept = ranked[: sampling.top_k or len(ranked)]
    weight = {token: math.exp(values[token] - values[ranked[0]]) for token in kept}
    total, mass, nucleus = sum(weight.values()), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += weight[token] / total
        if mass >= sampling.top_p < 1:
            break
    total = sum(weight[token] for token in nucleus)
    out = torch.full_like(logits, -math.inf)
    for token in nucleus:
        out[token] = math.log(weight[token] / total)
    return out


def test_greedy_is_that_of_transformers(exact_kind):
    engine = exact_kind.engine(max_slots=3)
    asked, seen = requests(SamplingParams(24, temperature=0)), set()
    for request, completion in zip(asked, engine.generate(asked), strict=True):
        whole = exact_kind.model.generate(
            torch.tensor([request.prompt_ids], device=exact_kind.model.device),
            do_sample=False, min_new_tokens=24, max_new_tokens=24, pad_token_id=0,
        )  # fmt: skip
        assert completion.token_ids == tuple(whole[0, len(request.prompt_ids) :].tolist())
        expected = full_logits(exact_kind.model, request, completion).log_softmax(-1)
        got = torch.tensor(completion.logprobs, dtype=torch.float64)
        torch.testing.assert_close(got, expected.max(-1).values, rtol=0, atol=1e-4)
        seen.update(completion.token_ids)
    assert len(seen) > 20, "a model that repeats itself shows nothing"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(20),
        SamplingParams(20, temperature=0.6),
        SamplingParams(20, temperature=1.7),
        SamplingParams(20, top_k=7),
        SamplingParams(20, top_p=0.8),
        SamplingParams(20, temperature=1.3, top_k=30, top_p=0.7),
    ],
    ids=str,
)
def test_logprobs_are_those_of_a_full_forward_pass(exact_kind, sampling):
    asked = requests(sampling)
    for request, completion in zip(asked, exact_kind.engine(max_slots=3).generate(asked), strict=True):
        rows = full_logits(exact_kind.model, request, completion)
        for row, token, logprob in zip(rows, completion.token_ids, completion.logprobs, strict=True):
            assert logprob == pytest.approx(float(log_distribution(row, sampling)[token]), abs=1e-4)


def test_bf16_logprobs_are_as_near_to_exact_arithmetic_as_those_of_transformers(bf16_kind):
    """Rounding to eight bits moves log-probabilities; the engine may round elsewhere but not more."""
    exact = bf16_kind.model.__class__(bf16_kind.model.config).eval().float().to(bf16_kind.model.device)
    exact.load_state_dict(bf16_kind.model.state_dict())
    ours, theirs = [], []
    asked = requests(SamplingParams(20))
    for request, completion in zip(asked, bf16_kind.engine(max_slots=3).generate(asked), strict=True):
        at = torch.tensor(completion.token_ids)[:, None]
        expected, plain = (
            full_logits(model, request, completion).log_softmax(-1).gather(1, at)[:, 0]
            for model in (exact, bf16_kind.model)
        )
        ours.append(torch.tensor(completion.logprobs).double() - expected)
        theirs.append(plain - expected)
    assert torch.cat(ours).square().mean() <= 1.5 * torch.cat(theirs).square().mean()


def test_first_tokens_follow_the_distribution(kind):
    num_draws, sampling = 4000, SamplingParams(1, temperature=1.5)
    engine = kind.engine(max_slots=500, max_seq_len=16)
    done = engine.generate([Request(index, prompt(6), index, sampling) for index in range(num_draws)])
    with torch.no_grad():
        logits = kind.model(torch.tensor([prompt(6)], device=kind.model.device)).logits[0, -1].double().cpu()
    expected = (logits / 1.5).softmax(-1) * num_draws
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in done]), minlength=len(expected)).double()
    often = expected >= 5
    if not bool(often.all()):
        counts = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([expected[often], expected[~often].sum()[None]])
    degrees = len(counts) - 1
    assert degrees > 10
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)
    assert not kind.shares_prefills or engine.stats.num_tokens_prefilled == 8 * 6


def test_budgets_are_written_in_full_and_eos_ends_a_completion(kind):
    eos = range(0, 200, 12)
    asked = [
        Request(index, prompt(3 + index % 5, index), index, SamplingParams(1 + index % 9, ignore_eos=True))
        for index in range(24)
    ]
    endless = kind.engine(eos=eos).generate(asked)
    assert [len(one.token_ids) for one in endless] == [1 + index % 9 for index in range(24)]
    assert {one.finish_reason for one in endless} == {"length"}
    heeding = [replace(one, sampling=replace(one.sampling, ignore_eos=False)) for one in asked]
    ends = set()
    for whole, one in zip(endless, kind.engine(eos=eos).generate(heeding), strict=True):
        first = next((index + 1 for index, token in enumerate(whole.token_ids) if token in eos), None)
        assert one.token_ids == whole.token_ids[:first]
        assert one.finish_reason == ("length" if first is None else "stop")
        assert len(one.logprobs) == len(one.token_ids)
        assert one.segments == (Segment(0, 0, len(one.token_ids)),)
        ends.add(
            "none" if first is None else "first" if first == 1 else "budget" if whole.token_ids[first:] == () else ""
        )
    assert ends == {"none", "first", "budget", ""}


@pytest.mark.parametrize(("max_seq_len", "num_prompt"), [(32, 20), (33, 5), (48, 47), (17, 1)])
def test_prompt_and_budget_may_fill_the_cache(kind, max_seq_len, num_prompt):
    sampling = SamplingParams(max_seq_len - num_prompt)
    asked = [Request(index, prompt(num_prompt, index), index, sampling) for index in range(5)]
    tight = kind.engine(max_slots=3, max_seq_len=max_seq_len).generate(asked)
    roomy = kind.engine(max_slots=8, max_seq_len=256).generate(asked)
    assert [one.token_ids for one in tight] == [one.token_ids for one in roomy]
    assert {len(one.token_ids) for one in tight} == {sampling.max_new_tokens}


def test_siblings_share_a_prefill_and_no_slot_idles(kind):
    engine = kind.engine(max_slots=4)
    budgets = (9, 2, 7, 1, 3, 12, 4, 4)
    asked = [
        Request(index, prompt(10, index // 4), index, SamplingParams(budget)) for index, budget in enumerate(budgets)
    ]
    engine.submit(asked[:4])
    engine.step()
    assert not kind.shares_prefills or engine.stats.num_tokens_prefilled == 10
    engine.submit(asked[4:])
    while engine.num_unfinished:
        waiting, before = engine.num_unfinished > 4, engine.stats.num_tokens_generated
        engine.step()
        assert not waiting or engine.stats.num_tokens_generated - before >= 4, "a slot idled while requests waited"
    assert engine.stats.num_tokens_generated == sum(budgets)
    assert engine.stats.num_slot_steps == sum(budgets) - len(budgets), "a finished or an empty slot was decoded"
    assert engine.stats.num_steps <= sum(budgets) / 4 + max(budgets)
    assert (engine.stats.num_policy_loads, engine.policy_version) == (0, 0)


def test_completions_come_as_soon_as_they_finish(kind):
    engine = kind.engine(max_slots=4)
    engine.submit([Request(index, prompt(4), index, SamplingParams(budget)) for index, budget in enumerate((1, 2, 5))])
    assert [one.request_id for one in engine.step()] == [0, 1]
    assert engine.num_unfinished == 1
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]
    assert engine.step() == []
    assert engine.num_unfinished == 0


def finished(reason="stop", num_tokens=2) -> Completion:
    return Completion(7, (5,) * num_tokens, (-1.0,) * num_tokens, (Segment(0, 0, num_tokens),), reason)


GOOD = Request(7, (1, 2, 3), 0, SamplingParams(8))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (replace(GOOD, request_id=1), "already in the engine"),
        (replace(GOOD, prompt_ids=()), "empty prompt"),
        (replace(GOOD, prompt_ids=(1, 203)), "outside the vocabulary"),
        (replace(GOOD, prompt_ids=(-1, 1)), "outside the vocabulary"),
        (replace(GOOD, seed=1 << 64), "64-bit"),
        (replace(GOOD, seed=-1), "64-bit"),
        (replace(GOOD, sampling=SamplingParams(94)), "needs 97 tokens"),
        (replace(GOOD, partial=finished("stop")), "already finished"),
        (replace(GOOD, partial=finished("length")), "already finished"),
        (replace(GOOD, partial=finished("aborted", num_tokens=8)), "already finished"),
        (replace(GOOD, partial=replace(finished("aborted"), logprobs=(-1.0,))), "1 log-prob"),
        (replace(GOOD, partial=replace(finished("aborted"), token_ids=(5, 203))), "outside the vocabulary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_submit_refuses_and_queues_nothing(kind, bad, message):
    engine = kind.engine()
    engine.submit([replace(GOOD, request_id=1), replace(GOOD, request_id=2)])
    with pytest.raises(ValueError, match=message):
        engine.submit([replace(GOOD, request_id=3), bad])
    assert engine.num_unfinished == 2
    engine.submit([replace(GOOD, request_id=3, sampling=SamplingParams(93))])
    engine.abort()
    engine.submit([replace(GOOD, request_id=1)])


def test_one_submission_may_not_name_an_id_twice(kind):
    with pytest.raises(ValueError, match="already in the engine"):
        kind.engine().submit([GOOD, GOOD])


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": -0.1}, {"max_new_tokens": 1, "top_p": 0.0},
        {"max_new_tokens": 1, "top_p": 1.1}, {"max_new_tokens": 1, "top_k": -1},
    ],
)  # fmt: skip
def test_sampling_refuses_values_without_meaning(bad):
    with pytest.raises(ValueError, match="must"):
        SamplingParams(**bad)


def test_close_drops_everything_and_may_be_called_twice(kind):
    engine = kind.engine()
    engine.submit([GOOD])
    engine.step()
    engine.close()
    engine.close()
