"""Hostile bytes for decoders: real records, changed in every way that a fuzzer knows; and a run of it by itself.

`python fuzzing.py NUM SEED` feeds NUM frames to each decoder and prints, as JSON, what became of them and by how much
the process has grown. Fixture `fuzzing` gives this module to the tests.
"""

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol import requests, wire
from protocol.bloom import repair_request
from protocol.digests import leaf_of
from protocol.identity import Identity
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.refusals import Refusal
from protocol.signing import sign_announcement, sign_node_record

DECODERS: dict[str, Callable[[bytes], object]] = {
    "frame": wire.decode_frame,
    "announcement": wire.decode_announcement,
    "node_record": wire.decode_node_record,
    "hello": requests.decode_hello,
    "announce_request": requests.decode_announce_request,
    "announce_response": requests.decode_announce_response,
    "pull_request": requests.decode_pull_request,
    "pull_response": requests.decode_pull_response,
    "repair_request": requests.decode_repair_request,
    "repair_response": requests.decode_repair_response,
    "peers_request": requests.decode_peers_request,
    "peers_response": requests.decode_peers_response,
}

# Headers that promise much: strings, binaries, extensions, arrays and maps of up to 2^32 - 1.
_HEADERS = [
    *(bytes([tag, 0xFF]) for tag in (0xC4, 0xC7, 0xD9)),
    *(bytes([tag, 0xFF, 0xFF]) for tag in (0xC5, 0xC8, 0xDA, 0xDC, 0xDE)),
    *(bytes([tag]) + b"\xff" * 4 for tag in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)),
]
_BYTES = [
    *_HEADERS,
    b"\x00",
    b"\x7f",
    b"\x80",
    b"\x90",
    b"\x91",
    b"\xc0",
    b"\xc1",
    b"\xca",
    b"\xcf",
    b"\xff",
    b"\xc4\x40",
]
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def identity(number: int = 0) -> Identity:
    """A key pair that is always the same."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))


def group(num_completions: int = 4, text: str = "six fois sept égale 42, so the answer is 42. ") -> SharedGroup:
    ref = TaskRef("reasoning_gym/products", "00112233445566778899aabbccddeeff", 7, 2**64 - 1)
    return SharedGroup(ref, tuple(SharedCompletion(text * n, n % 2 == 0) for n in range(num_completions)))


def samples() -> dict[str, list[bytes]]:
    """Real records for each decoder, small ones and some that have everything."""
    me, groups = identity(), [group(1), group(4), group(8, "let us compute")]
    frames = [wire.encode_frame(one) for one in groups]
    announcements = [
        sign_announcement(me, "main", sequence=n, created_at_ms=1_767_225_600_000 + n, frames=frames[:n])
        for n in (1, 3)
    ]
    records = [
        sign_node_record(
            me,
            "main",
            transport="memory",
            addresses=["/memory/" + me.node_id] * n,
            created_at_ms=1_767_225_600_000,
            role="trainer" if n else "bootstrap",
            software="swarm-node/0.1.0",
            model="tiny",
            tasks=["reasoning_gym/products", "reasoning_gym/gcd"],
            rollouts_per_minute=90,
        )
        for n in (0, 2)
    ]
    offers = tuple(requests.Offer(one.encoded, 2 ** len(one.frame_sizes) - 1) for one in announcements)
    leaves, root = tuple(leaf_of(frame) for frame in frames), announcements[0].root
    return {
        "frame": [*frames, zstandard.ZstdCompressor(level=1).compress(wire.encode_group(groups[1]))],
        "announcement": [one.encoded for one in announcements],
        "node_record": [one.encoded for one in records],
        "hello": [requests.encode_hello(requests.Hello("main", 1, True, one)) for one in records],
        "announce_request": [
            requests.encode_announce_request(requests.AnnounceRequest(some)) for some in ((), offers[:1], offers)
        ],
        "announce_response": [requests.encode_announce_response(requests.AnnounceResponse(n)) for n in (0, 255)],
        "pull_request": [requests.encode_pull_request(requests.PullRequest(root, n)) for n in ((0,), (0, 5, 63))],
        "pull_response": [
            requests.encode_pull_response(requests.PullResponse(leaves, some))
            for some in ({}, {2: frames[2]}, dict(enumerate(frames)))
        ],
        "repair_request": [
            requests.encode_repair_request(repair_request(b"saltsalt", roots, 8)) for roots in ((), (root,) * 40)
        ],
        "repair_response": [requests.encode_repair_response(requests.RepairResponse(offers))],
        "peers_request": [requests.encode_peers_request(requests.PeersRequest(n)) for n in (1, 64)],
        "peers_response": [requests.encode_peers_response(requests.PeersResponse(tuple(r.encoded for r in records)))],
    }


def mutations(seeds: Sequence[bytes], num: int, rng: random.Random) -> Iterator[bytes]:
    """Changed copies of `seeds`: bits, bytes, lengths, pieces cut, doubled, moved and swapped between them."""
    for _ in range(num):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            size = len(data)
            at, kind = (rng.randrange(size) if size else 0), rng.randrange(10)
            if kind <= 2 and size:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 3 and size:
                data[at] = rng.randrange(256)
            elif kind == 4:
                del data[at:]
            elif kind == 5:  # something that is read as a length, or as a type
                piece = rng.choice(_BYTES)
                data[at : at + rng.choice((0, 1, len(piece)))] = piece
            elif kind == 6:
                del data[at : at + rng.randrange(1, 9)]
            elif kind == 7:
                data[at:at] = data[at : at + rng.randrange(1, 65)]
            elif kind == 8:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            else:
                data += rng.choice(seeds) if rng.randrange(2) else rng.randbytes(rng.randrange(1, 17))
        yield bytes(data)


def bomb_of(num_mebibytes: int, *, sized: bool) -> bytes:
    """A zstd frame of zeros, made without having them in memory."""
    compressor = zstandard.ZstdCompressor(level=1)
    stream = compressor.compressobj(size=num_mebibytes * 2**20) if sized else compressor.compressobj()
    return b"".join([*(stream.compress(bytes(2**20)) for _ in range(num_mebibytes)), stream.flush()])


@cache
def hostile_bytes() -> list[bytes]:
    """What is built to hurt: nesting, promised sizes, bombs. None of it is any record."""
    bomb = zstandard.ZstdCompressor(level=1)
    sizes = (2**20 + 1, 2**32, 2**40, 2**63, 2**64 - 2)
    return [
        b"",
        b"\x91" * 100_000,
        b"\x92\x01" * 100_000,
        b"\x94\x01\x00" + b"\x91" * 200_000 + b"\xc0",
        b"\x94\x01\x00\xdd\x00\x10\x00\x00" + b"\xc0" * 2**20,  # a million values in one array
        (b"\x94\x01\x00" + b"\xdd\x00\x0f\x00\x00" * 900).ljust(2**20, b"\x00"),
        b"\x94\x01\x00" + b"\x90" * 2**20,
        b"\x94\x01\x00\xdf\x00\x08\x00\x00" + b"\xa0\xc0" * 2**19,
        *(b"\x94\x01\x00" + header for header in _HEADERS),
        *(b"\x00" * 64 + b"\x97\x01\x00" + header for header in _HEADERS),
        *(_ZSTD_MAGIC + b"\xe0" + size.to_bytes(8, "little") + b"\x01\x00\x00" for size in sizes),
        *(_ZSTD_MAGIC + b"\xc0\xff" + size.to_bytes(8, "little") + b"\x01\x00\x00" for size in sizes),  # largest window
        bomb_of(1024, sized=True),
        bomb_of(256, sized=False),
        bomb_of(1, sized=True),
        bomb.compress(b"\x91" * 2**20),
        bomb.compress(b"\x94\x01\x00\xdd\x00\x0f\xff\xf8" + b"\xc0" * (2**20 - 8)),
        bomb_of(1, sized=False),
        bomb.compress(b"x") * 2,
        b"\x50\x2a\x4d\x18\xff\xff\xff\xff",  # a skippable frame of 4 GiB
        b"\x50\x2a\x4d\x18\x01\x00\x00\x00x",
        bytes(2**22 + 1),
    ]


def inner_mutations(num: int, rng: random.Random) -> Iterator[bytes]:
    """Good compression around changed groups."""
    compressor = zstandard.ZstdCompressor(level=1)
    for content in mutations([wire.encode_group(group(n)) for n in (1, 3)], num, rng):
        yield compressor.compress(content)


def attack(name: str, seeds: Sequence[bytes], num: int, rng: random.Random) -> Counter[str]:
    """Feed one decoder; count what became of each frame. Whatever is no Refusal escapes."""
    outcomes: Counter[str] = Counter()
    decode, hostile = DECODERS[name], hostile_bytes()
    num_inner = num // 4 if name == "frame" else 0
    for source in (hostile, inner_mutations(num_inner, rng), mutations(seeds, num - num_inner - len(hostile), rng)):
        for data in source:
            try:
                decode(data)
            except Refusal as refusal:
                outcomes[refusal.reason.value] += 1
            else:
                outcomes["decoded"] += 1
    return outcomes


def peak_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    num, seed = int(sys.argv[1]), int(sys.argv[2])
    seeds = samples()
    hostile_bytes()  # making them takes memory too
    before = peak_bytes()
    found = {name: attack(name, seeds[name], num, random.Random(f"{seed} {name}")) for name in DECODERS}
    print(json.dumps({"growth_bytes": peak_bytes() - before, "outcomes": found}))


if __name__ == "__main__":
    main()
