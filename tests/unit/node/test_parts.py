from node.config import RunConfig
from node.parts import make_rollouts
from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig
from swarm.engine.torch import TorchEngine
from swarm.policy import load_policy
from swarm.types import Task


class Sums:
    def train_batch(self, round_index, num_tasks, *, stride=None):
        return [
            Task(TaskRef("sums", "0" * 32, round_index, at), f"What is {round_index} plus {at}?")
            for at in range(num_tasks)
        ]


def test_questions_of_others_are_asked_again_also_where_a_round_is_begun_ahead():
    rollout = {"schedule": "partial", "over_provision": 4.0, "num_completions": 2, "max_new_tokens": 8}
    sapo = {"num_local": 4, "num_external": 4, "num_broad": 2}
    config = RunConfig.model_validate({"rounds": 5, "rollout": rollout, "sapo": sapo})
    policy, tasks = load_policy(ModelConfig(name="tiny")), Sums()
    engine = TorchEngine(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=8), max_seq_len=64
    )
    rollouts = make_rollouts(config, engine, policy, tasks)
    rollouts.collect(tasks.train_batch(1, 4), round_index=1)
    assert rollouts.describe()["num_groups_carried"] > 4
    asked = tasks.train_batch(2, 2) + tasks.train_batch(77, 2)
    assert [group.task for group in rollouts.collect(asked, round_index=2)] == asked
