from dataclasses import replace

import msgpack
import pytest
import torch

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig
from swarm.engine.torch import TorchEngine
from swarm.policy import load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.seeds import fold_seed
from swarm.types import Task

NUM_GROUPS, ROUNDS = 3, 6
CONFIG = RolloutConfig(
    num_completions=4, max_new_tokens=40, temperature=1.0, over_provision=2.0, schedule="partial", max_age=2
)


class BytePolicy:
    def encode_prompt(self, question):
        return tuple(question.encode())

    def decode(self, token_ids):
        return " ".join(map(str, token_ids))


def questions(round_index, num=NUM_GROUPS):
    if round_index > ROUNDS:
        return []
    return [
        Task(TaskRef("sums", "0" * 32, round_index, at), f"What is {round_index + 3} plus {at + 2}?")
        for at in range(num)
    ]


def play(rollouts, load, begin=1, end=ROUNDS, kill_after=None):
    """Rounds with a new policy after each. Returns the groups of each round, and rows."""
    found = []
    for index in range(begin, end + 1):
        groups = rollouts.collect(questions(index), round_index=index)
        found.append((groups, rollouts.describe()))
        load(index)
        if index == kill_after:
            return found, msgpack.unpackb(msgpack.packb(rollouts.state()))
    return found


@pytest.fixture(scope="module")
def tiny():
    return load_policy(ModelConfig(name="tiny"))


def torch_engine(tiny, num_slots=32):
    config = EngineConfig(max_slots=num_slots)
    return TorchEngine(tiny.model, eos_token_ids=tiny.eos_token_ids, config=config, max_seq_len=96)


def moving(engine, tiny, scale=4e-3):
    """A policy that moves by as much in each round."""

    def load(index):
        torch.manual_seed(index)
        state = {name: t + scale * index * t.std() * torch.randn_like(t) for name, t in tiny.model.state_dict().items()}
        engine.load_policy(state, index)

    return load


def written(found):
    return [
        [(group.task, group.texts, [(c.token_ids, c.logprobs, c.segments, c.finish_reason) for c in group.completions])
         for group in groups]
        for groups, _ in found
    ]  # fmt: skip


def test_verified_rollouts_of_the_built_in_model_are_those_of_a_synchronous_run_bit_for_bit(tiny):
    engine = torch_engine(tiny)
    expected = play(RolloutCollector(engine, tiny, CONFIG, 5), moving(engine, tiny))
    ahead = torch_engine(tiny)
    partial = PartialRollouts(ahead, tiny, CONFIG, 5, questions)
    found = play(partial, moving(ahead, tiny))
    assert written(found) == written(expected)
    rows = [row for _, row in found]
    assert rows[0]["num_groups_in_flight"] == 6
    assert sum(row["num_tokens_cut"] for row in rows) > 0, "the policy has to move for this to mean anything"
    assert all(row["num_groups_recycled"] == NUM_GROUPS for row in rows[1:])
    assert {(row["staleness_mean"], row["staleness_max"]) for row in rows} == {(0, 0)}
    assert [list(row["policy_versions"]) for row in rows] == [[str(version)] for version in range(ROUNDS)]
    assert ahead.stats.num_steps < engine.stats.num_steps


@pytest.mark.parametrize("settings", [{"order": "arrival"}, {"stale_tokens": "correct"}, {}])
def test_a_node_that_was_killed_goes_on_bit_for_bit(tiny, settings):
    config = CONFIG.model_copy(update={"over_provision": 0.0, "max_over_provision": 2.5, **settings})
    whole_engine, engine = torch_engine(tiny), torch_engine(tiny)
    whole = play(PartialRollouts(whole_engine, tiny, config, 5, questions), moving(whole_engine, tiny))
    before, state = play(PartialRollouts(engine, tiny, config, 5, questions), moving(engine, tiny), kill_after=3)
    fresh = torch_engine(tiny)
    moving(fresh, tiny)(3)
    resumed = PartialRollouts(fresh, tiny, config, 5, questions)
    resumed.load_state(state)
    after = play(resumed, moving(fresh, tiny), begin=4)
    assert written(before + after) == written(whole)
    steady = [{name: value for name, value in row.items() if not name.endswith("_s")} for _, row in before + after]
    assert steady == [{k: v for k, v in row.items() if not k.endswith("_s")} for _, row in whole]


@pytest.fixture
def rollouts(simulated):
    def build(engine=None, **settings):
        lengths = (2, 3, 4, 5, 6, 30)
        engine = engine or simulated(lambda seed: lengths[seed % 6], 64, change=0.05)
        config = CONFIG.model_copy(update=settings)
        return PartialRollouts(engine, BytePolicy(), config, 5, questions, clock=lambda: 0.0), engine

    return build


