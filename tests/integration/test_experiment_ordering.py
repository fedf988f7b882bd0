"""What sharing is for: nodes that learn from each other earn more than the same nodes alone, on the same seeds.

The paper's recipe on `configs/sapo.toml`, forty rounds of it, in which 4/4 earns about twice as much. Without what
others wrote both arms ask the same questions and learn the same from them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_cover
CONFIG = Path(__file__).parents[2] / "configs/sapo.toml"
SIZE = "--arms 8/0,4/4 --nodes 8 --seeds 1 --rounds 40 --jobs 2".split()
EVALUATION = ["--set", "evaluation.num_items=64", "--set", "evaluation.every_rounds=0"]
MARGIN = 1.4  # of cumulative reward, 4/4 over 8/0
PROGRAM = str(Path(sys.executable).parent / "swarm-node")


@pytest.mark.timeout(300)
def test_four_own_and_four_of_others_earn_more_than_eight_own(tmp_path):
    given = ["experiment", "sapo", "--config", str(CONFIG), *SIZE, *EVALUATION, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [PROGRAM, *given, "--json"], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    silo, half = json.loads(done.stdout.splitlines()[-1])["arms"]
    ours, theirs = half["measures"], silo["measures"]
    assert half["against"]["8/0"]["reward_cumulative"]["ratio"]["mean"] > MARGIN
    assert ours["heldout_after"]["mean"] > theirs["heldout_after"]["mean"]
    assert ours["num_tokens_generated"]["mean"] < 0.9 * theirs["num_tokens_generated"]["mean"]
