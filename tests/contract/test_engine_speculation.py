"""The contract of `swarm.engine.base.Engine`: drafters change how fast completions are written, and nothing else.

What an engine writes without drafters is the truth; with any drafter, in any batch, it has to write the same tokens
with the same log-probabilities.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.drafting.base import Drafter
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import Strategy, StrategyTuner
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import slot_pass
from swarm.engine.torch.generic import GenericRunner
from swarm.engine.torch.slots import Slots
from swarm.types import Completion, Segment

pytestmark = pytest.mark.speculation

VOCABULARY = 203
EOS = tuple(range(2, 200, 27))
REQUESTS = (
    Request(0, (5, 9, 14, 3), 1, SamplingParams(40)),
    Request(1, (5, 9, 14, 3), (1 << 64) - 5, SamplingParams(37, ignore_eos=True)),
    Request(2, (7,) * 16, 3, SamplingParams(36, temperature=0.7)),
    Request(3, tuple(range(40, 73)), 4, SamplingParams(30, temperature=1.4, top_k=40)),
    Request(4, (5, 9, 14, 3), 5, SamplingParams(34, top_p=0.9, ignore_eos=True)),
    Request(5, (100,), 6, SamplingParams(30, top_p=0.7, top_k=30)),
    Request(6, tuple(range(15)), 7, SamplingParams(16, temperature=0)),
    Request(7, (100, 101), 8, SamplingParams(1)),
    Request(8, (100, 101, 102), 9, SamplingParams(2, temperature=0)),
)
ANY = settings(
    max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Scripted(Drafter):
    """Proposes the true next tokens, but each with a chance of being any other; and nothing now and then."""

    name = "scripted"

    def __init__(self, truth, share_right: float, seed: int = 0) -> None:
        self.truth, self.share_right, self.rng = truth, share_right, np.random.default_rng(seed)
        self.seen = []  # (what was drafted, how much was kept, the truth from there on)

    def propose(self, states, depth, budget, worth=None):
        drafts = []
        for state in states:
            # a resumed request has another id than the one whose truth is known
            ahead = self.truth[state.request_id % 100].token_ids[state.num_written :]
            assert tuple(state.tokens[len(state.prompt_ids) :]) + ahead == self.truth[state.request_id % 100].token_ids
            most = min(depth, state.room, budget)
            perfect = self.share_right == 1
            num = min(most, len(ahead)) if perfect else int(self.rng.integers(0, most + 1))
            right = self.rng.random(num) < self.share_right
            noise = self.rng.integers(0, VOCABULARY, num).tolist()
            draft = [ahead[i] if i < len(ahead) and right[i] else noise[i] for i in range(num)]
            budget -= num
            drafts.append(draft)
        return drafts

    def verified(self, state, draft, num_kept):
        ahead = self.truth[state.request_id % 100].token_ids[state.num_written :]
        pairs = zip(draft, ahead, strict=False)
        expected = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(draft), len(ahead)))
        assert num_kept == expected

    def observe(self, state):
        self.seen.append(tuple(state.tokens))


@cache
def written(kind) -> dict[int, Completion]:
    """What each request writes alone, without drafters."""
    return {one.request_id: kind.engine(max_slots=1, eos=EOS).generate([one])[0] for one in REQUESTS}


def engine_with(kind, drafter, max_slots=4, depth=6, num_verified=24):
    return kind.engine(
        max_slots=max_slots, eos=EOS, speculator=Speculator([drafter], Strategy(drafter.name, depth, num_verified))
    )


def all_same(kind, done, truth) -> None:
    for completion in done:
        kind.check_same(completion, truth[completion.request_id])


@given(
    order=st.permutations(REQUESTS), max_slots=st.integers(1, 9), depth=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
@ANY
def test_any_drafter_leaves_completions_as_they_are(kind, order, max_slots, depth, share, seed):
    truth = written(kind)
    drafter = Scripted(truth, share, seed)
    for completion in engine_with(kind, drafter, max_slots, depth).generate(order):
        kind.check_same(completion, truth[completion.request_id])
    assert len(drafter.seen) == len(order)


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_every_family_is_left_as_it_is(exact_kind, share):
    truth = written(exact_kind)
    engine = engine_with(exact_kind, Scripted(truth, share), max_slots=5)
    for completion in engine.generate(REQUESTS):
        exact_kind.check_same(completion, truth[completion.request_id])
    stats = engine.stats
    assert stats.num_tokens_generated == sum(len(one.token_ids) for one in truth.values())
    assert (stats.num_draft_tokens, stats.num_draft_tokens_kept) == (0, 0)
    assert stats.num_speculated_tokens > 100
    assert stats.num_speculated_tokens_kept == stats.num_speculated_tokens or share < 1


def test_a_perfect_drafter_saves_its_share_of_the_steps(kind):
    engine = engine_with(kind, Scripted(written(kind), 1.0), max_slots=1, depth=7)
    engine.generate([REQUESTS[1]])
    # the first token comes with the prefill; then eight tokens a step
    assert engine.stats.num_steps == -(-36 // 8)


@pytest.mark.parametrize("drafter", [NgramDrafter, SuffixDrafter])
def test_the_real_drafters(kind, drafter):
    """A group that says much the same, and one sequence that repeats itself."""
    group = [Request(i, (5, 9, 14, 3), 40 + i % 2, SamplingParams(40, temperature=0.3)) for i in range(4)]
    group.append(Request(9, (7, 8, 9) * 6, 5, SamplingParams(40, temperature=0, ignore_eos=True)))
    plain = kind.engine(max_slots=2, eos=EOS).generate(group)
    engine = engine_with(kind, drafter(), max_slots=2)
    for completion, truth in zip(engine.generate(group), plain, strict=True):
        kind.check_same(completion, truth)
    if drafter is SuffixDrafter:  # requests 2 and 3 write what 0 and 1 have written
        assert engine.stats.num_speculated_tokens_kept > 20


def test_interrupted_under_drafts_and_resumed(kind):
    truth = written(kind)
    engine = engine_with(kind, Scripted(truth, 0.8), max_slots=5)
    engine.submit(REQUESTS)
    done = {one.request_id: one for _ in range(4) for one in engine.step()}
    partial = {one.request_id: one for one in engine.abort() if one.token_ids}
    missing = [one for one in REQUESTS if one.request_id not in done]
    again = [replace(one, request_id=100 + one.request_id, partial=partial.get(one.request_id)) for one in missing]
    for completion in engine.generate(again):
        number = completion.request_id - 100
        kind.check_same(replace(completion, request_id=number), truth[number])
    for number, completion in done.items():
        kind.check_same(completion, truth[number])
    assert any(partial.values())


def test_new_weights_take_effect_between_two_verifications(kind):
    """Tokens before the change are the old policy's, those after it what the new one writes after these."""
    truth = written(kind)
    engine = engine_with(kind, Scripted(truth, 1.0), max_slots=1)
    engine.submit([REQUESTS[1]])
    engine.step()
    engine.load_policy(kind.other_model(1).state_dict(), 5)
    engine.speculator.drafters = {"scripted": NgramDrafter()}
    [completion] = list(iter_done(engine))
    first, second = completion.segments
    assert (first, second.policy_version) == (Segment(0, 0, first.end), 5)
    assert completion.token_ids[: first.end] == truth[1].token_ids[: first.end]
    plain = kind.engine(max_slots=1, eos=EOS, seed=1)
    kept = replace(
        truth[1], token_ids=truth[1].token_ids[: first.end], logprobs=truth[1].logprobs[: first.end],
        segments=(first,), finish_reason="aborted",
    )  # fmt: skip
    [expected] = plain.generate([replace(REQUESTS[1], partial=kept)])
    assert completion.token_ids == expected.token_ids


