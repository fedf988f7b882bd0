"""A peer that links to a node and then does its worst, over the real transport. In a process of its own.

Arguments: the transport, identity file, address of the victim, a file that exists once anything that it sent has been
executed.
It prints "linked" when it is a neighbour; the line "attack" on stdin begins the attacks, the end of stdin ends the
process, which then prints what it has done, by kind, as JSON.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path

import msgpack

from node.config import RunConfig
from node.layers import resolve
from protocol.about import NodeAbout
from protocol.clock import system_clock
from protocol.compression import compress
from protocol.digests import leaf_of, root_of
from protocol.identity import Identity, public_key_of
from protocol.messages import SharedCompletion, SharedGroup, TaskRef
from protocol.own_record import sign_own_record
from protocol.requests import (
    AnnounceRequest,
    Hello,
    Offer,
    PullResponse,
    decode_hello,
    decode_pull_request,
    encode_announce_request,
    encode_hello,
    encode_pull_response,
)
from protocol.shards import record_validator
from protocol.signing import sign_announcement
from protocol.transport import hivemind
from protocol.transport.base import TransportError
from protocol.transport.hivemind import HivemindSettings, HivemindTransport
from protocol.transport.libp2p import Libp2pSettings, Libp2pTransport
from protocol.transport.peer_id import peer_bytes_of
from protocol.wire import encode_frame
from swarm.tasks import build_task_set

LOCAL = ("/ip4/127.0.0.1/tcp/0",)
ABOUT = NodeAbout("trainer", "swarm-node/0.1.0", "tiny", ("chain_sum",))
MAGIC = bytes.fromhex("28b52ffd")  # of a zstd frame
PAUSE_S = 0.1  # between two attacks of one kind
REQUESTS = ("hello", "announce", "pull", "repair", "peers", "nothing_of_the_kind")


def tasks_of(model: str) -> list[TaskRef]:
    """References of questions that the victim trains on itself."""
    config: RunConfig = resolve([]).config if model == "tiny" else RunConfig()
    return [task.ref for task in build_task_set(config.tasks, seed=99).train_batch(1, 64)]


def codes(proof: Path) -> list[str]:
    """Answers that would do something if a scorer ran them, or that are dear to read."""
    return [
        f"__import__('os').system('touch {proof}')",
        f"open({str(proof)!r}, 'w').write('x')",
        f"<answer>eval(\"open({str(proof)!r}, 'w')\")</answer>",
        f"$(touch {proof})",
        "\\input{/etc/passwd}",
        "9**9**9**9",
        "factorial(10**8)",
        "1e999999999",
        "1" * 8000,
        "(" * 4000 + ")" * 4000,
        "\\frac{" * 1000,
        "x" + "**x" * 1000,
    ]


def with_fields(ref: TaskRef, minor: int, *more: object) -> bytes:
    """A frame of a group with fields that no group has: an answer, a reward for each completion."""
    task = [ref.source, bytes.fromhex(ref.digest), ref.seed, ref.index]
    completions = [["no number at all", True], ["nor this", True]]
    return compress(msgpack.packb([1, minor, task, completions, *more]))


def bombs() -> list[bytes]:
    """Frames that say, or do not say, that they become more than a node takes."""
    claims = MAGIC + b"\xe0" + (2**40).to_bytes(8, "little")  # single segment, content size in 8 bytes
    lies = MAGIC + b"\xa0" + (1000).to_bytes(4, "little") + zeros(2**27)
    return [
        MAGIC + b"\x80\x58" + (2**30).to_bytes(4, "little") + zeros(2**30),  # a window of 2 MiB
        MAGIC + b"\x00\x58" + zeros(2**30),  # of no declared size
        claims + bytes(100),
        lies,
        compress(b"\xdd\xff\xff\xff\xff" + bytes(2**19)),
        b"\xc6" * 100,
    ]


def zeros(num_bytes: int) -> bytes:
    """Return zstd's blocks of so many zeros, as its compressor writes them: 4 bytes for each 128 KiB."""
    size = 2**17
    blocks = bytearray(((size << 3 | 1 << 1).to_bytes(3, "little") + b"\0") * (num_bytes // size))
    blocks[-4] |= 1  # the last one
    return bytes(blocks)


class Hostile:
    """The peer. Its attacks run side by side until the process ends."""

    def __init__(self, transport: HivemindTransport | Libp2pTransport, identity: Identity, proof: Path) -> None:
        self.transport, self.identity, self.counts = transport, identity, Counter[str]()
        self.batches: dict[bytes, list[bytes]] = {}
        self.refs, self.codes, self.bombs = tasks_of("tiny"), codes(proof), bombs()
        self.rng = random.Random(0)
        self.victim = ""
        self._sequence = int(time.time() * 1000)
        for name, handler in (("hello", self._hello), ("pull", self._pull), ("announce", self._hang)):
            self.transport.handle(name, handler, max_request_bytes=2**20)

    async def link(self, address: str) -> None:
        self.victim = await self.transport.connect(address, timeout_s=20)
        answer = await self.transport.request(
            self.victim, "hello", encode_hello(self._own_hello()), max_response_bytes=4096, timeout_s=10
        )
        assert decode_hello(answer).link

    def _own_hello(self) -> Hello:
        now_ms = int(system_clock() * 1000)
        return Hello("main", now_ms, True, sign_own_record(self.identity, self.transport, "main", ABOUT, now_ms))

    async def _hello(self, asker: str, payload: bytes) -> bytes:
        return encode_hello(self._own_hello())

    async def _hang(self, asker: str, payload: bytes) -> bytes:
        await asyncio.sleep(3600)
        return b""

    async def _pull(self, asker: str, payload: bytes) -> bytes:
        """Give what was announced, or the most that a response can have, or nothing, for ever."""
        request = decode_pull_request(payload)
        frames = self.batches.get(request.root, [])
        manner = self.rng.random()
        if manner < 0.1 or not frames:
            self.counts["pulls never answered"] += 1
            return await self._hang(asker, payload)
        if manner < 0.2:
            self.counts["pulls answered with junk"] += 1
            return os.urandom(4 * 2**20)
        self.counts["pulls answered"] += 1
        leaves = tuple(leaf_of(frame) for frame in frames)
        return encode_pull_response(PullResponse(leaves, {number: frames[number] for number in request.numbers}))

    async def _tell(self, encoded: bytes) -> None:
        request = encode_announce_request(AnnounceRequest((Offer(encoded, 2**64 - 1),)))
        await self.transport.request(self.victim, "announce", request, max_response_bytes=4096, timeout_s=5)

    async def offer(self, kind: str, frames: list[bytes]) -> None:
        self._sequence += 1
        made = sign_announcement(
            self.identity, "main", sequence=self._sequence, created_at_ms=int(time.time() * 1000), frames=frames
        )
        self.batches[made.root] = frames
        self.counts[kind] += 1
        await self._tell(made.encoded)

    # attacks, one at a time each

    async def code_for_a_scorer(self) -> None:
        texts = [self.rng.choice(self.codes) for _ in range(4)]
        group = SharedGroup(self.rng.choice(self.refs), tuple(SharedCompletion(text, True) for text in texts))
        await self.offer("code for a scorer", [encode_frame(group)])

    async def false_answers_and_rewards(self) -> None:
        ref = self.rng.choice(self.refs)
        more = [{"answer": "no number at all", "rewards": [1.0, 0.0]}], ["no number at all", [1.0, 0.0]]
        frames = [with_fields(ref, minor, *self.rng.choice(more)) for minor in (0, 1)]
        await self.offer("false answers and rewards", frames)

    async def decompression_bombs(self) -> None:
        await self.offer("decompression bombs", [self.rng.choice(self.bombs)[: 250 * 1024]])

    async def huge_headers(self) -> None:
        self._sequence += 1
        frames, sizes = [b"x"], [2**40, 2**63, 1]
        root = root_of(self.identity.node_id, [leaf_of(frame) for frame in frames])
        now_ms = int(time.time() * 1000)
        body = msgpack.packb([1, 0, public_key_of(self.identity.node_id), self._sequence, now_ms, sizes, root])
        self.counts["headers of 2^40 bytes"] += 1
        await self._tell(self.identity.sign(b"announcement", b"\x04main" + body) + body)
        for payload in (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff"):
            for name in REQUESTS:
                self.counts["headers of 2^40 bytes"] += 1
                await self._ask(name, payload)

    async def large_requests(self) -> None:
        self.counts["requests of 4 MiB"] += 1
        await self._ask(self.rng.choice(REQUESTS), bytes(4 * 2**20 - 64))

    async def _ask(self, name: str, payload: bytes) -> None:
        with contextlib.suppress(TransportError):
            await self.transport.request(self.victim, name, payload, max_response_bytes=4 * 2**20, timeout_s=5)

    async def a_body_of_a_gigabyte(self) -> None:
        """Raw streams: whatever the framing is, this is more than it allows."""
        for head in (b"", b"\x01\x00\x00\x00\x01\xff\xff", b"\x04pull" + (2**32 - 1).to_bytes(4, "big")):
            reader, writer = await self._stream()
            try:
                writer.write(head)
                for _ in range(2**30 // 2**16):
                    writer.write(bytes(2**16))
                    await writer.drain()
                    self.counts["bytes of bodies of 1 GB"] += 2**16
                    if reader.at_eof():
                        break
            except OSError:
                pass  # cut off
            finally:
                writer.transport.abort()
            self.counts["bodies of 1 GB"] += 1

    async def a_kilobyte_a_second(self) -> None:
        """Raw streams that begin something and go on slowly."""
        _, writer = await self._stream()
        try:
            for _ in range(60):
                writer.write(b"\x01" + os.urandom(99))
                await writer.drain()
                await asyncio.sleep(0.1)
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self.counts["streams of 1 KB/s"] += 1

    async def _stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        session = self.transport._session
        assert session is not None
        return await session.daemon.open_stream(peer_bytes_of(self.victim), hivemind.STREAM_PROTOCOL)

    async def attack(self) -> None:
        kinds = [
            self.code_for_a_scorer,
            self.false_answers_and_rewards,
            self.decompression_bombs,
            self.huge_headers,
            self.large_requests,
            self.a_body_of_a_gigabyte,
            *[self.a_kilobyte_a_second] * 4,
        ]
        await asyncio.gather(*map(self._repeat, kinds))

    async def _repeat(self, once: object) -> None:
        while True:
            try:
                await once()  # type: ignore[operator]
            except (TransportError, OSError):
                self.counts["turned away"] += 1
            await asyncio.sleep(PAUSE_S)


def make_transport(name: str, identity: Identity) -> HivemindTransport | Libp2pTransport:
    validator = record_validator("main")
    if name == "hivemind":
        return HivemindTransport(identity, validator, HivemindSettings(LOCAL, nat_port_map=False, auto_nat=False))
    return Libp2pTransport(identity, validator, Libp2pSettings(listen=LOCAL, mdns=False))


async def main() -> None:
    transport, key, address, proof = sys.argv[1:]
    identity = Identity.load_or_create(Path(key))
    hostile = Hostile(make_transport(transport, identity), identity, Path(proof))
    await hostile.transport.start()
    await hostile.link(address)
    os.nice(19)  # what this costs the victim is the question, not what it costs here
    print("linked", flush=True)
    attacking: list[asyncio.Task[None]] = []
    while (await asyncio.to_thread(sys.stdin.readline)).strip() == "attack":
        attacking.append(asyncio.create_task(hostile.attack()))
    for task in attacking:
        if task.done():
            task.result()
        task.cancel()
    print(json.dumps(hostile.counts), flush=True)
    await hostile.transport.close()


asyncio.run(main())
