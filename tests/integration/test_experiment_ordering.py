"""What sharing is for: nodes that learn from each other earn more than the same nodes alone, on the same seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_NODES, ROUNDS, SEEDS = 8, 100, 1
MARGIN = 1.10  # of cumulative reward, 4/4 over 8/0
PROGRAM = str(Path(sys.executable).parent / "swarm-node")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_four_own_and_four_of_others_earn_more_than_eight_own(tmp_path):
    given = f"--model tiny --arms 8/0,4/4 --nodes {NUM_NODES} --rounds {ROUNDS} --seeds {SEEDS}".split()
    done = subprocess.run(
        [PROGRAM, "experiment", "sapo", *given, "--run-dir", str(tmp_path / "run"), "--json"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print((tmp_path / "run/results.md").read_text())
    silo, half = found["arms"]
    assert half["measures"]["external_missing_share"]["mean"] < 0.02
    assert half["against"]["8/0"]["reward_cumulative"]["ratio"]["mean"] > MARGIN
    assert half["measures"]["num_completions"]["mean"] < 0.6 * silo["measures"]["num_completions"]["mean"]
