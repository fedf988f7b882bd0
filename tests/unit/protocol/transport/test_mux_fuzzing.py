"""Whatever a peer sends on a stream, its stream ends or goes on, and takes no memory for what is merely declared."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NUM_FRAMES = 100_000  # for the parser and each side of a stream
MAX_GROWTH_BYTES = 50 * 2**20


@pytest.mark.no_cover
def test_a_hundred_thousand_frames_for_each_side():
    script = Path(__file__).with_name("mux_fuzzing.py")
    done = subprocess.run(
        [sys.executable, script, str(NUM_FRAMES), "1"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["growth_bytes"] < MAX_GROWTH_BYTES
    found = report["outcomes"]
    for side in ("answerer", "asker"):
        assert found[side]["frames"] >= NUM_FRAMES
    for side in ("parser", "answerer", "asker"):
        assert found[side]["bad_framing"] > NUM_FRAMES // 50
        assert found[side]["broken_off"] > 100 if side != "parser" else found[side]["frames"] > NUM_FRAMES // 2
    assert found["answerer"]["requests"] > NUM_FRAMES // 20  # the changes come close
    for outcome in ("bytes", "PeerUnreachable", "RequestRefused", "ResponseTooLarge", "NotTaken", "CancelledError"):
        assert found["asker"][outcome] > 10, outcome
