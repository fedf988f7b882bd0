"""What the commands of a swarm make of what was typed, before any node is started."""

from pathlib import Path

import pytest

from node import cli_swarm, running
from node.cli import run
from node.layers import read_toml

PEER = "/ip4/192.0.2.1/tcp/7000/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that types a command and returns the settings and the name with which a node is run."""
    monkeypatch.chdir(tmp_path)
    seen = []

    def run_node(config, folder, *, command, make_exchange, as_json):
        seen.append((config, command))
        from node.config import to_toml

        folder.config.write_text(to_toml(config))
        folder.metrics.touch()
        return 0

    monkeypatch.setattr(running, "run_node", run_node)

    def start(*arguments):
        assert run(arguments) == 0
        return seen[-1]

    return start


def test_join_has_four_and_four_and_flags_go_before(started):
    config, command = started("join", "--run-dir", "a")
    assert command == "join"
    assert (config.sapo.num_local, config.sapo.num_external) == (4, 4)
    assert config.swarm.peers == ()
    config, _ = started(
        *("join", "--run-dir", "b", "--num-local", "6", "--num-external", "2", "--swarm-id", "mine"),
        *("--peers", f"{PEER},{PEER}", "--peers", PEER, "--listen", "7000", "--announce", "/dns4/example.org/tcp/7000"),
    )
    assert (config.sapo.num_local, config.sapo.num_external) == (6, 2)
    assert config.swarm.peers == (PEER, PEER, PEER)
    assert config.swarm.swarm_id == "mine"
    assert config.network.listen == ("/ip4/0.0.0.0/tcp/7000",)
    assert config.network.announce == ("/dns4/example.org/tcp/7000",)


def test_settings_of_a_swarm_come_from_set_environment_and_file_too(started, tmp_path, monkeypatch):
    (tmp_path / "some.toml").write_text('[swarm]\nswarm_id = "file"\n[sapo]\nnum_external = 3\n')
    monkeypatch.setenv("SWARM_NODE_SWARM__PEERS", f"{PEER}, {PEER}")
    config, _ = started("join", "--run-dir", "a", "--config", "some.toml", "--set", "sapo.publish=all")
    assert config.swarm.swarm_id == "file"
    assert config.sapo.num_external == 3
    assert config.swarm.peers == (PEER, PEER)
    assert config.sapo.publish == "all"


def test_a_run_goes_from_silo_to_join_and_back(started):
    config, _ = started("silo", "--run-dir", "run", "--seed", "5")
    assert (config.sapo.num_local, config.sapo.num_external) == (8, 0)
    config, command = started("join", "--run-dir", "run", "--resume", "--peers", PEER)
    assert command == "join"
    assert (config.seed, config.sapo.num_local, config.sapo.num_external) == (5, 4, 4)
    config, command = started("silo", "--run-dir", "run", "--resume")
    assert command == "silo"
    assert (config.sapo.num_local, config.sapo.num_external) == (4, 4), "what is missing is replaced: a batch of eight"
    assert config.swarm.peers == (PEER,)
    config, _ = started("join", "--run-dir", "run", "--resume", "--num-external", "2")
    assert (config.sapo.num_local, config.sapo.num_external, config.swarm.peers) == (4, 2, (PEER,))


def test_a_mistake_is_one_line_and_no_folder(started, tmp_path, capsys):
    for arguments, message in (
        (("join", "--peers", "example.org:7000"), "--peers 'example.org:7000' is no address of a node"),
        (("join", "--listen", "here"), "cannot listen on 'here'"),
        (("join", "--swarm-id", "x" * 65), "swarm_id has at most 64 bytes"),
        (("join", "--num-external", "-1"), "sapo.num_external = -1 (--num-external)"),
        (("bootstrap", "--peers", "nowhere"), "is no address of a node"),
        (("stats",), "no node has run in runs"),
        (("peers", "--run-dir", "nothing"), "no node runs in nothing"),
        (("stats", "--socket", "nothing"), "no node listens at nothing"),
        (("network",), "no node has run in runs"),
    ):
        assert run(arguments) == 2, arguments
        [line] = capsys.readouterr().err.splitlines()
        assert message in line, line
    assert list(tmp_path.iterdir()) == []


def test_the_saved_settings_of_a_member_stay_as_they_are(tmp_path: Path):
    path = tmp_path / "config.toml"
    path.write_text("seed = 3\n[sapo]\nnum_local = 2\nnum_external = 6\n")
    layer = read_toml(path)
    assert cli_swarm._without_silo_batches(layer) is layer
    path.write_text("seed = 3\n[sapo]\nnum_local = 2\nnum_external = 0\n")
    assert cli_swarm._without_silo_batches(read_toml(path)).values == {"seed": 3}
