"""A real node with partial rollouts: it learns what a synchronous node learns, and a kill loses nothing of it."""

import random
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.no_cover
ROUNDS = 16
MACHINE = ("_s", "_per_s", "_bytes")
AHEAD = ("--set", "rollout.schedule=partial", "--set", "rollout.over_provision=2")
EARLY = (*AHEAD, "--set", "rollout.order=arrival", "--set", "rollout.stale_tokens=correct")


def run_of(workplace, run_dir, *more):
    settings = ("rollout.max_new_tokens=24", "sapo.num_local=4", "evaluation.num_items=0", "checkpoint.interval_s=0",
                "rollout.max_age=2", "trainer.learning_rate=3e-4", "engine.max_slots=48")  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["silo", "--model", "tiny", "--run-dir", run_dir, "--rounds", str(ROUNDS), *sets, *more]


def steady(rows, names=None):
    """The part of the rows that does not depend on the machine."""
    return [
        {key: value for key, value in row.items() if not key.endswith(MACHINE) and (names is None or key in names)}
        for row in rows
    ]


def final_state(workplace, run_dir):
    folder = max((workplace.path / run_dir / "checkpoints").glob("round-*"))
    assert folder.name == f"round-{ROUNDS:08d}"
    return load_file(folder / "state.safetensors")


def assert_same_weights(workplace, one, other):
    found, expected = final_state(workplace, one), final_state(workplace, other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def finish(workplace, run, run_dir, *more):
    done = run(*run_of(workplace, run_dir, *more))
    assert done.returncode == 0, done.stderr
    return workplace.rows(run_dir)


def test_verified_partial_rollouts_teach_bit_for_bit_what_synchronous_ones_do(workplace):
    plain = finish(workplace, workplace.run, "plain", "--set", "rollout.schedule=synchronous")
    ahead = finish(workplace, workplace.run_fork, "ahead", *AHEAD)
    assert sum(row["num_tokens_recycled"] for row in ahead) > 0
    assert sum(row["num_tokens_cut"] for row in ahead) > 0
    assert len({row["completion_length_mean"] for row in plain}) > 5, "lengths must vary"
    assert steady(ahead, plain[0].keys() | plain[-1].keys()) == steady(plain)
    assert_same_weights(workplace, "ahead", "plain")


@pytest.mark.timeout(600)
def test_a_killed_node_goes_on_with_its_partial_completions_bit_for_bit(workplace):
    whole = finish(workplace, workplace.run, "whole", *EARLY)
    assert max(row["staleness_max"] for row in whole) > 0
    rng, more = random.Random(6), []
    for target in (3, 10):
        process = workplace.fork(*run_of(workplace, "killed", *EARLY, *more))
        deadline = time.monotonic() + 120
        while len(workplace.rows("killed")) < target:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # somewhere within a round: the moment is what is random here
        process.kill()
        process.communicate()
        more = ["--resume"]
    killed = finish(workplace, workplace.run_fork, "killed", *EARLY, "--resume")
    assert steady(killed) == steady(whole)
    assert_same_weights(workplace, "killed", "whole")
