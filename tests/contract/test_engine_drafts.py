"""The contract of `swarm.engine.base.Engine`: a draft changes how fast a completion is written, and nothing else.

What a policy writes from scratch is the truth; from any draft, in any batch, it has to write the same.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.engine.base import Request, SamplingParams
from swarm.types import Completion, Segment

pytestmark = pytest.mark.drafts

EOS = tuple(range(2, 200, 27))
REQUESTS = (
    Request(0, (5, 9, 14, 3), 1, SamplingParams(40)),
    Request(1, (5, 9, 14, 3), (1 << 64) - 5, SamplingParams(17, ignore_eos=True)),
    Request(2, (7,) * 16, 3, SamplingParams(36, temperature=0.7)),
    Request(3, tuple(range(40, 73)), 4, SamplingParams(30, temperature=1.4, top_k=40)),
    Request(4, (5, 9, 14, 3), 5, SamplingParams(34, top_p=0.9, ignore_eos=True)),
    Request(5, (100,), 6, SamplingParams(30, top_p=0.7, top_k=30)),
    Request(6, tuple(range(15)), 7, SamplingParams(16, temperature=0)),
    Request(7, (100, 101), 8, SamplingParams(1)),
)
ANY = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def near_model(kind):
    """The first model after a small update: most tokens stay, some do not."""
    near, away = kind.other_model(0).state_dict(), kind.other_model(1).state_dict()
    return {name: tensor + 0.02 * (away[name] - tensor) for name, tensor in near.items()}


@cache
def engine_of(kind, max_slots: int):
    """An engine with the updated weights, which serves many examples."""
    engine = kind.engine(max_slots=max_slots, eos=EOS)
    engine.load_policy(near_model(kind), 3)
    return engine


@cache
def written(kind, updated: bool) -> dict[int, Completion]:
    """What each request writes alone, from scratch, under the old weights and under the updated ones."""
    engine = kind.engine(max_slots=1, eos=EOS)
    if updated:
        engine.load_policy(near_model(kind), 3)
    return {request.request_id: engine.generate([request])[0] for request in REQUESTS}


def common(first, second) -> int:
    """How many tokens two completions begin with alike."""
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(first.token_ids))


def test_the_update_keeps_some_prefixes_and_cuts_others(exact_kind):
    old, new = written(exact_kind, False), written(exact_kind, True)
    shares = [common(old[index], new[index]) / len(old[index].token_ids) for index in old]
    assert 0.05 < sum(shares) / len(shares) < 0.95
    assert sum(0 < share < 1 for share in shares) >= 2


@given(order=st.permutations(REQUESTS), max_slots=st.integers(1, 6), data=st.data())
@ANY
def test_resumed_under_a_new_policy_is_written_from_scratch_under_it(kind, order, max_slots, data):
    """Any part of what the old policy wrote, in any batch, interrupted anywhere."""
    old, new, engine = written(kind, False), written(kind, True), engine_of(kind, max_slots)
    nums = {one.request_id: data.draw(st.integers(0, len(old[one.request_id].token_ids))) for one in order}
    asked = {one.request_id: replace(one, draft=old[one.request_id].token_ids[: nums[one.request_id]]) for one in order}
    engine.submit([asked[one.request_id] for one in order])
    done = {}
    for _ in range(data.draw(st.integers(0, 5))):
        done.update((one.request_id, one) for one in engine.step())
    for partial in engine.abort():
        request = asked[partial.request_id]
        started = bool(partial.token_ids)
        engine.submit([replace(request, partial=partial, draft=()) if started else request])
    while engine.num_unfinished:
        done.update((one.request_id, one) for one in engine.step())
    for index, completion in done.items():
        assert completion.segments == (Segment(3, 0, len(completion.token_ids)),)
        kind.check_same(completion, new[index])


@given(noise=st.lists(st.integers(0, 202), max_size=30), at=st.integers(0, 12), start=st.integers(0, 12))
@ANY
def test_a_draft_may_be_anything_and_may_follow_a_prefix_that_is_kept(kind, noise, at, start):
    truth = written(kind, True)
    drafted = []
    for request in REQUESTS:
        whole = truth[request.request_id]
        start_at = min(start, len(whole.token_ids) - 1)
        kept = replace(
            whole, token_ids=whole.token_ids[:start_at], logprobs=whole.logprobs[:start_at], finish_reason="aborted",
            segments=(Segment(3, 0, start_at),) if start_at else (),
        )  # fmt: skip
        draft = (whole.token_ids[start_at : start_at + at] + tuple(noise))[: request.sampling.max_new_tokens - start_at]
        drafted.append(replace(request, draft=draft, partial=kept if start_at else None))
    for completion in engine_of(kind, 5).generate(drafted):
        kind.check_same(completion, truth[completion.request_id])


def test_what_is_kept_is_counted_and_not_generated_again(exact_kind):
    old, new, engine = written(exact_kind, False), written(exact_kind, True), exact_kind.engine(max_slots=8, eos=EOS)
    engine.load_policy(near_model(exact_kind), 3)
    engine.generate([replace(request, draft=old[request.request_id].token_ids) for request in REQUESTS])
    kept = sum(common(old[index], new[index]) for index in old)
    assert engine.stats.num_draft_tokens == sum(len(one.token_ids) for one in old.values())
    assert engine.stats.num_draft_tokens_kept == kept
    assert engine.stats.num_tokens_generated == sum(len(one.token_ids) for one in new.values()) - kept


def test_a_draft_that_the_policy_wrote_itself_costs_one_pass(kind):
    engine, truth = engine_of(kind, 8), written(kind, True)
    generated, steps = engine.stats.num_tokens_generated, engine.stats.num_steps
    engine.submit([replace(request, draft=truth[request.request_id].token_ids) for request in REQUESTS])
    done = {one.request_id: one for one in engine.step()}
    assert done.keys() == truth.keys()
    for index, completion in done.items():
        kind.check_same(completion, truth[index])
    assert (engine.stats.num_tokens_generated, engine.stats.num_steps) == (generated, steps)


def test_a_draft_that_waits_is_left_to_who_gave_it(kind):
    engine = kind.engine(max_slots=1)
    engine.submit([replace(REQUESTS[0], draft=(4, 5)), replace(REQUESTS[1], draft=(4, 5))])
    engine.step()
    [running] = engine.abort([0])
    [waiting] = engine.abort([1])
    assert (len(running.token_ids) > 0, waiting.token_ids, waiting.segments) == (True, (), ())


def test_weights_that_come_after_the_verification_continue_what_it_kept(kind):
    """A verified draft is part of the completion: later weights do not look at it again."""
    engine, truth = kind.engine(max_slots=1, eos=EOS), written(kind, False)
    request = replace(REQUESTS[1], draft=truth[1].token_ids[:6])
    engine.submit([request])
    engine.step()
    engine.load_policy(near_model(kind), 3)
    [completion] = engine.step() if not engine.num_unfinished else [engine.abort()[0]]
    assert completion.token_ids[:8] == truth[1].token_ids[:8]
    assert completion.segments[0] == Segment(0, 0, 8)


def test_what_waits_is_returned_under_the_id_that_it_waits_under(kind):
    engine, whole = kind.engine(max_slots=1), written(kind, False)[1]
    kept = replace(whole, token_ids=whole.token_ids[:3], logprobs=whole.logprobs[:3], segments=(Segment(0, 0, 3),))
    engine.submit([REQUESTS[0], replace(REQUESTS[1], request_id=77, partial=replace(kept, finish_reason="aborted"))])
    engine.step()
    [waiting] = engine.abort([77])
    assert (waiting.request_id, waiting.token_ids, waiting.finish_reason) == (77, whole.token_ids[:3], "aborted")


def test_many_long_drafts_are_verified_in_several_passes(kind):
    truth, engine = written(kind, True), engine_of(kind, 8)
    passes, prefill = [], engine._runner.prefill
    engine._runner.prefill = lambda *args: (passes.append(args[2]), prefill(*args))[1]
    limit, engine._runner.max_prefill_rows = engine._runner.max_prefill_rows, 40
    try:
        done = engine.generate([replace(one, draft=truth[one.request_id].token_ids) for one in REQUESTS])
    finally:
        engine._runner.prefill, engine._runner.max_prefill_rows = prefill, limit
    assert len(passes) > 2
    assert all(sum(each) <= 40 or len(each) == 1 for each in passes)
    for completion in done:
        kind.check_same(completion, truth[completion.request_id])


@pytest.mark.parametrize(("draft", "message"), [((1,) * 9, "longer|more tokens"), ((1, 203), "outside the vocab")])
def test_drafts_that_cannot_be_are_refused(kind, draft, message):
    engine = kind.engine()
    with pytest.raises(ValueError, match=message):
        engine.submit([Request(7, (1, 2, 3), 0, SamplingParams(8), draft=draft)])
    assert engine.num_unfinished == 0


def test_bf16_keeps_what_it_draws_itself(bf16_kind):
    """Where rounding depends on the batch, near ties may break the other way; all else stays."""
    engine = bf16_kind.engine(max_slots=8)
    truth = engine.generate(list(REQUESTS))
    done = engine.generate([replace(r, draft=t.token_ids) for r, t in zip(REQUESTS, truth, strict=True)])
    alike = sum(common(one, other) for one, other in zip(truth, done, strict=True))
    assert alike >= (0.5 if not bf16_kind.batch_invariant else 1.0) * sum(len(one.token_ids) for one in truth)
    assert all(torch.tensor(one.logprobs).isfinite().all() for one in done)
