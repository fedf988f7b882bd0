"""What stands between an engine and its drafters."""

import pytest

from swarm.config import EngineConfig
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import DraftCounts, Speculator, make_speculator
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import OFF, Strategy, StrategyTuner

PROMPT = (1, 2, 3, 4)


def test_a_fixed_strategy_is_always_on():
    speculator = Speculator([SuffixDrafter()], Strategy("suffix", 2, 3))
    speculator.learn(PROMPT, [5, 6, 7, 8, 9])
    states = [speculator.state_of(number, PROMPT) for number in range(3)]
    for state in states:
        state.append([5])
        state.room = 9
    assert speculator.begin(3)
    drafts = speculator.propose(states, 10)
    assert sum(map(len, drafts)) == 3
    assert all(draft == [6, 7][: len(draft)] for draft in drafts)
    for state, draft in zip(states, drafts, strict=True):
        speculator.verified(state, draft, min(1, len(draft)))
    num_drafts = sum(map(bool, drafts))
    assert speculator.counts == {"suffix": DraftCounts(num_drafts, 3, num_drafts)}


def test_a_tuner_is_told_what_a_step_took():
    clock = iter([0.0, 2.0, 10.0, 11.0])
    tuner = StrategyTuner([Strategy("ngram", 4, 4)])
    speculator = Speculator([NgramDrafter()], tuner, clock=lambda: next(clock))
    for num_tokens in (3, 3):
        assert not speculator.begin(3)
        speculator.end(3, num_tokens)
    assert tuner.incumbents() == {3: OFF}
    progress, elapsed_s = tuner.state()["3"]["arms"]["off"][:2]
    assert elapsed_s == pytest.approx(3.0, rel=0.05)
    assert progress == pytest.approx(2.0, rel=0.05)


def test_a_sequence_that_has_ended_is_known_to_its_siblings_and_to_nobody_by_its_number():
    speculator = Speculator([SuffixDrafter()], Strategy("suffix", 9, 9))
    state = speculator.state_of(7, PROMPT)
    state.append([5, 6])
    speculator.observe(7, PROMPT, (5, 6, 7, 8))
    again = speculator.state_of(7, PROMPT)
    assert again.tokens == list(PROMPT)
    again.append([5])
    again.room = 9
    speculator.begin(1)
    assert speculator.propose([again], 10) == [[6, 7, 8]]


def test_a_strategy_needs_its_drafter():
    with pytest.raises(ValueError, match="no drafter 'ngram'"):
        Speculator([SuffixDrafter()], Strategy("ngram", 1, 1))


@pytest.mark.parametrize("mode", EngineConfig.model_fields["speculation"].annotation.__args__)
def test_every_mode_that_a_config_may_name(mode):
    class Head(NgramDrafter):
        name = "head"

    speculator = make_speculator(mode)
    if mode in ("off", "head"):  # nobody teaches one
        assert speculator is None
    else:
        assert set(speculator.drafters) == ({"suffix"} if mode == "auto" else {mode})
    if mode != "off":
        taught = make_speculator(mode, Head())
        assert set(taught.drafters) == ({"suffix", "head"} if mode == "auto" else {mode})
        assert isinstance(taught.strategy, StrategyTuner) == (mode == "auto")
