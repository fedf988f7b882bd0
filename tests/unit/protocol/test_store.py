from protocol.store import FrameStore

DIGESTS = [b"d" * 16] * 4


def test_frames_are_held_under_their_batch():
    store = FrameStore(1000)
    store.add(b"r", DIGESTS, 2, b"frame", 600.0)
    store.add(b"r", DIGESTS, 0, b"other", 600.0)
    store.add(b"r", DIGESTS, 0, b"other", 600.0)
    assert store.mask(b"r") == 0b101
    assert store.mask(b"x") == 0
    assert store.num_bytes == 10
    held = store.get(b"r")
    assert held is not None
    assert held.frames == {2: b"frame", 0: b"other"}
    store.drop(b"r")
    store.drop(b"r")
    assert (store.num_bytes, len(store)) == (0, 0)


def test_others_batches_make_room_before_own_ones():
    store = FrameStore(100)
    store.add_own(b"own 1", DIGESTS, [b"x" * 10] * 4, 600.0)
    for number in range(20):
        store.add(b"%d" % number, DIGESTS, 0, b"y" * 10, 600.0)
        assert store.num_bytes <= 100
    assert store.roots() == [b"own 1", *(b"%d" % number for number in range(14, 20))]
    store.add_own(b"own 2", DIGESTS, [b"x" * 20] * 4, 600.0)
    assert store.roots() == [b"own 2"]
    assert store.num_bytes == 80


def test_what_is_too_old_goes():
    store = FrameStore(1000)
    store.add(b"old", DIGESTS, 0, b"frame", 600.0)
    store.add_own(b"new", DIGESTS, [b"frame"], 700.0)
    store.expire(600.0)
    assert store.roots() == [b"new"]
    assert store.num_bytes == 5
