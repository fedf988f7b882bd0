import pytest

from protocol.announcements import MAX_HOLDERS, Announcements
from protocol.messages import Announcement
from protocol.refusals import Reason


def announce(author: str, sequence: int, created_at_s: float = 1000.0, num_frames: int = 4) -> Announcement:
    root = f"{author} {sequence}".encode().ljust(32, b".")
    return Announcement((1, 0), author, sequence, int(created_at_s * 1000), (100,) * num_frames, root, (), b"", root)


def make(max_batches: int = 100, max_batches_per_author: int = 4) -> Announcements:
    return Announcements(max_batches=max_batches, max_batches_per_author=max_batches_per_author, freshness_s=600)


def test_a_batch_is_new_once():
    known = make()
    first = announce("a", 7)
    assert known.check(first) is None
    known.add(first, "teller", 1000.0)
    assert known.check(first) is Reason.DUPLICATE
    assert known.check(announce("b", 7)) is None


def test_two_batches_under_one_number_are_a_conflict():
    known = make()
    known.add(announce("a", 7), "teller", 1000.0)
    other = announce("a", 7)
    object.__setattr__(other, "root", b"another".ljust(32, b"."))
    assert known.check(other) is Reason.CONFLICT


def test_only_the_newest_batches_of_an_author_are_live():
    known = make()
    for sequence in (10, 30, 20, 40):
        known.add(announce("a", sequence), "teller", 1000.0)
    known.add(announce("a", 50), "teller", 1000.0)
    assert [known.get(announce("a", sequence).root) is None for sequence in (10, 20, 30, 40, 50)] == [True] + [
        False
    ] * 4
    assert known.check(announce("a", 10)) is Reason.REPLAYED
    assert known.check(announce("a", 9)) is Reason.REPLAYED
    assert known.check(announce("a", 15)) is None  # above what was dropped: it may come late


def test_numbers_stay_known_when_batches_are_forgotten_by_age():
    known = make()
    known.add(announce("a", 7, created_at_s=1000.0), "teller", 1300.0)
    assert known.expire(1601.0) == [announce("a", 7).root]
    assert known.check(announce("a", 7)) is Reason.DUPLICATE
    assert len(known) == 0
    known.expire(1901.0)  # by now its age refuses it
    assert known.num_authors_remembered == 0


def test_a_restart_keeps_the_numbers():
    known, again = make(), make()
    for sequence in range(6):
        known.add(announce("a", sequence), "teller", 1000.0)
    again.restore(known.state())
    assert [again.check(announce("a", sequence)) for sequence in (0, 1, 2, 5, 6)] == [
        Reason.REPLAYED, Reason.REPLAYED, Reason.DUPLICATE, Reason.DUPLICATE, None,
    ]  # fmt: skip


def test_frames_are_worth_pulling_once():
    known = make()
    batch = known.add(announce("a", 1), "teller", 1000.0)
    assert batch.open == 0b1111
    known.take(batch, 0b0111)
    assert [b.open for b in known.newest_open()] == [0b1000]
    known.take(batch, 0b1000)
    assert list(known.newest_open()) == []
    known.give_back(batch, 0b0010)
    assert [b.open for b in known.newest_open()] == [0b0010]
    known.forget_author("a")
    known.give_back(batch, 0b0100)
    assert list(known.newest_open()) == []


def test_frames_that_nobody_gave_are_tried_again_when_someone_offers_them():
    known = make()
    batch = known.add(announce("a", 1), "teller", 1000.0)
    known.add(announce("a", 2), "teller", 1000.0)
    known.take(batch, batch.all_frames)
    batch.given_up, batch.num_failures = 0b0110, 3
    assert known.roots_not_wanted() == [announce("a", 2).root]
    known.hold(batch, "holder", 0b0011)
    assert (batch.open, batch.given_up) == (0b0010, 0b0100)
    batch.num_failures = 12
    known.hold(batch, "liar", 0b0100)
    assert batch.open == 0b0010


def test_a_flood_from_one_source_crowds_out_itself():
    known = make(max_batches=64)
    for number in range(16):
        known.add(announce(f"honest {number}", 1), f"neighbour {number % 4}", 1000.0)
    for number in range(10_000):
        known.add(announce(f"sybil {number}", 1), "flooder", 1000.0)
    assert len(known) <= 64
    assert sum(1 for author in known.authors if author.startswith("honest")) == 16
    assert known.num_authors_remembered <= 4 * 64


@pytest.mark.parametrize("held", [0b1, 0b1111, 2**64 - 1])
def test_holders_are_bounded_and_believed_for_frames_that_exist(held):
    known = make()
    batch = known.add(announce("a", 1), "teller", 1000.0)
    for number in range(100):
        known.hold(batch, f"holder {number}", held)
    assert len(batch.holders) == MAX_HOLDERS
    assert set(batch.holders.values()) == {held & 0b1111}
    known.hold(batch, "holder 0", 0)
    assert batch.holders["holder 0"] == held & 0b1111
