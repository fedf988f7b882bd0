"""The swarm in containers, without containers: the file is read, and its commands are run with a program in place of
`swarm-node` that notes what it was given, which the command line then reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from node.cli import run

COMPOSE = Path(__file__).parents[3] / "docker" / "compose.swarm.yaml"
SERVICE_KEYS = {
    "build", "cap_drop", "command", "depends_on", "entrypoint", "environment", "healthcheck", "hostname", "image",
    "init", "read_only", "restart", "security_opt", "stop_grace_period", "tmpfs", "volumes",
}  # fmt: skip
ADDRESSES = ["/ip4/127.0.0.1/tcp/7000/p2p/12D3KooW", "/ip4/172.18.0.2/tcp/7000/p2p/12D3KooW"]
NOTE_ARGUMENTS = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "stats":
    print(json.dumps({{"swarm": {{"addresses": {ADDRESSES}}}}}))
with open(os.environ["NOTED"], "a") as noted:
    noted.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def container(tmp_path):
    """Return a function that runs a shell command as a service does, and returns what `swarm-node` was given."""
    for folder in ("bin", "data/node", "home"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    program = tmp_path / "bin" / "swarm-node"
    program.write_text(NOTE_ARGUMENTS)
    program.chmod(0o755)

    def execute(command, environment):
        text = (
            command.replace("$$", "$").replace("/data", f"{tmp_path}/data").replace("/home/swarm", f"{tmp_path}/home")
        )
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        noted = tmp_path / "noted"
        noted.write_text("")
        variables = {name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in environment.items()}
        subprocess.run(["/bin/sh", "-c", text], env={**variables, "PATH": path, "NOTED": str(noted)}, check=True)
        return [json.loads(line) for line in noted.read_text().splitlines()]

    return execute


def test_every_service_has_what_it_names():
    compose = yaml.safe_load(COMPOSE.read_text())
    services = compose["services"]
    assert set(services) == {"bootstrap", "node-1", "node-2", "node-3"}
    for name, service in services.items():
        assert service.keys() <= SERVICE_KEYS, name
        assert service["depends_on"].keys() <= services.keys() if name != "bootstrap" else "depends_on" not in service
        assert {volume.split(":")[0] for volume in service["volumes"]} <= compose["volumes"].keys()
        assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_the_commands_are_ones_of_the_command_line(container, tmp_path, capsys):
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    bootstrap = services["bootstrap"]
    ran = container(bootstrap["command"][0], {})
    kind, check = bootstrap["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    ran += container(check, {})
    assert (tmp_path / "home" / "peers").read_text() == ADDRESSES[1]  # of another machine's network
    for name in ("node-1", "node-2", "node-3"):
        assert services[name]["entrypoint"] == ["/bin/sh", "-c"]
        [first] = container(services[name]["command"][0], services[name]["environment"])
        assert first[:5] == ["join", "--model", "tiny", "--seed", name[-1]]
        assert first[-2:] == ["--peers", ADDRESSES[1]]
        assert "--resume" not in first
        ran.append(first)
    (tmp_path / "data" / "node" / "config.toml").touch()
    [again] = container(services["node-1"]["command"][0], services["node-1"]["environment"])
    assert "--resume" in again
    for arguments in [*ran, again]:
        assert run([*arguments, "--help"]) == 0, arguments
        assert f"swarm-node {arguments[0]}" in capsys.readouterr().out
