"""What a DHT node stores and believes; the attacks on a real one are in tests/integration/test_hivemind_attacks.py."""

import math

import msgpack
import pytest

from protocol.identity import node_id_of
from protocol.transport import records as rules

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's and torch's own
records = pytest.importorskip("protocol.transport.hivemind_records")

NOW = 1_900_000_000.0  # in hivemind's own future, which drops what has expired by the true time


def owner(number):
    return node_id_of(number.to_bytes(32, "big"))


class Clock:
    def __init__(self):
        self.now = NOW

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def storage(clock):
    return records.BoundedStorage(clock)


def place(number):
    return records.dht_id_of_key(b"%d" % number)


def validator(clock, verdict=lambda *_: True):
    return records.OwnedRecordValidator(verdict, clock)


def judge(check, *, key=b"key", dht_key=None, subkey=None, value=b"value", expires_at=NOW + 60, packed=None):
    return check.owner_of(
        records.dht_id_of_key(key).to_bytes() if dht_key is None else dht_key,
        msgpack.packb(owner(1)) if subkey is None else subkey,
        records.pack_record(key, value) if packed is None else packed,
        expires_at,
    )


def test_a_good_record_is_its_owners(clock):
    seen = []
    check = validator(clock, lambda *arguments: not seen.append(arguments))
    assert judge(check) == owner(1)
    assert judge(check) == owner(1)
    assert seen == [(b"key", owner(1), b"value", NOW + 60, NOW)]  # asked once


@pytest.mark.parametrize(
    ("expires_in_s", "is_good"), [(0, False), (-1, False), (0.1, True), (660, True), (660.1, False), (math.inf, False),
                                  (-math.inf, False), (math.nan, False)]
)  # fmt: skip
def test_a_record_expires_soon_and_not_yet(clock, expires_in_s, is_good):
    assert (judge(validator(clock), expires_at=NOW + expires_in_s) is not None) == is_good


def test_what_was_good_expires(clock):
    check = validator(clock)
    assert judge(check)
    clock.now += 61
    assert judge(check) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"dht_key": bytes(20)},
        {"subkey": b""},
        {"subkey": msgpack.packb(None)},
        {"subkey": msgpack.packb("someone")},
        {"subkey": msgpack.packb(owner(1).encode())},
        {"subkey": b"\xd9\x34" + owner(1).encode() + b"x"},
        {"subkey": b"\xda\x00\x34" + owner(1).encode()},  # not the shortest form: a second name for one owner
        {"packed": b""},
        {"packed": b"\xc1"},
        {"packed": msgpack.packb("text")},
        {"packed": msgpack.packb(b"")},
        {"packed": msgpack.packb(b"\x05key")},
        {"packed": msgpack.packb(b"\x03keyvalue") + b"\x00"},
        {"packed": b"\xc5\x00\x09\x03keyvalue"},
        {"value": bytes(1025)},
    ],
)
def test_anything_else_is_nobodys(clock, wrong):
    assert judge(validator(clock), **wrong) is None


def test_the_transports_validator_has_the_last_word(clock):
    assert judge(validator(clock, lambda *_: False)) is None


@pytest.mark.parametrize("key", [b"", bytes(65)])
def test_a_key_has_a_length(key):
    with pytest.raises(ValueError, match="64"):
        records.dht_id_of_key(key)


def test_a_key_has_only_so_many_owners_and_keeps_the_first(storage):
    outcomes = [storage.store_subkey(place(0), owner(number), b"v", NOW + 60) for number in range(5000)]
    assert outcomes == [True] * records.MAX_RECORDS_PER_KEY + [False] * (5000 - records.MAX_RECORDS_PER_KEY)
    kept = dict(storage.get(place(0)).value.items())
    assert set(kept) == {owner(number) for number in range(records.MAX_RECORDS_PER_KEY)}
    assert storage.store_subkey(place(0), owner(7), b"renewed", NOW + 90)
    assert dict(storage.get(place(0)).value.items())[owner(7)].value == b"renewed"


def test_an_owner_has_only_so_many_keys(storage):
    outcomes = [storage.store_subkey(place(number), owner(1), b"v", NOW + 60) for number in range(100)]
    assert sum(outcomes) == rules.MAX_KEYS_PER_OWNER
    assert storage.store_subkey(place(99), owner(2), b"v", NOW + 60)


def test_a_node_holds_only_so_many_records(storage, monkeypatch):
    monkeypatch.setattr(rules, "MAX_RECORDS", 50)
    assert sum(storage.store_subkey(place(number), owner(number), b"v", NOW + 60) for number in range(60)) == 50
    assert len(storage) == 50


def test_room_comes_back_when_records_expire(storage, clock):
    for number in range(records.MAX_RECORDS_PER_KEY):
        storage.store_subkey(place(0), owner(number), b"v", NOW + 60)
    assert not storage.store_subkey(place(0), owner(9999), b"v", NOW + 90)
    for number in range(rules.MAX_KEYS_PER_OWNER - 1):
        storage.store_subkey(place(1 + number), owner(1), b"v", NOW + 60)
    assert not storage.store_subkey(place(99), owner(1), b"v", NOW + 90)
    clock.now += 61
    assert storage.store_subkey(place(0), owner(9999), b"v", NOW + 90)
    assert storage.store_subkey(place(99), owner(1), b"v", NOW + 90)
    assert storage.get(place(1)) is None
    assert len(storage) == 2


def test_a_record_is_replaced_by_one_that_expires_later(storage):
    assert storage.store_subkey(place(0), owner(1), b"one", NOW + 60)
    assert storage.store_subkey(place(0), owner(1), b"one", NOW + 60)  # said twice: still held
    assert not storage.store_subkey(place(0), owner(1), b"two", NOW + 60.5)
    assert not storage.store_subkey(place(0), owner(1), b"two", NOW + 30)
    assert storage.store_subkey(place(0), owner(1), b"two", NOW + 61)
    assert dict(storage.get(place(0)).value.items())[owner(1)] == (b"two", NOW + 61)


def test_plain_values_are_refused_and_nothing_is_handed_over(storage):
    assert not storage.store(place(0), b"plain", NOW + 60)
    assert storage.store(place(0), b"v", NOW + 60, subkey=owner(1))
    assert list(storage.items()) == []


def test_what_is_given_out_is_a_copy(storage):
    storage.store_subkey(place(0), owner(1), b"v", NOW + 60)
    storage.get(place(0)).value.store(owner(2), b"smuggled", NOW + 60)
    assert len(storage.get(place(0)).value) == 1
