"""Trains what a file says in several processes that share the policy, and writes what the leader has.

    python sharded_ranks.py NUM_RANKS SCENARIOS RESULTS

One process imports torch and transformers; the others are forked from it.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama  # noqa: F401

from swarm.errors import SwarmError
from swarm.sharded_trainer import ShardedTrainer


def train(scenario: dict[str, Any]) -> dict[str, Any]:
    """Go on from a state where there is one, and make one update of each batch."""
    torch.manual_seed(dist.get_rank())  # adapters begin as the first one's
    trainer = ShardedTrainer(scenario["model"], scenario["config"], temperature=scenario["temperature"])
    if "state" in scenario:
        tensors, meta = scenario["state"]
        trainer.load_state(tensors if dist.get_rank() == 0 else {}, meta)
    stats, error = [], None
    for batch in scenario["batches"]:
        try:
            stats.append(trainer.update(batch))
        except SwarmError as raised:
            error = repr(raised)
    state = trainer.policy_state()
    policy = {name: state[name] for name in state}
    return {"stats": stats, "error": error, "policy": policy, "state": (trainer.state_tensors(), trainer.state_meta())}


def main() -> None:
    num_ranks, scenarios, results = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        children = []
        rank = 0
        for number in range(1, num_ranks):
            pid = os.fork()
            if not pid:
                rank = number
                break
            children.append(pid)
        status = 1
        try:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
            done = {name: train(one) for name, one in torch.load(scenarios, weights_only=False).items()}
            if rank == 0:
                torch.save(done, results)
            else:
                assert all(not one["policy"] and not one["state"][0] for one in done.values())
            dist.destroy_process_group()
            status = 0
        finally:
            if rank:
                if status:
                    sys.excepthook(*sys.exc_info())
                os._exit(status)
        for pid in children:
            _, ended = os.waitpid(pid, 0)
            assert not ended


main()