def test_nothing_is_known_of_a_sequence_that_was_given_back(kind):
    """Neither of one that ran nor of one that new weights sent back to wait."""
    engine = engine_with(kind, Scripted(written(kind), 1.0), max_slots=2, depth=2)
    engine.submit(REQUESTS[:4])
    engine.step()
    engine.load_policy(kind.model.state_dict(), 0)
    engine.abort([0])
    engine.step()
    engine.abort()
    assert engine.speculator._states == {}


def iter_done(engine):
    while engine.num_unfinished:
        yield from engine.step()


def test_a_tuner_may_change_its_mind_at_every_step(kind):
    truth, now = written(kind), iter(np.random.default_rng(0).random(100_000).cumsum())
    tuner = StrategyTuner([Strategy("scripted", 3, 12), Strategy("scripted", 8, 30)])
    engine = kind.engine(
        max_slots=3, eos=EOS, speculator=Speculator([Scripted(truth, 0.9)], tuner, clock=lambda: float(next(now)))
    )
    for _ in range(3):
        all_same(kind, engine.generate(REQUESTS), truth)
    assert 0 < engine.stats.num_speculated_tokens


def keeps_one_too_many(slots, running, draft, tokens, logprobs, verify=Slots.verify):
    differs = [i for i, token in enumerate(draft) if token != tokens[i]]
    if differs:
        tokens = tokens.copy()
        tokens[differs[0]] = draft[differs[0]]
    return verify(slots, running, draft, tokens, logprobs)


