from pathlib import Path

import pytest

from node.experiment.plan import make_plan
from node.layers import read_toml, resolve

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


def test_there_are_configs():
    assert "silo.toml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_says_how_it_is_run(path):
    layer = read_toml(path)
    if "experiment" in path.read_text().split("--config")[0]:
        configs = [config for unit in make_plan([layer], {}).units for config in unit.configs]
    else:
        configs = [resolve([layer]).config]
    assert all(config.tasks.sources for config in configs)
    assert f"--config configs/{path.name}" in path.read_text()
