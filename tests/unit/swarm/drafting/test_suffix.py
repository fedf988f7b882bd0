"""The index over siblings: what it proposes, what it learns from, and what it holds."""

import numpy as np
import pytest

from swarm.drafting.base import SequenceState, extend_hashes
from swarm.drafting.contexts import NUM_CLASSES, ORDERS, ContextTable, draft
from swarm.drafting.suffix import SuffixDrafter

PROMPT = tuple(range(50, 60))


def state_of(written=(), *, prompt=PROMPT, number=0, room=99):
    state = SequenceState(number, prompt)
    state.append(written)
    state.room = room
    return state


def hashes_of(tokens):
    hashes = [0]
    extend_hashes(hashes, tokens)
    return hashes


@pytest.mark.parametrize("seed", range(4))
def test_a_table_counts_what_followed(seed):
    """Against a scan of all texts for the longest known context."""
    rng, table = np.random.default_rng(seed), ContextTable()
    texts = [rng.integers(0, 3, 60).tolist() for _ in range(4)]
    for text in texts:
        table.insert(text, hashes_of(text), 0, 25)
        table.insert(text, hashes_of(text), 25, 60)
    for _ in range(60):
        text = rng.integers(0, 3, rng.integers(3, 20)).tolist()
        if rng.random() < 0.5:
            text += texts[0][: rng.integers(1, 50)]
        tokens, chances, classes = draft([table], [], hashes_of(text), [0.9] * NUM_CLASSES, 6, 0.0)
        assert chances == pytest.approx([0.9 ** (i + 1) for i in range(len(tokens))])
        for token, kind in zip(tokens, classes, strict=True):
            followers = {}
            for order in ORDERS:
                for other in texts:
                    for end in range(order, len(other)):
                        if len(text) >= order and other[end - order : end] == text[-order:]:
                            followers[other[end]] = followers.get(other[end], 0) + 1
                if followers:
                    break
            assert ORDERS[kind // 4] == order
            assert followers[token] == max(followers.values())
            total = sum(followers.values())
            share = followers[token] / total
            assert kind % 4 == (0 if total == 1 else 1 if share == 1 else 2 if share >= 0.75 else 3)
            text.append(token)


def test_a_sibling_that_still_runs_is_followed():
    drafter, text = SuffixDrafter(), [1, 5, 2, 9, 4, 7, 3, 3, 8]
    ahead, behind = state_of(text, number=1), state_of(text[:3], number=2)
    assert drafter.propose([ahead, behind], 4, 99)[1] == text[3:7]
    ahead.append([6, 6])
    behind.append(text[3:9])
    assert drafter.propose([ahead, behind], 4, 99)[1] == [6, 6]


def test_finished_siblings_and_rollouts_from_elsewhere_are_followed_after_new_weights_too():
    drafter = SuffixDrafter()
    drafter.observe(state_of([1, 2, 3, 4, 5], number=1))
    drafter.learn([9, 9, 9, 9], [4, 3, 2, 1])
    drafter.policy_changed(1)
    first, other = state_of([1, 2], number=2), state_of([4], prompt=(9, 9, 9, 9), number=3)
    assert drafter.propose([first, other], 9, 99) == [[3, 4, 5], [3, 2, 1]]


def test_how_others_went_on_is_followed_until_siblings_know_better():
    drafter, other = SuffixDrafter(), (50, 51)
    drafter.observe(state_of([1, 2, 3, 4, 5], number=1))
    drafter.propose([state_of([], number=2)], 9, 99)  # indexed when its prompt is asked for
    first = state_of([1, 2], prompt=other, number=3)
    assert drafter.propose([first], 9, 99) == [[3, 4, 5]]
    drafter.observe(state_of([1, 2, 8, 9], prompt=other, number=4))
    for _ in range(40):
        [found] = drafter.propose([first], 9, 99)
        drafter.verified(first, found, len(found) if found[0] == 8 else 0)
    assert drafter.propose([first], 9, 99) == [[8, 9]]


def test_what_is_common_is_bounded_and_the_newest_stays():
    drafter = SuffixDrafter(max_tokens=400)
    for number in range(60):
        state = state_of(range(100 * number, 100 * number + 50), prompt=(number, 7), number=number)
        drafter.propose([state], 4, 99)
        drafter.observe(state)
        held = sum(len(level) for table in drafter._common.tables for level in table._levels)
        assert held <= 3 * (400 + 100)
    news = [drafter.propose([state_of([at, at + 1], prompt=(9, 9), number=99)], 2, 9)[0] for at in (5910, 5810, 10)]
    assert news == [[5912, 5913], [5812, 5813], []]


def test_long_texts_are_indexed_a_bit_at_a_time_and_all_of_them_in_the_end():
    drafter, text = SuffixDrafter(), list(range(1000, 1300))
    drafter.learn(PROMPT, text)
    state = state_of(text[:290], number=1)
    nums = [len(drafter.propose([state], 4, 99)[0]) for _ in range(6)]
    assert nums[0] == 0
    assert nums[-1] == 4


def test_drafts_become_short_where_they_are_refused_and_long_where_they_are_kept():
    drafter, rng = SuffixDrafter(), np.random.default_rng(0)
    text = rng.integers(0, 1000, 400).tolist()
    drafter.learn(PROMPT, text)
    state = state_of(text[:300], number=1)
    for _ in range(8):
        [before] = drafter.propose([state], 32, 99)
    for _ in range(100):
        drafter.verified(state, before, 0)
        [draft] = drafter.propose([state], 32, 99)
    assert len(draft) < len(before) < 32
    for _ in range(3000):
        [draft] = drafter.propose([state], 32, 99)
        drafter.verified(state, draft or before, len(draft))
        if not draft:
            drafter.policy_changed(1)
    assert len(draft) == 32


def test_a_short_budget_goes_to_the_likeliest_tokens():
    drafter = SuffixDrafter()
    sure, unsure = tuple(range(100, 130)), tuple(range(200, 230))
    for _ in range(6):
        drafter.learn(sure, [1, 2, 3, 4, 5, 6])
    for last in range(6):
        drafter.learn(unsure, [1, 2, last, 4, 5, 6])
    states = [state_of([1, 2], prompt=sure, number=1), state_of([1, 2], prompt=unsure, number=2)]
    for _ in range(10):
        drafts = drafter.propose(states, 4, 99)
    assert min(map(len, drafts)) > 0
    for _ in range(100):
        drafts = drafter.propose(states, 4, 99)
        drafter.verified(states[0], drafts[0], len(drafts[0]))
        drafter.verified(states[1], drafts[1], 0)
    assert list(map(len, drafter.propose(states, 4, 4))) == [4, 0]


def test_room_and_depth_are_limits():
    drafter = SuffixDrafter()
    drafter.learn(PROMPT, [1, 2, 3, 4, 5])
    assert drafter.propose([state_of([1], room=2)], 4, 99) == [[2, 3]]
    assert drafter.propose([state_of([1], room=0)], 4, 99) == [[]]
    assert drafter.propose([state_of([1], room=-1)], 4, 99) == [[]]


def test_memory_is_bounded_and_what_is_used_stays():
    drafter, rng = SuffixDrafter(max_tokens=2000), np.random.default_rng(0)
    kept = state_of([1, 2, 3], number=7)
    for number in range(200):
        drafter.propose([kept], 4, 99)
        prompt = (number, 1, 2, 3)
        state = state_of(rng.integers(0, 99, 300).tolist(), prompt=prompt, number=number + 100)
        drafter.propose([state], 4, 99)
        drafter.observe(state)
        drafter.learn(prompt, [1] * 50)
        assert drafter.num_tokens <= 2000
    assert drafter.num_tokens == sum(prompt.num_tokens for prompt in drafter._prompts.values())
    assert 1 < len(drafter._prompts) < 10


def test_one_prompt_that_is_too_large_keeps_its_newer_half():
    drafter = SuffixDrafter(max_tokens=1000)
    for start in range(0, 12_000, 100):
        drafter.learn(PROMPT, list(range(start, start + 100)))
        assert drafter.num_tokens <= 1000
    state = state_of(list(range(11_900, 11_950)), number=1)
    for _ in range(40):
        [draft] = drafter.propose([state], 3, 99)
    assert draft == [11_950, 11_951, 11_952]
