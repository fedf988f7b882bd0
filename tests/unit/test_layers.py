"""What a linter of imports cannot see: what is really loaded when the program starts."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "reasoning_gym", "matplotlib", "peft")


def loaded_after(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the heavy modules that it has loaded."""
    probe = f"{code}\nimport sys\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "LOADED"
    return set(last[1:])


def test_the_probe_sees_a_heavy_module():
    assert loaded_after("import torch") >= {"torch"}


def test_the_wire_loads_no_learning_stack():
    modules = "protocol, protocol.codec, protocol.errors, protocol.identity, protocol.messages"
    assert loaded_after(f"import {modules}") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["silo", "--help"], ["config", "show"]])
def test_the_command_line_answers_without_loading_the_learning_stack(arguments):
    assert loaded_after(f"from node.cli import run\nassert run({arguments!r}) == 0") == set()


@pytest.mark.parametrize("modules", ["node.join, node.swarm_exchange, node.daemon, node.recorder", "node.bootstrap"])
def test_a_node_is_in_its_swarm_before_torch_is_loaded(modules):
    code = "from protocol.transport.hivemind_import import import_dht; import_dht()"
    assert loaded_after(f"import {modules}\n{code}") == set()
