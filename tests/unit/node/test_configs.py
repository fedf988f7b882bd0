from pathlib import Path

import pytest

from node.layers import read_toml, resolve

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


def test_there_are_configs():
    assert "silo.toml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_says_how_it_is_run(path):
    assert resolve([read_toml(path)]).config.tasks.sources
    assert f"--config configs/{path.name}" in path.read_text()
