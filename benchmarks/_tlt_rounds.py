"""Parts of benchmarks/tlt.py that go over rounds of learning: `adapt` and `learning`."""

import copy
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _tlt import MAX_SEQ_LEN, NUM_TAUGHT_PROMPTS, engine_of, prompts_of, requests_of, teach
from harness import Bar
from warm_start import MAX_NEW_TOKENS

from swarm.config import TrainerConfig
from swarm.drafting.drafting import Drafting
from swarm.drafting.head import HeadDrafter
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy
from swarm.tasks.gym import import_reasoning_gym
from swarm.trainer import Trainer
from swarm.types import Completion, TrainingBatch, TrainingGroup

__all__ = ["adapt", "learning"]

_GROUP, _LEARNING_SHARE = 8, 0.05
_VISIBLE = 0.05  # tokens a pass
_EASY: dict[str, dict[str, Any]] = {  # what *sure* answers right now and then, so that it learns
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 20},
}


def adapt(policy: Policy, num_rounds: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """Accepted length over rounds of reinforcement learning, of a drafter that learns on and of one that does not.

    Both begin with the same lessons, on questions of these kinds among others. The one that goes on has what `Drafting`
    gives it: a small share of each round's time. Either writes every round's completions, with drafts of its own: they
    are the same tokens. In the end the frozen one drafts for the first policy, on the questions of the last fifth: what
    it has lost is that, less what it had there with the policy of then.
    """
    dataset = import_reasoning_gym().create_dataset
    entries = [entry for task, settings in _EASY.items() for entry in dataset(task, seed=79, size=500, **settings)]
    model = copy.deepcopy(policy.model)
    others = [entry for task, settings in _EASY.items() for entry in dataset(task, seed=32, size=64, **settings)]
    lessons = [
        *prompts_of(policy, 31, NUM_TAUGHT_PROMPTS // 2),
        *(policy.encode_prompt(entry["question"]) for entry in others),
    ]
    learner, taught = teach(policy, model, lessons, num_steps)
    print(f"adapt: taught: {json.dumps(taught)}", file=sys.stderr, flush=True)
    trainer = Trainer(model, TrainerConfig(learning_rate=2e-5, max_tokens_per_microbatch=1024))
    trainer.observer = learner.observe
    frozen_model, frozen_vocabulary = copy.deepcopy(learner.model), learner.vocabulary.clone()

    def engine(head_model: Any, vocabulary: Callable[[], torch.Tensor]) -> TorchEngine:
        head = HeadDrafter(head_model, policy.model, vocabulary, num_slots=_GROUP, capacity=MAX_SEQ_LEN)
        # a clock that stands still: drafts then depend on what is observed of them, and not on what a pass takes
        return engine_of(policy, _GROUP, Speculator([head], Strategy("head", 6, 6 * _GROUP), clock=lambda: 0.0))

    engines = {
        "learning": engine(learner.model, lambda: learner.vocabulary),
        "frozen": engine(frozen_model, lambda: frozen_vocabulary),
    }
    not_of_a_node_s = 0.0  # a node has one drafter: the other one's rollouts are no part of its rounds
    drafting = Drafting(engines["learning"].speculator, learner, clock=lambda: time.perf_counter() - not_of_a_node_s)

    def write(one: TorchEngine, requests: Sequence[Request]) -> tuple[list[Completion], float]:
        """Return what an engine writes, and its accepted length."""
        assert one.speculator is not None
        before = copy.copy(one.speculator.counts["head"])
        done = one.generate(requests)
        since = one.speculator.counts["head"].since(before)
        return done, 1 + since.num_kept / max(1, since.num_drafts)

    lengths: dict[str, list[float]] = {way: [] for way in engines}
    learned_s, round_s = [], []
    rewarded, surprisals, rng = [], [], random.Random(0)
    asked: list[list[Request]] = []
    for round_index in range(num_rounds):
        begin, frozen_s = time.perf_counter(), 0.0
        chosen = [rng.choice(entries) for _ in range(4)]
        requests = requests_of(
            [policy.encode_prompt(entry["question"]) for entry in chosen], _GROUP, MAX_NEW_TOKENS,
            4 * _GROUP * round_index,
        )  # fmt: skip
        asked.append(requests)
        done, length = write(engines["learning"], requests)
        lengths["learning"].append(length)
        frozen_begins = time.perf_counter()
        same, length = write(engines["frozen"], requests)
        lengths["frozen"].append(length)
        frozen_s = time.perf_counter() - frozen_begins
        not_of_a_node_s += frozen_s
        if [one.token_ids for one in same] != [one.token_ids for one in done]:
            raise AssertionError(f"round {round_index}: drafts have changed what is written")
        surprisals.append(-sum(sum(one.logprobs) for one in done) / sum(len(one.token_ids) for one in done))
        groups = []
        for place, entry in enumerate(chosen):
            members = done[_GROUP * place : _GROUP * (place + 1)]
            end = f"The answer is {entry['answer']}."
            rewards = [float(policy.decode(one.token_ids).strip().endswith(end)) for one in members]
            rewarded += rewards
            mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
            advantages = tuple((reward - mean) / spread if spread else 0.0 for reward in rewards)
            groups.append(
                TrainingGroup(requests[_GROUP * place].prompt_ids, tuple(one.token_ids for one in members),
                              advantages, tuple(one.logprobs for one in members))
            )  # fmt: skip
        trainer.update(TrainingBatch(tuple(groups)))
        drafting.policy_updated()
        learning_begins = time.perf_counter()
        drafting.catch_up()
        learned_s.append(time.perf_counter() - learning_begins)
        for one in engines.values():
            one.load_policy(trainer.policy_state(), trainer.policy_version)
        round_s.append(time.perf_counter() - begin - frozen_s)
        print(
            f"adapt: round {round_index}: {lengths['learning'][-1]:.3f} {lengths['frozen'][-1]:.3f} "
            f"reward {statistics.fmean(rewarded[-4 * _GROUP:]):.2f} nats {surprisals[-1]:.3f} "
            f"learned {learned_s[-1]:.2f} of {round_s[-1]:.2f} s", file=sys.stderr, flush=True,
        )  # fmt: skip
    drafting.close()
    fifth = num_rounds // 5
    engines["frozen"].load_policy(policy.model.state_dict(), trainer.policy_version + 1)
    at_first = statistics.fmean(write(engines["frozen"], requests)[1] for requests in asked[-fifth:])

    def fifths(values: Sequence[float]) -> list[float]:
        width = len(values) // 5
        return [round(statistics.fmean(values[at : at + width]), 3) for at in range(0, 5 * width, width)]

    mean_lengths = {way: fifths(one) for way, one in lengths.items()}
    share = round(sum(learned_s) / sum(round_s), 4)
    gain = round(mean_lengths["learning"][-1] - mean_lengths["frozen"][-1], 3)
    lost = round(at_first - mean_lengths["frozen"][-1], 3)
    figures = {
        "num_rounds": num_rounds,
        "teaching": taught,
        "accepted_length_by_fifths": mean_lengths,
        "accepted_length": {way: [round(one, 3) for one in ones] for way, ones in lengths.items()},
        "frozen_on_the_first_policy_on_the_last_fifth": round(at_first, 3),
        "reward_by_fifths": fifths(rewarded),
        "nats_a_token_by_fifths": fifths(surprisals),
        "round_s": round(statistics.fmean(round_s), 2),
        "learning_share_of_a_round": share,
        "learning_share_of_the_last_fifth": round(sum(learned_s[-fifth:]) / sum(round_s[-fifth:]), 4),
        "num_steps": learner.num_steps - num_steps,
    }
    return figures, [
        Bar("adapt: accepted length at the end, learning less frozen", gain, _VISIBLE),
        Bar("adapt: accepted length that the frozen drafter has lost", lost, _VISIBLE),
        Bar("adapt: share of a round's time that learning takes", share, _LEARNING_SHARE, at_least=False),
    ]  # fmt: skip


def learning(num_seeds: int, num_rounds: int) -> tuple[dict[str, Any], list[Bar]]:
    """Rewards with and without drafts. Every run is a `swarm-node silo` of its own."""
    curves: dict[str, list[list[float]]] = {}
    for mode in ("off", "auto", "head"):
        curves[mode] = []
        for seed in range(num_seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    str(Path(sys.executable).with_name("swarm-node")), "silo", "--json", "--seed", str(seed),
                    "--rounds", str(num_rounds), "--run-dir", f"{folder}/run", "--set", f"engine.speculation={mode}",
                    "--set", "evaluation.num_items=0",
                ]  # fmt: skip
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            curves[mode].append(
                [json.loads(line)["reward_mean"] for line in output.splitlines() if line.startswith("{")]
            )
    apart = max(
        (abs(one - other) for mode in ("auto", "head") for ours, plain in zip(curves[mode], curves["off"], strict=True)
         for one, other in zip(ours, plain, strict=True)), default=math.inf,
    )  # fmt: skip
    means = {mode: round(statistics.fmean(itertools.chain.from_iterable(ones)), 4) for mode, ones in curves.items()}
    figures = {"num_seeds": num_seeds, "num_rounds": num_rounds, "reward_mean": means, "largest_difference": apart}
    return figures, [Bar("learning: largest difference of any round's reward", apart, 0.0, at_least=False)]
