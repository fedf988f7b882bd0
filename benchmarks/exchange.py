"""Measure what sharing costs between real nodes: bytes of a shared completion, latency, bytes on the wire.

    python benchmarks/exchange.py [--only bytes|gather|sample|genrl] [--peer-env FOLDER] [--alone]

    bytes     one shared completion of 600 characters of real model text (`texts.json`): the batch of a round, four
              groups of eight, with its signed announcement, the requests that fetch it, their responses, all framing
    gather    8 real nodes, a process each, publish 28 KiB of groups each at the same moment, then 256, and each wants
              everything: latency from publication to admission. KiB are counted before compression, as genrl counts
              its own; 256 KiB of compressed frames, more than twice as many groups, stand beside that
    sample    8 real nodes sample J groups a round, as training does: bytes received over the frames that were used
    genrl     the same exchange by genrl, with its own script in an environment of its own

Bytes are `transport.traffic`'s: payloads, with the framing of our streams, of every request, and of DHT messages,
greetings and pings included; not libp2p's own (Noise, yamux, identify), nor TCP/IP's. `loopback_...` has these too,
where network namespaces may be made: it is the interface's own counter, headers and acknowledgements and all.

genrl shares synthetic text of 600 characters with question and answer, uncompressed and unsigned. A run of it that
does not end within its limit is reported as such.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from _nodes import num_texts, real_groups
from harness import REPOSITORY, Bar, PeerError, peer_python, report, run_peer

__all__: list[str] = []

SHARED = REPOSITORY.parent / "shared" / "peers"
NODES = Path(__file__).with_name("_nodes.py")
GROUPS_PER_BATCH = 4  # as genrl's script shares them
MAX_BYTES_PER_COMPLETION = 320.0
MAX_LATENCY_S = 1.0
MAX_OVER_IDEAL = 1.5
MEASURE_LIMIT_S = 540.0


def isolated(command: list[str | Path]) -> list[str | Path]:
    """Return a command that runs in a network namespace of its own, where that is allowed; else the same command."""
    for options in (["-n"], ["-rn"]):
        try:
            can = subprocess.run(["unshare", *options, "ip", "link", "set", "lo", "up"], capture_output=True)
        except FileNotFoundError:
            break
        if can.returncode == 0:
            return ["unshare", *options, "bash", "-c", 'ip link set lo up && exec "$@"', "isolated", *command]
    return command


def batch_bytes(first: int) -> dict[str, int]:
    """Return what fetching one batch carries between two nodes, in both directions, by kind."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol import requests as wire
    from protocol.digests import leaf_of
    from protocol.identity import Identity
    from protocol.signing import sign_announcement
    from protocol.transport.framing import ANSWER, REQUEST, answer_head, frame_bytes, request_head
    from protocol.wire import encode_frame

    def request(name: str, payload: bytes) -> int:
        return len(frame_bytes(REQUEST, 1, request_head(name, len(payload), 0))) + len(payload)

    def response(payload: bytes) -> int:
        return len(frame_bytes(ANSWER, 1, answer_head(len(payload)))) + len(payload)

    frames = [encode_frame(group) for group in real_groups(0, first, GROUPS_PER_BATCH)]
    identity = Identity(Ed25519PrivateKey.generate())
    announcement = sign_announcement(
        identity, "main", sequence=1_800_000_000_000, created_at_ms=1_800_000_000_000, frames=frames
    )
    leaves = tuple(leaf_of(frame) for frame in frames)
    offer = wire.Offer(announcement.encoded, (1 << len(frames)) - 1)
    alone = [
        request("pull", wire.encode_pull_request(wire.PullRequest(announcement.root, (number,))))
        + response(wire.encode_pull_response(wire.PullResponse(leaves, {number: frame})))
        for number, frame in enumerate(frames)
    ]
    numbers = tuple(range(len(frames)))
    whole = request("pull", wire.encode_pull_request(wire.PullRequest(announcement.root, numbers)))
    whole += response(wire.encode_pull_response(wire.PullResponse(leaves, dict(enumerate(frames)))))
    return {
        "frames": sum(map(len, frames)),
        "announced": request("announce", wire.encode_announce_request(wire.AnnounceRequest((offer,))))
        + response(wire.encode_announce_response(wire.AnnounceResponse(0))),
        "pulled_one_by_one": sum(alone),
        "pulled_at_once": whole,
    }


