"""Two processes that share a policy learn what one learns: they are run by `sharded_ranks.py`, on CPUs, with `tiny`.

Sums come in another order, so that nothing is bit for bit: tolerances are those of fp32, and of AdamW, which makes of
a gradient that is rounding noise around zero a whole step of either sign.
"""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swarm.config import LoraConfig, ModelConfig, TrainerConfig
from swarm.policy import load_policy
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

SCRIPT = Path(__file__).with_name("sharded_ranks.py")
TEMPERATURE = 0.9
COMMON = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_tokens_per_microbatch": 40, "logprob_chunk_tokens": 16}
PLAIN = TrainerConfig(**COMMON)
CONFIGS = {
    "minibatches": TrainerConfig(**COMMON, num_minibatches=2, num_epochs=2),
    "reference": TrainerConfig(**COMMON, kl_coef=0.1, normalization="grpo"),
    "lora": TrainerConfig(**COMMON, lora=LoraConfig(rank=4)),
}


def make_batch(seed, *, num_groups=3, advantage=1.4):
    generator = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, 90, (length,), generator=generator).tolist())

    groups = []
    for _ in range(num_groups):
        completions = tuple(ids(1, 9) for _ in range(3))
        known = tuple(tuple(-3.5 + 0.1 * (t % 4) for t in one) for one in completions)
        groups.append(TrainingGroup(ids(2, 9), completions, (advantage, -0.7, -0.7), known))
    return TrainingBatch(tuple(groups))


# One group alone is one microbatch, or three: a process has none of its own, or they have unlike numbers.
BATCHES = [make_batch(seed, num_groups=num) for seed, num in enumerate((3, 1, 2))]
NUM_FIRST = 2  # batches before the state is handed over
BAD = make_batch(0, num_groups=1, advantage=math.nan)


def make_model(dtype):
    return load_policy(ModelConfig(dtype=dtype, device="cpu")).model


def make_trainer(config):
    torch.manual_seed(0)  # of the adapters; the other process has another one
    return Trainer(make_model("float32"), config, temperature=TEMPERATURE)


def seen(trainer, stats):
    """What can be known of a trainer, as `sharded_ranks.py` returns it."""
    state = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
    policy = trainer.policy_state()
    return {
        "stats": stats,
        "policy": {name: policy[name].clone() for name in policy},
        "state": (state, trainer.state_meta()),
    }


@pytest.fixture(scope="module")
def alone():
    """What one process has of each scenario after the first batches, and after all."""
    done = {}
    for name, config in CONFIGS.items():
        trainer = make_trainer(config)
        first = seen(trainer, [trainer.update(batch) for batch in BATCHES[:NUM_FIRST]])
        done[name] = first, seen(trainer, [trainer.update(batch) for batch in BATCHES[NUM_FIRST:]])
    return done


@pytest.fixture(scope="module")
def shared(alone, tmp_path_factory):
    """What two processes make of the first batches, and of the others from where one process was."""
    scenarios = {
        "bfloat16": {"config": PLAIN, "dtype": "bfloat16", "batches": BATCHES[:NUM_FIRST]},
        "restored": {"config": CONFIGS["reference"], "batches": [], "state": alone["reference"][1]["state"]},
        "nonfinite": {"config": PLAIN, "batches": [BATCHES[1], BAD, BAD, BATCHES[1], BAD, BAD, BAD]},
    }
    for name, config in CONFIGS.items():
        scenarios[f"{name} 0"] = {"config": config, "batches": BATCHES[:NUM_FIRST]}
        scenarios[f"{name} 1"] = {"config": config, "batches": BATCHES[NUM_FIRST:], "state": alone[name][0]["state"]}
    for scenario in scenarios.values():
        scenario["model"] = make_model(scenario.pop("dtype", "float32"))
        scenario["temperature"] = TEMPERATURE
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(scenarios, folder / "scenarios.pt")
    subprocess.run([sys.executable, SCRIPT, "2", folder / "scenarios.pt", folder / "results.pt"], check=True)
    return torch.load(folder / "results.pt", weights_only=False)


def assert_same_training(found, expected, *, precision=1e-4):
    assert len(found["stats"]) == len(expected["stats"])
    for ours, theirs in zip(found["stats"], expected["stats"], strict=True):
        for name in ("num_tokens", "num_completions", "num_steps", "num_skipped_steps", "policy_version"):
            assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("loss", "grad_norm", "clip_fraction", "tis_mean", "mismatch", "kl", "entropy", "learning_rate"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=precision, abs=precision), name
    assert found["policy"].keys() == expected["policy"].keys()
    for name, weight in expected["policy"].items():
        other = found["policy"][name]
        assert other.dtype == weight.dtype
        assert (other - weight).float().abs().mean() < precision * weight.float().abs().mean(), name
    assert found["state"][1] == expected["state"][1]
    assert found["state"][0].keys() == expected["state"][0].keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes_train_as_one_does_and_go_on_from_where_it_was(alone, shared, name):
    for half, expected in enumerate(alone[name]):
        assert_same_training(shared[f"{name} {half}"], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_process_goes_on_from_where_two_were(alone, shared, name):
    trainer = make_trainer(CONFIGS[name])
    trainer.load_state(*shared[f"{name} 0"]["state"])
    assert_same_training(seen(trainer, [trainer.update(batch) for batch in BATCHES[NUM_FIRST:]]), alone[name][1])


def test_state_goes_through_two_processes_bit_for_bit(alone, shared):
    tensors, meta = alone["reference"][1]["state"]
    found, found_meta = shared["restored"]["state"]
    assert found_meta == meta
    assert found.keys() == tensors.keys()
    assert any(name.startswith("reference.") for name in tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    policy = alone["reference"][1]["policy"]
    assert all(torch.equal(shared["restored"]["policy"][name], weight) for name, weight in policy.items())


def test_in_bf16_they_train_as_one_does(shared):
    model = make_model("bfloat16")
    trainer = Trainer(model, PLAIN, temperature=TEMPERATURE)
    expected = seen(trainer, [trainer.update(batch) for batch in BATCHES[:NUM_FIRST]])
    assert_same_training(shared["bfloat16"], expected, precision=0.02)
    assert shared["bfloat16"]["stats"][0].grad_norm == pytest.approx(expected["stats"][0].grad_norm, rel=1e-4)


def test_they_skip_the_same_steps_and_stop_together(shared):
    stats = shared["nonfinite"]["stats"]
    assert [one.skipped for one in stats] == [False, True, True, False, True, True]
    assert stats[-1].policy_version == 2
    assert "3 updates in a row" in shared["nonfinite"]["error"]