@pytest.mark.parametrize("order", ["submission", "arrival"])
@pytest.mark.parametrize("stale", ["verify", "correct", "mask"])
def test_every_task_is_returned_once_by_the_end(rollouts, order, stale):
    partial, engine = rollouts(order=order, stale_tokens=stale)
    found = play(partial, lambda index: engine.load_policy(None, index))
    tasks = [group.task for groups, _ in found for group in groups]
    assert sorted(tasks, key=lambda t: (t.ref.seed, t.ref.index)) == [t for i in range(1, 7) for t in questions(i)]
    assert (tasks == [t for i in range(1, 7) for t in questions(i)]) == (order == "submission")
    assert found[-1][1]["num_groups_carried"] == 0
    for groups, _ in found:
        for group in groups:
            for index, one in enumerate(group.completions):
                seed = fold_seed(5, group.task.ref.seed, group.task.ref.index, index)
                assert len(one.token_ids) == min(40, engine.length(seed))
            if stale == "mask":
                old = [one.segments[-1].end if one.segments[-1].policy_version < 0 else 0 for one in group.completions]
                assert all(have >= least for have, least in zip(group.num_masked, old, strict=True))
    masked = [num for groups, _ in found for group in groups for num in group.num_masked]
    assert (sum(masked) > 0) == (stale == "mask")
    assert (sum(row["staleness_max"] for _, row in found) > 0) == (stale != "verify")


def test_masked_tokens_are_those_that_an_older_policy_wrote(rollouts):
    partial, engine = rollouts(stale_tokens="mask")
    for index in (1, 2):
        groups = partial.collect(questions(index), round_index=index)
        for group in groups:
            for one, num in zip(group.completions, group.num_masked, strict=True):
                assert num == sum(p.end - p.start for p in one.segments if p.policy_version != engine.policy_version)
        engine.load_policy(None, index)


def test_an_engine_that_cannot_verify_keeps_tokens_with_their_versions(rollouts, simulated):
    class Plain(simulated):
        verifies_drafts = False

    partial, engine = rollouts(Plain(lambda seed: 2 + seed % 30, 64))
    found = play(partial, lambda index: engine.load_policy(None, index))
    assert engine.stats.num_draft_tokens == 0
    assert max(row["staleness_max"] for _, row in found) == 1
    assert all(len(row["policy_versions"]) <= 2 for _, row in found)


def test_rounds_may_ask_for_more_than_was_written_ahead_and_a_resumed_run_for_less(rollouts):
    partial, _ = rollouts()
    assert len(partial.collect(questions(1, 3), round_index=1)) == 3
    groups = partial.collect(questions(2, 5), round_index=2)
    assert [group.task for group in groups] == questions(2, 5)
    other, _ = rollouts()
    other.load_state(partial.state())
    fewer = other.collect(questions(3, 1), round_index=3)
    assert [group.task for group in fewer] == questions(3, 3), "what has been begun is finished"
    assert [group.task for group in other.collect(questions(4, 1), round_index=4)] == questions(4, 2)
    assert [group.task for group in other.collect(questions(5, 1), round_index=5)] == questions(5, 1)


def test_synchronous_rollouts_refuse_a_buffer_that_they_cannot_finish(rollouts, simulated):
    partial, engine = rollouts()
    partial.collect(questions(1), round_index=1)
    plain = RolloutCollector(engine, BytePolicy(), CONFIG, 5)
    assert (plain.state(), plain.describe()) == (None, {})
    plain.load_state(None)
    plain.load_state({"groups": []})
    with pytest.raises(ValueError, match="synchronous"):
        plain.load_state(partial.state())


def test_which_settings_make_rollouts_partial():
    assert not RolloutConfig().is_partial
    assert RolloutConfig(max_new_tokens=257).is_partial
    assert not RolloutConfig(max_new_tokens=4096, schedule="synchronous").is_partial
    assert RolloutConfig(max_new_tokens=4096, partial_above_tokens=8192).is_partial is False
    assert RolloutConfig(schedule="partial").is_partial
    with pytest.raises(ValueError, match="0 or at least 1"):
        RolloutConfig(over_provision=0.5)


def test_groups_are_scored_with_their_masks(rollouts):
    partial, engine = rollouts(stale_tokens="mask")
    partial.collect(questions(1), round_index=1)
    engine.load_policy(None, 1)
    [group, *_] = partial.collect(questions(2), round_index=2)
    assert replace(group.with_rewards((0.0, 1.0, 0.0, 1.0)), rewards=()) == group


def first_rounds(tiny, seeds, **settings):
    """The lengths that the first round of several runs of the built-in model trains on."""
    found = []
    engine = torch_engine(tiny, num_slots=96)
    config = CONFIG.model_copy(update={"num_completions": 4, "over_provision": 3.0, **settings})
    for seed in seeds:
        tasks = {at: questions(at, 6) for at in (1, 2, 3)}
        partial = PartialRollouts(engine, tiny, config, seed, lambda at, tasks=tasks: tasks.get(at, []))
        groups = partial.collect(tasks[1], round_index=1)
        found += [len(one.token_ids) for group in groups for one in group.completions]
    return found


def largest_difference(one, other):
    """Of two empirical distribution functions."""
    return max(
        abs(sum(n <= at for n in one) / len(one) - sum(n <= at for n in other) / len(other)) for at in {*one, *other}
    )


def test_the_built_in_model_shows_the_bias_of_arrival_and_none_of_submission(tiny):
    expected = first_rounds(tiny, range(100, 124), over_provision=1.0)
    limit = 1.95 * (2 / len(expected)) ** 0.5
    assert largest_difference(first_rounds(tiny, range(24)), expected) < limit
    early = first_rounds(tiny, range(24), order="arrival", stale_tokens="correct")
    assert largest_difference(early, expected) > limit, "the control: what is whole first is short"


def test_a_round_in_several_calls_is_refused(rollouts):
    partial, _ = rollouts()
    with pytest.raises(ValueError, match="in one call"):
        partial.collect(questions(1), round_index=1, spans=[range(2)] * len(questions(1)))
