"""What a side of a bridge offers: what it holds, and what it can have brought, both bounded."""

from protocol.bridge.store import BridgeStore


def root(number):
    return bytes([number]) * 32


def test_what_is_claimed_is_offered_like_what_is_held():
    store = BridgeStore(10_000, 8)
    store.add(root(1), [b"d"] * 3, 0, b"frame", 100.0)
    store.claim(root(1), 0b110, 100.0)
    store.claim(root(2), 0b1, 100.0)
    assert [store.mask(root(n)) for n in (1, 2, 3)] == [0b111, 0b1, 0]
    assert [store.held(root(n)) for n in (1, 2)] == [0b1, 0]
    assert sorted(store.roots()) == [root(1), root(2)]
    store.claim(root(2), 0b10, 100.0)
    assert store.claimed(root(2)) == 0b11
    store.give_up(root(1))
    assert store.mask(root(1)) == 0b1, "what is here stays"


def test_claims_end_with_their_batch_and_are_no_more_than_so_many():
    store = BridgeStore(10_000, 3)
    for number in range(5):
        store.claim(root(number), 1, 100.0 + number)
    assert [store.claimed(root(number)) for number in range(5)] == [0, 0, 1, 1, 1]
    store.expire(103.0)
    assert store.roots() == [root(4)]
    assert store.num_claims == 1


def test_frames_that_make_room_stay_to_be_had_from_the_other_side():
    store = BridgeStore(10, 8)
    for number in range(3):
        store.claim(root(number), 1, 100.0)
        store.add(root(number), [b"d"], 0, b"12345678", 100.0)
    assert [store.held(root(number)) for number in range(3)] == [0, 0, 1]
    assert [store.mask(root(number)) for number in range(3)] == [1, 1, 1]
