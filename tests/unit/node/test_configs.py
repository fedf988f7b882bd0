from pathlib import Path

import pytest

from node.experiment.plan import make_plan
from node.layers import read_toml

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


def test_there_are_configs():
    assert "silo.toml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_says_how_it_is_run(path):
    plan = make_plan([read_toml(path)], {})  # which also reads a file without anything of an experiment
    assert all(config.tasks.sources for unit in plan.units for config in unit.configs)
    assert f"--config configs/{path.name}" in path.read_text()
