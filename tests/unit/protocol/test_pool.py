import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.pool import Pool, PoolEntry, author_cap, newcomer_cap

GROUP = SharedGroup(TaskRef("source", "0" * 32, 1, 2), (SharedCompletion("text", True),))


def entry(number: int, author: str = "a", created_at_s: float = 1000.0) -> PoolEntry:
    return PoolEntry(number.to_bytes(16), author, created_at_s, GROUP, b"frame", (1.0,), number)


def make(max_groups: int = 1000, seed: int = 0) -> Pool:
    return Pool(
        max_groups=max_groups, max_author_share=0.25, max_newcomer_share=0.25, freshness_s=600, rng=random.Random(seed)
    )


@given(
    authors=st.lists(st.sampled_from("abcdefgh"), max_size=60),
    wants=st.lists(st.integers(0, 20), min_size=1, max_size=8),
    newcomers=st.none() | st.sets(st.sampled_from("abcdefgh")),
    weights=st.none() | st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0, 1e6)),
    seed=st.integers(0, 1000),
)
def test_no_group_is_drawn_twice_and_no_cap_is_passed(authors, wants, newcomers, weights, seed):
    pool = make(seed=seed)
    for number, author in enumerate(authors):
        assert pool.add(entry(number, author))
    drawn_keys: set[bytes] = set()
    for num_groups in wants:
        contributing = {e.author for e in pool.entries()}
        before = len(pool)
        drawn = pool.sample(
            num_groups,
            1000.0,
            is_newcomer=None if newcomers is None else newcomers.__contains__,
            weight=None if weights is None else lambda e: weights.get(e.author, 1.0),
        )
        assert len(drawn) <= num_groups
        assert len(pool) == before - len(drawn)
        assert not drawn_keys & {e.key for e in drawn}
        drawn_keys |= {e.key for e in drawn}
        counts = Counter(e.author for e in drawn)
        if len(contributing) >= 4:
            assert max(counts.values(), default=0) <= max(1, num_groups // 4, -(-num_groups // len(contributing)))
        elif newcomers is None:
            assert len(drawn) == min(num_groups, before)
        if newcomers is not None:
            assert sum(counts[author] for author in newcomers) <= max(1, num_groups // 4)
        assert pool.num_by_author() == Counter(e.author for e in pool.entries())


def test_drawing_is_uniform_over_groups():
    counts = Counter[int]()
    for seed in range(3000):
        pool = make(seed=seed)
        for number in range(12):
            pool.add(entry(number, "abcdef"[number % 6]))
        counts.update(e.payload for e in pool.sample(6, 1000.0))
    # Each of 12 groups is one of 6 drawn: 1,500 expected, standard deviation below 28.
    assert max(abs(count - 1500) for count in counts.values()) < 5 * 28
    assert len(counts) == 12


def test_drawing_by_weight_is_as_if_one_group_after_another_was_drawn():
    weights, firsts, seconds = (1.0, 2.0, 5.0, 0.0), Counter[int](), Counter[int]()
    num_draws = 4000
    for seed in range(num_draws):
        pool = make(seed=seed)
        for number in range(4):
            pool.add(entry(number))
        first, second = (e.payload for e in pool.sample(2, 1000.0, weight=lambda e: weights[e.payload]))
        firsts[first] += 1
        seconds[second] += 1
    for number, weight in enumerate(weights):
        others = [one for index, one in enumerate(weights) if index != number]
        share = sum(one / 8 * weight / (8 - one) for one in others)  # the other one came first, then this one
        assert abs(firsts[number] / num_draws - weight / 8) < 5 * 0.5 / num_draws**0.5
        assert abs(seconds[number] / num_draws - share) < 5 * 0.5 / num_draws**0.5
    assert firsts[3] == seconds[3] == 0, "what weighs nothing comes after all others"


def test_what_weighs_nothing_is_drawn_where_nothing_else_is_left():
    pool = make()
    for number in range(3):
        pool.add(entry(number))
    assert len(pool.sample(5, 1000.0, weight=lambda e: 0.0)) == 3


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(weight):
    pool = make()
    pool.add(entry(1))
    with pytest.raises(ValueError, match="finite and not negative"):
        pool.sample(1, 1000.0, weight=lambda e: weight)


def test_a_quarter_from_one_author_while_four_contribute_and_all_while_three_do():
    pool = make()
    for number in range(40):
        pool.add(entry(number, "a"))
    for number, author in enumerate("bcde", start=40):
        pool.add(entry(number, author))
    counts = Counter(e.author for e in pool.sample(8, 1000.0))
    assert counts["a"] == 2
    pool = make()
    for number in range(40):
        pool.add(entry(number, "a"))
    assert len(pool.sample(8, 1000.0)) == 8


def test_newcomers_give_a_quarter_together_however_many_they_are():
    pool = make()
    for number in range(200):
        pool.add(entry(number, f"sybil {number}"))
    for number in range(200, 208):
        pool.add(entry(number, f"known {number % 4}"))
    drawn = pool.sample(8, 1000.0, is_newcomer=lambda author: author.startswith("sybil"))
    assert Counter(e.author.split()[0] for e in drawn) == {"known": 6, "sybil": 2}


def test_small_batches_hear_newcomers_now_and_then():
    rng = random.Random(1)
    caps = [newcomer_cap(1, 0.25, rng) for _ in range(4000)]
    assert 850 < sum(caps) < 1150
    assert set(caps) == {0, 1}
    assert [newcomer_cap(num, 0.25, rng) for num in (4, 5, 7, 8)] == [1, 1, 1, 2]


def test_author_caps_by_hand():
    assert [author_cap(8, num, 0.25) for num in (1, 3, 4, 20)] == [8, 8, 2, 2]
    assert author_cap(5, 4, 0.25) == 2  # one each would leave the batch short
    assert author_cap(1, 9, 0.25) == 1


def test_old_groups_expire_and_the_oldest_make_room():
    pool = make(max_groups=3)
    for number, created_at_s in enumerate((100.0, 300.0, 200.0)):
        pool.add(entry(number, created_at_s=created_at_s))
    assert pool.add(entry(3, created_at_s=400.0))
    assert not pool.add(entry(4, created_at_s=50.0))
    assert sorted(e.payload for e in pool.entries()) == [1, 2, 3]
    assert pool.num_expired == 1
    pool.expire(801.0)
    assert sorted(e.payload for e in pool.entries()) == [1, 3]
    assert pool.sample(9, 2000.0) == []
    assert pool.num_expired == 4
    assert pool.num_bytes == 0
