import os
import subprocess
import sys

import pytest

from node.config import RunConfig, setting_values, to_toml
from node.layers import (
    ConfigError,
    Layer,
    parse_task_sources,
    read_assignments,
    read_environment,
    read_toml,
    resolve,
)

PRESET = {"rounds": 900, "tasks": {"sources": [{"name": "products"}]}, "trainer": {"learning_rate": 2e-4}}


def preset(model_name: str):
    return PRESET if model_name == "tiny" else {"trainer": {"learning_rate": 3e-4}}


def test_the_strongest_layer_wins_and_every_value_knows_its_origin(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("rounds = 4\nseed = 4\n\n[rollout]\ntemperature = 0.4\ntop_p = 0.4\n[trainer]\nbeta1 = 0.4\n")
    layers = [
        Layer("command line", {"rounds": 1}, {"rounds": "--rounds"}),
        read_assignments(["rounds=2", "seed=2", "model.name=tiny"]),
        read_environment({"SWARM_NODE_SEED": "3", "SWARM_NODE_ROLLOUT__TEMPERATURE": "0.3", "HOME": "/"}),
        read_toml(path),
    ]
    resolved = resolve(layers, preset)
    config, origins = resolved.config, resolved.origins
    assert (config.rounds, origins["rounds"]) == (1, "--rounds")
    assert (config.seed, origins["seed"]) == (2, "--set")
    assert (config.rollout.temperature, origins["rollout.temperature"]) == (
        0.3,
        "environment SWARM_NODE_ROLLOUT__TEMPERATURE",
    )
    assert (config.rollout.top_p, origins["rollout.top_p"]) == (0.4, f"{path}:6")
    assert (config.trainer.learning_rate, origins["trainer.learning_rate"]) == (2e-4, "preset tiny")
    assert (config.trainer.beta2, origins["trainer.beta2"]) == (0.999, "default")
    assert origins.keys() == setting_values(config).keys()


def test_the_preset_is_that_of_the_model_which_any_layer_names():
    config = resolve([read_environment({"SWARM_NODE_MODEL__NAME": "other"})], preset).config
    assert config.trainer.learning_rate == 3e-4


def test_the_resolved_config_read_back_is_the_same(tmp_path):
    assignments = [
        "seed=7",
        'model.system_prompt=say "yes"\nor no',
        "tasks.sources=products:2,chain_sum",
        "trainer.lora.rank=8",
        "trainer.learning_rate=1e-5",
    ]
    config = resolve([read_assignments(assignments)], preset).config
    assert config.trainer.learning_rate == 1e-5
    assert config.trainer.lora.rank == 8
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert resolve([read_toml(tmp_path / "config.toml")], preset).config == config


def test_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "q.jsonl").touch()
    config = resolve([read_assignments(["model.name=model", "tasks.sources=q.jsonl:2,products"])], preset).config
    assert config.model.name == str(tmp_path / "model")
    assert [source.name for source in config.tasks.sources] == [str(tmp_path / "q.jsonl"), "products"]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "trainer.learning_rat=1",
            r"unknown setting trainer.learning_rat \(--set\); did you mean trainer.learning_rate\?",
        ),
        ("learning_rate=1", r"did you mean trainer.learning_rate\?"),
        ("zzz=1", r"unknown setting zzz \(--set\); `swarm-node config show` lists"),
        ("trainer=1", "unknown setting trainer "),
        ("seed", r"--set 'seed' is not of the form key=value"),
        ("=1", r"is not of the form key=value"),
        ("seed=x", r"seed = 'x' \(--set\): input should be a valid integer"),
        ("seed=-1", r"seed = -1 \(--set\): input should be greater than or equal to 0"),
        ("trainer.normalization=x", r"input should be 'grpo', 'dr_grpo', 'dapo' or 'gspo'"),
        ("tasks.sources=products:many", "task weight 'many' in 'products:many' is not a number"),
        ("tasks.sources=products:0", r"tasks.sources.0.weight = 0.0 .*greater than 0"),
        ("tasks.sources=,", "no task is named"),
        ("tasks.answer=[]", "tasks.answer = "),
        ('network.trusted_relays=["/ip4/192.0.2.1/tcp/1"]', "network.trusted_relays are for network.auto_relay"),
    ],
)
def test_a_wrong_assignment_is_one_line_with_the_fix(assignment, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve([read_assignments([assignment])], preset)
    assert "\n" not in str(caught.value)


def test_an_unknown_environment_variable_is_refused_by_its_own_name():
    with pytest.raises(ConfigError, match=r"environment SWARM_NODE_TRAINER__RATE"):
        resolve([read_environment({"SWARM_NODE_TRAINER__RATE": "1"})], preset)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\nrounds = = 2\n", r"run.toml:2: not valid TOML: "),
        ("seed = 1\n[trainer\n", r"run.toml:2: not valid TOML: "),
        ("[trainer]\nlearning_rte = 1\n", r"unknown setting trainer.learning_rte \(.*run.toml:2\); did you mean"),
        ("[trainer]\nbeta1 = 'x'\n", r"trainer.beta1 = 'x' \(.*run.toml:2\)"),
        ("[[tasks.sources]]\nnam = 'x'\n", r"tasks.sources.0.*run.toml:1"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        resolve([read_toml(path)], preset)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no configuration file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        read_toml(tmp_path)


def test_task_lists():
    assert parse_task_sources("products:2, chain_sum") == [{"name": "products", "weight": 2.0}, {"name": "chain_sum"}]


def test_every_setting_has_a_description():
    from node.layers import setting_fields

    assert [name for name, info in setting_fields().items() if not info.description] == []
    assert setting_fields().keys() == setting_values(RunConfig()).keys()


def test_reading_settings_does_not_import_torch():
    code = "import sys, node.cli, node.layers, node.running; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
