"""The contract of `swarm.engine.base.Engine`: a completion does not notice its batch, its slots or interruptions.

What one request alone in a fresh engine writes is the truth; everything else has to write the same.
"""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.engine.base import Engine, Request, SamplingParams
from swarm.types import Completion, Segment

EOS = tuple(range(2, 200, 27))
REQUESTS = (
    Request(0, (5, 9, 14, 3), 1, SamplingParams(20)),
    Request(1, (5, 9, 14, 3), (1 << 64) - 5, SamplingParams(17)),
    Request(2, (7,) * 16, 3, SamplingParams(12, temperature=0.7)),
    Request(3, tuple(range(40, 73)), 4, SamplingParams(9, temperature=1.4, top_k=40)),
    Request(4, (5, 9, 14, 3), 5, SamplingParams(14, top_p=0.9)),
    Request(5, (100,), 6, SamplingParams(30)),
    Request(6, tuple(range(15)), 7, SamplingParams(6, temperature=0)),
    Request(7, (100, 101), 8, SamplingParams(1)),
)
PLANS = st.lists(
    st.tuples(st.integers(0, 7), st.sets(st.integers(0, len(REQUESTS) - 1)), st.booleans()), min_size=1, max_size=6
)
ANY_BATCH = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def engine_of(kind, max_slots: int) -> Engine:
    """One engine serves many examples: nothing of an earlier one may show."""
    return kind.engine(max_slots=max_slots, eos=EOS)


@cache
def alone(kind) -> dict[int, Completion]:
    """What each request writes with an engine to itself."""
    return {request.request_id: kind.engine(max_slots=1, eos=EOS).generate([request])[0] for request in REQUESTS}


def test_the_requests_show_something(exact_kind):
    done = alone(exact_kind)
    assert sum(len(one.token_ids) for one in done.values()) > 60
    assert {one.finish_reason for one in done.values()} == {"stop", "length"}


@given(max_slots=st.integers(1, 6), order=st.permutations(REQUESTS))
@ANY_BATCH
def test_in_any_batch_and_any_order(kind, max_slots, order):
    for completion in engine_of(kind, max_slots).generate(order):
        kind.check_same(completion, alone(kind)[completion.request_id])


@given(max_slots=st.integers(1, 6), order=st.permutations(REQUESTS), plan=PLANS)
@ANY_BATCH
def test_interrupted_at_any_step_and_resumed(kind, max_slots, order, plan):
    """Each item of the plan: decode some steps, abort some requests, put them back now or at the end."""
    engine, done, held = engine_of(kind, max_slots), {}, []
    asked = {request.request_id: request for request in order}
    engine.submit(order)
    for num_steps, chosen, at_once in plan:
        for _ in range(num_steps):
            done.update((one.request_id, one) for one in engine.step())
        partials = engine.abort(chosen)
        assert {one.request_id for one in partials} == chosen - done.keys() - {one.request_id for one in held}
        for partial in partials:
            assert partial.finish_reason == "aborted"
            whole, num = alone(kind)[partial.request_id], len(partial.token_ids)
            assert partial.token_ids == whole.token_ids[:num]
            assert len(partial.logprobs) == num
            assert partial.segments == ((Segment(0, 0, num),) if num else ())
        resumed = [replace(asked[partial.request_id], partial=partial) for partial in partials]
        if at_once:
            engine.submit(resumed)
        else:
            held += resumed
    engine.submit(held)
    while engine.num_unfinished:
        done.update((one.request_id, one) for one in engine.step())
    assert done.keys() == asked.keys()
    for completion in done.values():
        kind.check_same(completion, alone(kind)[completion.request_id])


def test_abort_takes_what_is_named(kind):
    engine = kind.engine(max_slots=2)
    engine.submit(REQUESTS[:5])
    engine.step()
    assert engine.abort([99]) == []
    assert engine.abort([]) == []
    assert {one.request_id for one in engine.abort([0, 4])} == {0, 4}
    assert engine.num_unfinished == 3
    assert {one.request_id for one in engine.abort()} == {1, 2, 3}
    assert (engine.num_unfinished, engine.step()) == (0, [])


