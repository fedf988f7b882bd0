import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from protocol.announcements import Announcements
from protocol.messages import Announcement
from protocol.planning import num_known_frames, plan_pulls


def add(known: Announcements, author: str, sequence: int, num_frames: int = 4, holder: str | None = None):
    root = f"{author} {sequence}".encode().ljust(32, b".")
    announcement = Announcement((1, 0), author, sequence, 0, (100,) * num_frames, root, (), b"", root)
    batch = known.add(announcement, "teller", 0.0)
    if holder is not None:
        known.hold(batch, holder, batch.all_frames)
    return batch


def make() -> Announcements:
    return Announcements(max_batches=1000, max_batches_per_author=1000, freshness_s=600)


def plan(known: Announcements, num_frames: int, **settings):
    defaults = {
        "reserve": num_frames, "kept": {}, "neighbours": (), "is_newcomer": None, "is_deferred": lambda author: False,
        "max_author_share": 0.25, "max_newcomer_share": 0.25, "rng": random.Random(0),
    }  # fmt: skip
    return plan_pulls(known, num_frames=num_frames, **(defaults | settings))


def counts(chosen) -> Counter[str]:
    return Counter(batch.author for batch, numbers in chosen for _ in numbers)


@given(
    batches=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 20), st.booleans()), max_size=30),
    num_frames=st.integers(0, 40),
    kept=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 10)),
    newcomers=st.none() | st.sets(st.sampled_from("abcdef")),
    seed=st.integers(0, 1000),
)
def test_plans_hold_what_is_open_once_and_within_every_cap(batches, num_frames, kept, newcomers, seed):
    known = make()
    for sequence, (author, size, near) in enumerate(batches):
        add(known, author, sequence, size, "near" if near else None)
    is_newcomer = None if newcomers is None else newcomers.__contains__
    chosen = plan(known, num_frames, kept=kept, is_newcomer=is_newcomer, neighbours={"near"}, rng=random.Random(seed))
    total = counts(chosen)
    assert total.total() <= num_frames
    assert len({batch.root for batch, _ in chosen}) == len(chosen)
    for batch, numbers in chosen:
        assert len(set(numbers)) == len(numbers)
        assert all(batch.open >> number & 1 for number in numbers)
    # Newcomers may find no room in the window: authors that are none always do.
    if len({author for author, _, _ in batches} - (newcomers or set())) >= 4:
        cap = max(1, num_frames // 4, -(-num_frames // 4))
        assert all(num <= cap for num in total.values())
    if newcomers is not None and newcomers:
        kept_of_newcomers = sum(kept.get(author, 0) for author in newcomers)
        assert sum(total[author] for author in newcomers) <= max(0, -(-num_frames // 4) - kept_of_newcomers)


def test_one_author_alone_fills_everything():
    known = make()
    add(known, "a", 1, num_frames=10)
    assert counts(plan(known, 8)) == {"a": 8}


def test_many_authors_share():
    known = make()
    for author in "abcdef":
        add(known, author, 1, num_frames=10)
    assert max(counts(plan(known, 8)).values()) == 2


def test_what_a_neighbour_holds_comes_first_and_unknown_tasks_last():
    known = make()
    for number in range(8):
        add(known, f"near {number}", 1, 2, "neighbour")
        add(known, f"far {number}", 1, 2, "stranger")
        add(known, f"odd {number}", 1, 2, "neighbour")
    settings = {"neighbours": {"neighbour"}, "is_deferred": lambda author: author.startswith("odd"), "reserve": 64}
    assert {author.split()[0] for author in counts(plan(known, 16, **settings))} == {"near"}
    assert {author.split()[0] for author in counts(plan(known, 32, **settings))} == {"near", "far"}
    assert counts(plan(known, 48, **settings)).total() == 48


def test_a_large_swarm_is_followed_at_its_head():
    known = make()
    for sequence in range(400):
        add(known, f"author {sequence}", sequence, 4)
    chosen = plan(known, 4)
    assert all(batch.announcement.sequence >= 400 - 8 for batch, _ in chosen)


def test_a_small_swarm_is_gathered_whole():
    known = make()
    for sequence in range(30):
        add(known, f"author {sequence % 5}", sequence, 4)
    assert counts(plan(known, 120, reserve=1000)).total() == 120


def test_every_frame_of_the_window_is_as_likely():
    known = make()
    for author in "abcdefgh":
        add(known, author, 1, 4)
    drawn = Counter[tuple[str, int]]()
    for seed in range(2000):
        for batch, numbers in plan(known, 4, rng=random.Random(seed)):
            drawn.update((batch.author, number) for number in numbers)
    # 4 of 32 frames: 250 expected of each, standard deviation below 15.
    assert len(drawn) == 32
    assert max(abs(count - 250) for count in drawn.values()) < 5 * 15


def test_newcomers_share_a_quarter_of_the_reserve():
    known = make()
    for number in range(50):
        add(known, f"sybil {number}", 1, 4, "near")
    for number in range(4):
        add(known, f"known {number}", 1, 4)
    chosen = plan(known, 8, neighbours={"near"}, is_newcomer=lambda author: author.startswith("sybil"), reserve=8)
    assert sum(num for author, num in counts(chosen).items() if author.startswith("sybil")) == 2
    kept = {"sybil 1": 1, "sybil 2": 1}
    chosen = plan(known, 6, is_newcomer=lambda author: author.startswith("sybil"), reserve=8, kept=kept)
    assert not any(author.startswith("sybil") for author in counts(chosen))


def test_counting_stops_where_it_is_told():
    known = make()
    for sequence in range(10):
        add(known, "a", sequence, 4)
    assert [num_known_frames(known, at_most) for at_most in (0, 5, 40, 100)] == [0, 5, 40, 40]