def measure_bytes() -> dict[str, Any]:
    """Take every text into account once, in batches."""
    batches = [batch_bytes(first) for first in range(0, num_texts(), GROUPS_PER_BATCH)]
    groups = real_groups(0, 0, num_texts())
    texts = [completion.text for group in groups for completion in group.completions]
    sums = {kind: sum(batch[kind] for batch in batches) for kind in batches[0]}
    return {
        "num_completions": len(texts),
        "characters_per_completion": sum(map(len, texts)) / len(texts),
        "frame_bytes_per_completion": sums["frames"] / len(texts),
        "bytes_per_completion": (sums["announced"] + sums["pulled_one_by_one"]) / len(texts),
        "bytes_per_completion_pulled_at_once": (sums["announced"] + sums["pulled_at_once"]) / len(texts),
        "announcement_bytes_per_batch": sums["announced"] / len(batches),
    }


def measure_genrl(python: Path, limit_s: float) -> dict[str, Any]:
    """Run genrl's exchange with one node, which says how many bytes it would send, and between 2, 4 and 8."""
    found: dict[str, Any] = {"limit_s": limit_s, "note": "needed one import added (get_dht_time) to be imported at all"}
    for num_nodes in (1, 2, 4, 8):
        script = [python, SHARED / "genrl_exchange.py", f"--nodes={num_nodes}", f"--limit={limit_s:.0f}"]
        sizes = [f"--questions={GROUPS_PER_BATCH}", "--completions=8", "--chars=600", "--rounds=3"]
        try:
            found[f"{num_nodes}_nodes"] = run_peer(isolated([*script, *sizes]), time_limit_s=limit_s + 60)
        except PeerError as error:
            found[f"{num_nodes}_nodes"] = {"finished": False, "error": str(error)[-300:]}
        print(f"genrl, {num_nodes} nodes: {found[f'{num_nodes}_nodes']}", flush=True)
    return found


def ours(*arguments: str) -> dict[str, Any]:
    """Run real nodes and return their figures."""
    command = isolated([sys.executable, NODES, *arguments])
    found = run_peer(command, time_limit_s=MEASURE_LIMIT_S)
    if command[0] != "unshare":
        print("no network namespace can be made here: other traffic is in the loopback figures", file=sys.stderr)
    print(f"{arguments[0]}: {found}", flush=True)
    return found


def gather_bars(gathered: dict[str, Any]) -> list[Bar]:
    """One bar for each size: the slowest of its rounds, where everything came."""
    bars = []
    for kilobytes in (28, 256):
        slowest = [row["latency_p95_s"] for row in gathered[f"{kilobytes}_kb"]]
        value = None if None in slowest else max(slowest)
        bars.append(Bar(f"8 x {kilobytes} KiB: latency p95, s", value, MAX_LATENCY_S, at_least=False))
    return bars


def main() -> None:
    """Measure what was asked for and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("bytes", "gather", "sample", "genrl"))
    parser.add_argument("--alone", action="store_true", help="leave the peer out")
    parser.add_argument("--peer-env", type=Path, default=REPOSITORY.parent / "genrl-env")
    parser.add_argument("--peer-limit-s", type=float, default=120.0, help="for one run of the peer's exchange")
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    if args.only in (None, "bytes"):
        figures["bytes"] = found = measure_bytes()
        print(f"bytes: {found}", flush=True)
        value = found["bytes_per_completion"]
        bars.append(Bar("bytes per completion of 600 characters", value, MAX_BYTES_PER_COMPLETION, at_least=False))
    if args.only in (None, "gather"):
        figures["gather"] = ours("gather")
        bars += gather_bars(figures["gather"])
    if args.only in (None, "sample"):
        figures["sample"] = ours("sample")
        value = figures["sample"]["bytes_in_over_ideal"]
        bars.append(Bar("bytes received over the ideal", value, MAX_OVER_IDEAL, at_least=False))
    python = None if args.alone or not SHARED.is_dir() else peer_python(args.peer_env)
    if args.only in (None, "genrl") and python is not None:
        figures["genrl"] = measure_genrl(python, args.peer_limit_s)
    elif args.only in (None, "genrl"):
        print("genrl is not here: ours alone", file=sys.stderr)
    report(figures, bars)


if __name__ == "__main__":
    main()
