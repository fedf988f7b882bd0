"""What can be done with a policy outside of training: evaluate it, export it.

The policy of a run is its newest readable checkpoint and the journal's rounds after it; nothing in the run
folder is changed.
"""

import json
import sys
from pathlib import Path

from node.config import RunConfig
from node.layers import read_toml, resolve
from node.parts import make_engine, make_trainer
from node.recorder import drafting_state
from node.run_folder import RunFolder
from node.summary import tasks_label
from swarm.checkpoint import Checkpoints
from swarm.errors import CheckpointError
from swarm.evaluation import evaluate
from swarm.journal import Journal
from swarm.policy import Policy, export, load_policy
from swarm.scoring import ScoringPool
from swarm.tasks import build_task_set

__all__ = ["evaluate_policy", "export_drafter", "export_policy", "load_trained"]


def load_trained(config: RunConfig, folder: RunFolder) -> tuple[Policy, int]:
    """Return the policy after the last finished round of a run, and that round."""
    trained = load_policy(config.model)
    trainer = make_trainer(config, trained)
    checkpoint, damaged = Checkpoints(folder.checkpoints, config.checkpoint.keep).newest()
    round_index = 0
    if checkpoint is not None:
        trainer.load_state(checkpoint.tensors, checkpoint.meta)
        round_index = checkpoint.round_index
    records = Journal(folder.journal).read_after(round_index)
    if checkpoint is None and not records:
        raise CheckpointError(damaged[0] if damaged else f"no round of the run in {folder.path} is finished yet")
    for line in damaged:
        print(f"{line}; taking round {round_index}", file=sys.stderr)
    for record in records:
        if record.batch.groups:
            trainer.update(record.batch)
    # With adapters the trainer's model has other modules; the merged weights fit the model as it was loaded.
    policy = trained if config.trainer.lora.rank == 0 else load_policy(config.model)
    policy.model.load_state_dict(trainer.policy_state(), strict=False)
    return policy, records[-1].round_index if records else round_index


def export_policy(folder: RunFolder, target: Path) -> None:
    """Write a run's policy to a folder that transformers and vLLM load."""
    policy, round_index = load_trained(resolve([read_toml(folder.config)]).config, folder)
    export(policy, target)
    print(f"{target} holds the policy after round {round_index}")


def export_drafter(folder: RunFolder, target: Path) -> None:
    """Write a run's learned drafter to a folder, in the names and the shape of vLLM's EAGLE drafters."""
    from swarm.drafting.head_export import export_head
    from swarm.drafting.learner import HeadLearner

    config = resolve([read_toml(folder.config)]).config
    checkpoint, damaged = Checkpoints(folder.checkpoints, config.checkpoint.keep).newest()
    if checkpoint is None:
        raise CheckpointError(damaged[0] if damaged else f"the run in {folder.path} has no checkpoint yet")
    tensors, meta = drafting_state(checkpoint)
    if meta is None or meta["learner"] is None:
        raise CheckpointError(f"the run in {folder.path} has no learned drafter: run it with engine.speculation=auto")
    learner = HeadLearner(load_policy(config.model).model)
    learner.load_state(tensors, meta["learner"])
    export_head(learner.model, target)
    print(f"{target} holds the drafter after round {checkpoint.round_index}, {learner.num_steps} steps of learning")


def evaluate_policy(config: RunConfig, folder: RunFolder | None, *, as_json: bool) -> None:
    """Print held-out pass@1 of a run's policy, or of a model as it is."""
    tasks = build_task_set(config.tasks, config.seed)
    with ScoringPool(config.tasks, config.scoring) as scorer:
        policy, round_index = (load_policy(config.model), 0) if folder is None else load_trained(config, folder)
        engine = make_engine(config, policy, tasks)
        try:
            evaluation = evaluate(
                engine,
                policy,
                scorer,
                tasks.heldout(config.evaluation.num_items),
                temperature=config.evaluation.temperature,
                max_new_tokens=config.rollout.max_new_tokens,
                seed=config.seed,
            )
        finally:
            engine.close()
    what = config.model.name if folder is None else f"{folder.path} after round {round_index}"
    if as_json:
        figures = {"pass_at_1_heldout": evaluation.pass_at_1, "num_items": evaluation.num_items, "round": round_index}
        print(json.dumps(figures))
    else:
        label = tasks_label(config)
        print(f"{what} on {label}: held-out pass@1 {evaluation.pass_at_1:.3f} ({evaluation.num_items} questions)")