def keeps_one_too_few(slots, running, draft, tokens, logprobs, verify=Slots.verify):
    before = int(slots.cached[running.slot])
    outcome = verify(slots, running, draft, tokens, logprobs)
    slots.cached[running.slot] = max(before, slots.cached[running.slot] - 1)
    return outcome


def gives_logprobs_of_the_token_before(slots, running, draft, tokens, logprobs, verify=Slots.verify):
    return verify(slots, running, draft, tokens, np.roll(logprobs, 1))


@pytest.mark.inside_torch
@pytest.mark.parametrize("wrong", [keeps_one_too_many, keeps_one_too_few, gives_logprobs_of_the_token_before])
def test_a_wrong_verifier_does_not_pass(kind, monkeypatch, wrong):
    truth = written(kind)
    monkeypatch.setattr(Slots, "verify", wrong)
    drafter = Scripted(truth, 0.7)
    monkeypatch.setattr(drafter, "propose", lambda *args, propose=drafter.propose: unchecked(drafter, propose, *args))
    monkeypatch.setattr(drafter, "verified", lambda *_: None)
    done = engine_with(kind, drafter).generate(REQUESTS)
    with pytest.raises(AssertionError):
        all_same(kind, done, truth)


def unchecked(drafter, propose, states, depth, budget, worth):
    """Draft also for sequences that have left the truth."""
    try:
        return propose(states, depth, budget)
    except AssertionError:
        return [[1] * min(depth, state.room, budget // len(states)) for state in states]


@pytest.mark.inside_torch
def test_noise_of_another_position_does_not_pass(kind, monkeypatch):
    truth, engine = written(kind), engine_with(kind, drafter := Scripted(written(kind), 1.0))
    monkeypatch.setattr(engine, "_draw", lambda logits, rows, ahead=0, draw=engine._draw: draw(logits, rows))

    def of_the_first(logits, seeds, positions, *rest, draw=slot_pass.sample_by_operations, **more):
        first = torch.where(seeds[:, None] == seeds, positions, positions.max()).amin(1)
        return draw(logits, seeds, first, *rest, **more)

    monkeypatch.setattr(slot_pass, "sample_by_operations", of_the_first)
    monkeypatch.setattr(drafter, "propose", lambda *args, propose=drafter.propose: unchecked(drafter, propose, *args))
    monkeypatch.setattr(drafter, "verified", lambda *_: None)
    done = engine.generate(REQUESTS)
    with pytest.raises(AssertionError):
        all_same(kind, done, truth)


@pytest.mark.parametrize("draft", [[VOCABULARY], [-1], [1] * 40])
def test_a_draft_that_cannot_be_is_a_bug_and_is_not_run(kind, monkeypatch, draft):
    drafter = Scripted(written(kind), 1.0)
    monkeypatch.setattr(drafter, "propose", lambda states, *_: [draft for _ in states])
    with pytest.raises(ValueError, match="a drafter proposes"):
        engine_with(kind, drafter).generate([REQUESTS[1]])


class Watching(Scripted):
    """Remembers the policy's states after each position of each sequence."""

    num_states = 8

    def __init__(self, truth) -> None:
        super().__init__(truth, 0.8)
        self.shown = {}

    def saw(self, seen, states):
        for one in seen():
            for at in range(one.num):
                self.shown[one.request_id, one.first + at] = states[one.row + at].float().cpu()

    def verified(self, state, draft, num_kept):
        """Forget the states after tokens that are not the sequence's."""
        for at in range(num_kept, len(draft)):
            self.shown.pop((state.request_id, len(state.tokens) + at), None)


def test_drafters_are_shown_the_states_after_the_tokens(kind):
    if kind.setup.runner is GenericRunner:
        pytest.skip("its rows are logits: it runs the models that no learned drafter fits")
    truth = written(kind)
    drafter = Watching(truth)
    engine_with(kind, drafter, max_slots=4).generate(REQUESTS)
    num_seen = 0
    for request in REQUESTS:
        tokens = torch.tensor([request.prompt_ids + truth[request.request_id].token_ids], device=kind.model.device)
        with torch.no_grad():
            states = kind.model.model(tokens).last_hidden_state[0].float().cpu()
        for at in range(len(request.prompt_ids) - 1, tokens.shape[1] - 1):
            shown = drafter.shown.get((request.request_id, at))
            if shown is not None:
                num_seen += 1
                atol = 0.1 if kind.setup.dtype == torch.bfloat16 else 1e-3
                torch.testing.assert_close(shown, states[at], atol=atol, rtol=0.02)
    assert num_seen > 100
