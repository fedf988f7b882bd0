"""Prompt lookup against looking at every place by hand."""

import numpy as np
import pytest

from swarm.drafting.base import HASH_BASE, HASH_MASK, SequenceState, extend_hashes
from swarm.drafting.ngram import NgramDrafter


def state_of(prompt, written=(), *, number=0, room=99):
    state = SequenceState(number, prompt)
    state.append(written)
    state.room = room
    return state


def by_hand(tokens, depth):
    """What followed the most recent earlier occurrence of the last 4, else 3, else 2 tokens."""
    for order in (4, 3, 2):
        for end in range(len(tokens) - 1, order - 1, -1):
            if tokens[end - order : end] == tokens[-order:] and len(tokens) >= order:
                return tokens[end : end + depth]
    return []


def test_hashes_of_windows_are_those_of_their_tokens():
    hashes, own = [0], [0]
    extend_hashes(hashes, [5, 0, 7, 5, 0])
    extend_hashes(own, [5, 0])
    for end in (2, 5):
        assert (hashes[end] - hashes[end - 2] * pow(HASH_BASE, 2)) & HASH_MASK == own[2]
    assert hashes[1] != hashes[0] != (hashes[2] - hashes[1] * HASH_BASE) & HASH_MASK


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_most_recent_longest_match_at_every_step(seed):
    rng, drafter, state = np.random.default_rng(seed), NgramDrafter(), state_of([1, 2])
    num_drafts = 0
    for _ in range(200):
        state.append(rng.integers(0, 4, rng.integers(1, 4)).tolist())
        [draft] = drafter.propose([state], 5, 50)
        assert draft == by_hand(state.tokens, 5)
        num_drafts += bool(draft)
    assert num_drafts > 100


def test_sequences_do_not_see_each_other_and_are_forgotten():
    drafter = NgramDrafter()
    one, other = state_of([1, 2, 3, 4, 1, 2], number=1), state_of([1, 2], number=2)
    assert drafter.propose([one, other], 2, 9) == [[3, 4], []]
    drafter.observe(one)
    assert drafter.propose([state_of([7, 1, 2], number=1)], 2, 9) == [[]]


def test_room_depth_and_budget_are_limits():
    states = [state_of([1, 2, 3, 4, 5, 6, 1, 2], number=i) for i in range(3)] + [state_of([8], number=8)]
    states[1].room = 1
    assert list(map(len, NgramDrafter().propose(states, 3, 99))) == [3, 1, 3, 0]
    lengths = list(map(len, NgramDrafter().propose(states, 3, 5)))
    assert sum(lengths) <= 5
    assert min(lengths[:3]) == 1
    states[0].room = states[2].room = 0
    assert NgramDrafter().propose(states, 3, 0) == [[], [], [], []]
