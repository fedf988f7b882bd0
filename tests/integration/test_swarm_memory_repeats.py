"""A simulation is a function of its seed: of nothing that differs between two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMULATE = """
import asyncio, hashlib
from _swarm import Swarm, write_group
from protocol.transport import virtual_time
from protocol.transport.memory import Faults

async def train(node):
    while True:
        node.member.sample(3)
        await node.member.publish([write_group(node.rng, num_completions=2, num_chars=60) for _ in range(3)])
        await asyncio.sleep(5 * node.rng.uniform(0.8, 1.2))

async def main():
    swarm = Swarm(seed=3, faults=Faults(loss=0.01, reordering=0.05))
    training = []
    for _ in range(16):
        training.append(asyncio.create_task(train(await swarm.add(reserve_groups=4))))
    await asyncio.sleep(150)
    for node in swarm.nodes:
        known = sorted(known.record.node_id for known in node.member.directory.nodes())
        print(node.transport.traffic, node.status(), hashlib.sha256(repr(known).encode()).hexdigest())
    for task in training:
        task.cancel()
    await swarm.close()

virtual_time.run(main())
"""


@pytest.mark.no_cover
def test_two_simulations_of_one_seed_are_equal():
    outputs = []
    for hash_seed in ("0", "1"):  # which decides the order of sets
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
            "PYTHONHASHSEED": hash_seed,
        }
        done = subprocess.run(
            [sys.executable, "-c", SIMULATE], env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.splitlines())
    assert len(outputs[0]) == 16
    assert outputs[0] == outputs[1]
