"""Whatever the bytes, a decoder returns a record or raises Refusal, and takes no memory for what is merely declared."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.refusals import Reason, Refusal

NUM_FRAMES = 100_000  # for each decoder
MAX_GROWTH_BYTES = 50 * 2**20


@pytest.mark.no_cover
def test_a_hundred_thousand_frames_for_each_decoder(fuzzing):
    script = Path(fuzzing.__file__)
    done = subprocess.run(
        [sys.executable, script, str(NUM_FRAMES), "1"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["growth_bytes"] < MAX_GROWTH_BYTES
    assert report["outcomes"].keys() == fuzzing.DECODERS.keys()
    for name, outcomes in report["outcomes"].items():
        assert sum(outcomes.values()) == NUM_FRAMES
        assert outcomes["bad_schema"] > NUM_FRAMES // 100, name
        assert outcomes["oversize"] > 0, name
        assert outcomes["other_major"] > 0, name
        assert outcomes["decoded"] > 0, name  # the mutations come close
    assert report["outcomes"]["frame"]["bad_compression"] > NUM_FRAMES // 10
    assert report["outcomes"]["frame"]["unknown_minor"] > 0


@pytest.mark.parametrize("name", ["frame", "announcement", "node_record", "pull_response", "peers_response"])
def test_what_is_decoded_after_a_change_is_encoded_as_it_came(fuzzing, name):
    """A decoder that reads leniently would give two byte strings one meaning."""
    seeds = fuzzing.samples()[name]
    num_decoded = 0
    for data in fuzzing.mutations(seeds, 4000, random.Random(name)):
        try:
            record = fuzzing.DECODERS[name](data)
        except Refusal:
            continue
        num_decoded += 1
        if name in ("announcement", "node_record"):
            assert record.encoded == data
        elif name == "pull_response":
            from protocol.requests import encode_pull_response

            is_other = data[1:3] != b"\x01\x01"
            assert is_other or encode_pull_response(record) == data
        elif name == "peers_response":
            from protocol.requests import encode_peers_response

            assert data[1:3] != b"\x01\x01" or encode_peers_response(record) == data
        else:
            from protocol.wire import decode_group, encode_group

            assert decode_group(encode_group(record)) == record
    assert num_decoded


def test_all_that_is_built_to_hurt_is_refused_by_every_decoder(fuzzing):
    for name, decode in fuzzing.DECODERS.items():
        for data in fuzzing.hostile_bytes():
            with pytest.raises(Refusal) as caught:
                decode(data)
            assert caught.value.reason in (Reason.BAD_SCHEMA, Reason.OVERSIZE, Reason.BAD_COMPRESSION), name