@pytest.mark.parametrize("max_slots", [2, 8])
def test_new_weights_in_flight(exact_kind, max_slots):
    """Requests go on under the new weights exactly like partial completions given to a fresh engine of them."""
    requests = [replace(one, sampling=replace(one.sampling, ignore_eos=True)) for one in REQUESTS]
    engine, before = exact_kind.engine(max_slots=max_slots), exact_kind.engine(max_slots=max_slots)
    for each in (engine, before):
        each.submit(requests)
        for _ in range(4):
            each.step()
    partials = {one.request_id: one for one in before.abort()}
    engine.load_policy(exact_kind.other_model(1).state_dict(), 3)
    assert (engine.policy_version, engine.stats.num_policy_loads) == (3, 1)
    assert engine.num_unfinished == len(partials)
    after = exact_kind.engine(max_slots=1, seed=1)
    resumed = [
        replace(one, partial=partials[one.request_id] if partials[one.request_id].token_ids else None)
        for one in requests
        if one.request_id in partials
    ]
    expected = {one.request_id: one for one in after.generate(resumed)}
    assert [one.token_ids for one in before.generate(resumed)] != [one.token_ids for one in expected.values()]
    while engine.num_unfinished:
        for one in engine.step():
            num, whole = len(partials[one.request_id].token_ids), expected[one.request_id]
            assert (one.token_ids, one.finish_reason) == (whole.token_ids, whole.finish_reason)
            assert one.logprobs == pytest.approx(whole.logprobs, abs=1e-4)
            written = Segment(3, num, len(one.token_ids))
            assert one.segments == ((Segment(0, 0, num), written) if num else (written,))


def test_every_policy_that_wrote_is_named(kind):
    engine = kind.engine()
    engine.submit([replace(REQUESTS[0], sampling=SamplingParams(9)), replace(REQUESTS[5], sampling=SamplingParams(9))])
    states = [kind.other_model(seed).state_dict() for seed in (0, 1)]
    engine.step()  # the first token, from prefill, and one decoded
    engine.load_policy(states[1], 1)
    engine.step()
    engine.load_policy(states[0], 2)
    engine.load_policy(states[1], 5)
    engine.step()
    partials = engine.abort()
    assert {one.segments for one in partials} == {(Segment(0, 0, 2), Segment(1, 2, 4), Segment(5, 4, 6))}
    engine.submit([replace(REQUESTS[0], sampling=SamplingParams(9), partial=partials[0])])
    while engine.num_unfinished:
        for one in engine.step():
            assert one.segments == (Segment(0, 0, 2), Segment(1, 2, 4), Segment(5, 4, 9))


def test_the_engine_keeps_weights_of_its_own(kind):
    """The trainer goes on changing the tensors that it handed over."""
    state = {name: tensor.clone() for name, tensor in kind.other_model(1).state_dict().items()}
    engine, fresh = kind.engine(), kind.engine(seed=1)
    engine.load_policy(state, 1)
    for tensor in state.values():
        tensor.fill_(torch.nan)
    for got, expected in zip(engine.generate(REQUESTS), fresh.generate(REQUESTS), strict=True):
        assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(kind, name):
    engine = kind.engine()
    good = dict(kind.other_model(1).state_dict())
    with pytest.raises(ValueError, match=name):
        engine.load_policy({key: tensor for key, tensor in good.items() if key != name}, 1)
    with pytest.raises(ValueError, match=name):
        engine.load_policy({**good, name: good[name][:-1]}, 1)
    assert engine.policy_version == 0
    assert engine.generate(REQUESTS[:1])[0].token_ids == kind.engine().generate(REQUESTS[:1])[0].token_ids
