"""Speculative decoding against plain decoding: how fast, on which policies, and what the drafter's learning costs.

    python benchmarks/tlt.py [--sure FOLDER] [--unsure smollm2-135m] [--parts tail,round,adapt,learning] [--short]

tail      batches of 1, 2 and 4 sequences, T = 1: each drafter and the tuner against plain decoding; the same requests,
          turn by turn. *sure* is what `benchmarks/warm_start.py` made; *unsure* is the model as it comes. The learned
          drafter is taught on other questions first, and how long that takes is said
round     a whole long-tail round, partial rollouts and the tuner on, against both off
adapt     *sure* over rounds of reinforcement learning: accepted length of a drafter that goes on learning and of one
          that does not, and the share of a round's time that learning takes
learning  rewards of `swarm-node silo` over seeds, with and without: equal, number by number

A ceiling is what would come of the policy's own numbers: for drafts without noise of their own a token is right with
the largest probability at most, on average; verifying a draft costs what this machine takes for so many tokens.
"""

import argparse
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
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from april import enforce, tail_length
from harness import Bar, report
from warm_start import MAX_NEW_TOKENS, TASKS, questions

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig, TrainerConfig
from swarm.drafting.drafting import Drafting
from swarm.drafting.head import HeadDrafter
from swarm.drafting.learner import HeadLearner
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import Speculator, make_speculator
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy, load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.tasks.gym import import_reasoning_gym
from swarm.trainer import Trainer
from swarm.types import Task, TrainingBatch, TrainingGroup

_PARTS = ("tail", "round", "adapt", "learning")
_BATCHES = (1, 2, 4)
_DEPTH = 6
_BEST, _SUFFIX, _NEVER_BELOW, _ROUND, _LEARNING_SHARE = 1.7, 1.3, 0.97, 2.0, 0.05
_MAX_SEQ_LEN = 512
_ROUND_SLOTS, _ROUND_WARMUP = 32, 4
_ADAPT_GROUP = 8
_EASY: dict[str, dict[str, Any]] = {  # what *sure* answers right now and then, so that it learns
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 20},
}
_TAUGHT_PROMPTS = 256  # that the learned drafter learns from, before it is measured


def prompts_of(policy: Policy, seed: int, num: int) -> list[tuple[int, ...]]:
    """Return questions of every task in turn."""
    entries = {task: questions(task, seed, -(-num // len(TASKS))) for task in TASKS}
    return [
        policy.encode_prompt(entries[task][at]["question"]) for at in range(-(-num // len(TASKS))) for task in TASKS
    ]


def requests_of(prompts: Sequence[tuple[int, ...]], members: int, max_new_tokens: int, first: int) -> list[Request]:
    """Return groups of requests, one after another, so that siblings have been written when the last ones run."""
    return [
        Request(first + place * members + member, prompt, 7919 * (first + place * members + member) + 1,
                SamplingParams(max_new_tokens))
        for place, prompt in enumerate(prompts) for member in range(members)
    ]  # fmt: skip


def engine_of(policy: Policy, batch: int, speculator: Speculator | None) -> TorchEngine:
    """Return an engine for so many sequences."""
    return TorchEngine(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=batch),
        max_seq_len=_MAX_SEQ_LEN, speculator=speculator,
    )  # fmt: skip


def teach(
    policy: Policy, trained: Any, prompts: Sequence[tuple[int, ...]], num_steps: int
) -> tuple[HeadLearner, dict[str, float]]:
    """Let a drafter of `trained` learn so many steps from what the policy writes, by the forward pass of an update."""
    learner = HeadLearner(trained, max_tokens=1 << 16)
    trainer = Trainer(copy.deepcopy(policy.model), TrainerConfig(learning_rate=1e-12, max_tokens_per_microbatch=1024))
    trainer.observer = learner.observe
    done = engine_of(policy, 32, None).generate(requests_of(prompts, 1, MAX_NEW_TOKENS, 1_000_000))
    groups = [
        TrainingGroup(prompt, (one.token_ids,), (1.0,), (None,)) for prompt, one in zip(prompts, done, strict=True)
    ]
    trainer.update(TrainingBatch(tuple(groups)))
    learner.next_round()
    begin, losses = time.perf_counter(), []
    for _ in range(num_steps):
        learner.step()
        losses.append(learner.loss or 0.0)
    return learner, {
        "seconds": round(time.perf_counter() - begin, 1), "num_steps": num_steps,
        "num_tokens": sum(len(one.token_ids) for one in done), "vocabulary": len(learner.vocabulary),
        "loss_at_first": round(statistics.fmean(losses[:5]), 3),
        "loss_at_last": round(statistics.fmean(losses[-20:]), 3),
    }  # fmt: skip


@torch.no_grad()
def sureness(
    policy: Policy, prompts: Sequence[tuple[int, ...]], completions: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Return nats a token and the mean of the largest probability, along what the policy wrote."""
    nats, largest = [], []
    for prompt, ids in zip(prompts, completions, strict=True):
        logits = policy.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
        logprobs = logits.log_softmax(-1)
        nats += (-(logprobs.exp() * logprobs).sum(-1)).tolist()
        largest += logprobs.amax(-1).exp().tolist()
    return {
        "entropy_nats": round(statistics.fmean(nats), 3),
        "largest_probability": round(statistics.fmean(largest), 3),
    }


def pass_costs(policy: Policy, batch: int, rows: Sequence[int]) -> dict[int, float]:
    """Return what a pass over so many tokens of each sequence takes, against one token, logits and draws included."""
    engine = engine_of(policy, batch, None)
    runner, lengths, found = engine._runner, [128] * batch, {}
    with torch.inference_mode():
        for num in (1, *rows):
            tokens = torch.full((batch * num,), 5)
            work = lambda tokens=tokens, num=num: runner.logits(runner.extend(tokens, [num] * batch, lengths))  # noqa: E731
            work()
            times = []
            for _ in range(7):
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
            found[num] = min(times)
    return {num: found[num] / found[1] for num in rows}


def ceiling(right: float, costs: dict[int, float]) -> float:
    """Return the best speed-up of drafts of which each token is right with this chance, over all their lengths."""
    return max(sum(right**at for at in range(rows)) / cost for rows, cost in costs.items())


def speculators(policy: Policy, learner: HeadLearner, batch: int) -> dict[str, Speculator | None]:
    """Return every way of decoding, each with drafters of its own."""

    def head() -> HeadDrafter:
        return HeadDrafter(
            learner.model, policy.model, lambda: learner.vocabulary, num_slots=batch, capacity=_MAX_SEQ_LEN
        )

    def fixed(drafter: Any) -> Speculator:
        return Speculator([drafter], Strategy(drafter.name, _DEPTH, _DEPTH * batch))

    return {
        "plain": None,
        "suffix": fixed(SuffixDrafter()),
        "ngram": fixed(NgramDrafter()),
        "head": fixed(head()),
        "auto": make_speculator("auto", head()),
    }


def tail_of(policy: Policy, name: str, num_groups: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """Compare every way of decoding at small batches."""
    learner, taught = teach(policy, policy.model, prompts_of(policy, 31, _TAUGHT_PROMPTS), num_steps)
    print(f"{name}: taught: {json.dumps(taught)}", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {"teaching": taught}
    bars = []
    for batch in _BATCHES:
        ways = {way: engine_of(policy, batch, one) for way, one in speculators(policy, learner, batch).items()}
        prompts = prompts_of(policy, 77, num_groups)
        seconds = dict.fromkeys(ways, 0.0)
        written: dict[str, list[tuple[int, ...]]] = {way: [] for way in ways}
        for place, prompt in enumerate(prompts):
            requests = requests_of([prompt], 4, MAX_NEW_TOKENS, 100 * place)
            for way, engine in ways.items():
                begin = time.perf_counter()
                done = engine.generate(requests)
                seconds[way] += time.perf_counter() - begin
                written[way] += [one.token_ids for one in done]
        num_tokens = sum(map(len, written["plain"]))
        found: dict[str, Any] = {"tokens_per_s_plain": round(num_tokens / seconds["plain"], 1)}
        costs = pass_costs(policy, batch, range(2, _DEPTH + 2))
        if "sureness" not in figures:
            figures["sureness"] = sureness(policy, [p for p in prompts for _ in range(4)], written["plain"])
        right = figures["sureness"]["largest_probability"]
        found["ceiling_without_noise"] = round(ceiling(right, costs), 3)
        found["ceiling_with_noise"] = round(ceiling(1.0, costs), 3)
        for way in list(ways)[1:]:
            speculator = ways[way].speculator
            assert speculator is not None
            counts = speculator.counts
            drafts = sum(one.num_drafts for one in counts.values())
            found[way] = {
                "times_plain": round(seconds["plain"] / seconds[way], 3),
                "tokens_a_pass": round(num_tokens / ways[way].stats.num_steps, 3) if batch == 1 else None,
                "accepted_length": round(1 + sum(one.num_kept for one in counts.values()) / max(1, drafts), 3),
                "acceptance": {
                    drafter: round(one.num_kept / one.num_tokens, 3)
                    for drafter, one in counts.items()
                    if one.num_tokens
                },
                "completions_equal": written[way] == written["plain"],
            }
            found[way]["share_of_ceiling"] = round(
                found[way]["times_plain"]
                / found["ceiling_with_noise" if way in ("head", "auto") else "ceiling_without_noise"],
                3,
            )
            bars.append(
                Bar(f"{name}, batch {batch}: {way}, completions equal", float(found[way]["completions_equal"]), 1.0)
            )
        best = max(found[way]["times_plain"] for way in list(ways)[1:])
        if name == "sure":
            bars.append(Bar(f"sure, batch {batch}: best drafter against plain", best, _BEST))
            bars.append(Bar(f"sure, batch {batch}: suffix against plain", found["suffix"]["times_plain"], _SUFFIX))
        bars.append(Bar(f"{name}, batch {batch}: auto against plain", found["auto"]["times_plain"], _NEVER_BELOW))
        found["head_against_best_without_weights"] = round(
            found["head"]["times_plain"] / max(found["suffix"]["times_plain"], found["ngram"]["times_plain"]), 3
        )
        figures[f"batch {batch}"] = found
        print(f"{name}, batch {batch}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return figures, bars


def long_round(policy: Policy, num_rounds: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """A round whose lengths have a long tail, with everything on and with everything off."""
    learner, taught = teach(policy, policy.model, prompts_of(policy, 31, _TAUGHT_PROMPTS), num_steps)
    prompts = prompts_of(policy, 78, 400)
    by_question = {f"q{at}": prompt for at, prompt in enumerate(prompts)}

    class Asked(Policy):
        """The policy, asked by number."""

        def encode_prompt(self, question: str) -> tuple[int, ...]:
            return tuple(by_question[question])

    asked = Asked(**{one.name: getattr(policy, one.name) for one in fields(policy)})

    def tasks(round_index: int) -> list[Task]:
        return [
            Task(TaskRef("worked", "0" * 32, 1, at), f"q{at}") for at in range(4 * round_index, 4 * round_index + 4)
        ]

    base = RolloutConfig(num_completions=8, max_new_tokens=256, schedule="partial")
    keep = base.model_copy(update={"stale_tokens": "correct"})
    settings = {
        "off": base.model_copy(update={"schedule": "synchronous"}),
        "on": base,
        "on, tokens kept": keep,
        "on, tokens kept, x4": keep.model_copy(update={"over_provision": 4.0}),
        "partial rollouts alone, tokens kept, x4": keep.model_copy(update={"over_provision": 4.0}),
    }
    sides: dict[str, RolloutCollector] = {}
    for way, config in settings.items():
        head = HeadDrafter(
            learner.model, policy.model, lambda: learner.vocabulary, num_slots=_ROUND_SLOTS, capacity=_MAX_SEQ_LEN
        )
        engine = TorchEngine(
            policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=_ROUND_SLOTS),
            max_seq_len=_MAX_SEQ_LEN, speculator=make_speculator("auto", head) if way.startswith("on") else None,
        )  # fmt: skip
        enforce(engine, tail_length)
        sides[way] = (
            PartialRollouts(engine, asked, config, 1, tasks)
            if config.is_partial
            else RolloutCollector(engine, asked, config, 1)
        )
    times: dict[str, list[float]] = {way: [] for way in sides}
    for round_index in range(num_rounds + _ROUND_WARMUP):
        for way, rollouts in sides.items():
            begin = time.perf_counter()
            rollouts.collect(tasks(round_index), round_index=round_index)
            times[way].append(time.perf_counter() - begin)
    round_s = {way: statistics.fmean(one[_ROUND_WARMUP:]) for way, one in times.items()}
    figures = {
        "teaching": taught,
        "round_s": {way: round(one, 3) for way, one in round_s.items()},
        "times_as_fast": {way: round(round_s["off"] / one, 3) for way, one in round_s.items()},
        "last_rounds": {way: rollouts.describe() for way, rollouts in sides.items()},
    }
    return figures, [
        Bar(f"sure, long-tail round: {way}, against neither", round(round_s["off"] / round_s[way], 3), _ROUND)
        for way in sides
        if way.startswith("on")
    ]


def adapt(policy: Policy, num_rounds: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """Accepted length over rounds of reinforcement learning, of a drafter that learns on and of one that does not.

    Both begin with the same lessons. The one that goes on has what `Drafting` gives it: a small share of each round's
    time. Either writes every round's completions, with drafts of its own: they are the same tokens.
    """
    dataset = import_reasoning_gym().create_dataset
    entries = [entry for task, settings in _EASY.items() for entry in dataset(task, seed=79, size=500, **settings)]
    model = copy.deepcopy(policy.model)
    learner, taught = teach(policy, model, prompts_of(policy, 31, _TAUGHT_PROMPTS), num_steps)
    print(f"adapt: taught: {json.dumps(taught)}", file=sys.stderr, flush=True)
    trainer = Trainer(model, TrainerConfig(learning_rate=2e-5, max_tokens_per_microbatch=1024))
    trainer.observer = learner.observe
    frozen_model, frozen_vocabulary = copy.deepcopy(learner.model), learner.vocabulary.clone()

    def engine(head_model: Any, vocabulary: Callable[[], torch.Tensor]) -> TorchEngine:
        head = HeadDrafter(head_model, policy.model, vocabulary, num_slots=_ADAPT_GROUP, capacity=_MAX_SEQ_LEN)
        # a clock that stands still: drafts then depend on what is observed of them, and not on what a pass takes
        return engine_of(
            policy, _ADAPT_GROUP, Speculator([head], Strategy("head", 6, 6 * _ADAPT_GROUP), clock=lambda: 0.0)
        )

    engines = {
        "learning": engine(learner.model, lambda: learner.vocabulary),
        "frozen": engine(frozen_model, lambda: frozen_vocabulary),
    }
    drafting = Drafting(engines["learning"].speculator, learner)
    lengths: dict[str, list[float]] = {way: [] for way in engines}
    shares, rewarded, rng = [], [], random.Random(0)
    for round_index in range(num_rounds):
        begin, frozen_s = time.perf_counter(), 0.0
        chosen = [rng.choice(entries) for _ in range(4)]
        requests = requests_of(
            [policy.encode_prompt(entry["question"]) for entry in chosen], _ADAPT_GROUP, MAX_NEW_TOKENS,
            4 * _ADAPT_GROUP * round_index,
        )  # fmt: skip
        for way, one in engines.items():
            assert one.speculator is not None
            before = copy.copy(one.speculator.counts["head"])
            way_begins = time.perf_counter()
            done = one.generate(requests)
            if way == "frozen":  # a node has one drafter: this is no part of its round
                frozen_s = time.perf_counter() - way_begins
            since = one.speculator.counts["head"].since(before)
            lengths[way].append(1 + since.num_kept / max(1, since.num_drafts))
        groups = []
        for place, entry in enumerate(chosen):
            members = done[_ADAPT_GROUP * place : _ADAPT_GROUP * (place + 1)]
            end = f"The answer is {entry['answer']}."
            rewards = [float(policy.decode(one.token_ids).strip().endswith(end)) for one in members]
            rewarded += rewards
            mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
            advantages = tuple((reward - mean) / spread if spread else 0.0 for reward in rewards)
            groups.append(
                TrainingGroup(requests[_ADAPT_GROUP * place].prompt_ids, tuple(one.token_ids for one in members),
                              advantages, tuple(one.logprobs for one in members))
            )  # fmt: skip
        trainer.update(TrainingBatch(tuple(groups)))
        drafting.policy_updated()
        learning_begins = time.perf_counter()
        drafting.catch_up()
        now = time.perf_counter()
        shares.append((now - learning_begins) / (now - begin - frozen_s))
        for one in engines.values():
            one.load_policy(trainer.policy_state(), trainer.policy_version)
        print(
            f"adapt: round {round_index}: {lengths['learning'][-1]:.3f} {lengths['frozen'][-1]:.3f} "
            f"reward {statistics.fmean(rewarded[-4 * _ADAPT_GROUP:]):.2f}", file=sys.stderr, flush=True,
        )  # fmt: skip
    drafting.close()
    fifth = num_rounds // 5

    def fifths(values: Sequence[float]) -> list[float]:
        width = len(values) // 5
        return [round(statistics.fmean(values[at : at + width]), 3) for at in range(0, 5 * width, width)]

    mean_lengths = {way: fifths(one) for way, one in lengths.items()}
    share = statistics.fmean(shares[-fifth:])
    gain = round(mean_lengths["learning"][-1] - mean_lengths["frozen"][-1], 3)
    figures = {
        "num_rounds": num_rounds,
        "teaching": taught,
        "accepted_length_by_fifths": mean_lengths,
        "accepted_length": {way: [round(one, 3) for one in ones] for way, ones in lengths.items()},
        "reward_by_fifths": fifths(rewarded),
        "learning_share_of_a_round": round(statistics.fmean(shares), 4),
        "learning_share_of_the_last_rounds": round(share, 4),
        "num_steps": learner.num_steps - num_steps,
    }
    return figures, [
        Bar("adapt: accepted length at the end, learning less frozen", gain, 0.05),
        Bar("adapt: share of a round's time that learning takes", round(statistics.fmean(shares), 4), _LEARNING_SHARE,
            at_least=False),
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


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sure", help="the folder of warm_start.py; without it there are no figures of *sure*")
    parser.add_argument("--unsure", default="smollm2-135m", help="a model as it comes")
    parser.add_argument("--parts", default=",".join(_PARTS))
    parser.add_argument("--short", action="store_true", help="a tenth of the work: the figures are rougher")
    options = parser.parse_args()
    scale = 0.1 if options.short else 1.0
    num_steps = round(1500 * scale)
    num_groups = {"sure": max(4, round(16 * scale)), "unsure": max(2, round(6 * scale))}  # it writes without an end
    figures: dict[str, Any] = {}
    bars: list[Bar] = []
    models = {"sure": options.sure, "unsure": options.unsure}
    for part in options.parts.split(","):
        begin = time.perf_counter()
        found: dict[str, Any] = {}
        held: list[Bar] = []
        if part == "tail":
            for name, model in models.items():
                if model:
                    policy = load_policy(ModelConfig(name=model))
                    found[name], more = tail_of(policy, name, num_groups[name], num_steps)
                    held += more
        elif part == "round" and options.sure:
            found, held = long_round(load_policy(ModelConfig(name=options.sure)), max(2, round(10 * scale)), num_steps)
        elif part == "adapt" and options.sure:
            found, held = adapt(load_policy(ModelConfig(name=options.sure)), max(10, round(50 * scale)), num_steps // 2)
        elif part == "learning":
            found, held = learning(3, max(6, round(60 * scale)))
        elif part not in _PARTS:
            parser.error(f"there is no part {part!r}: choose of {', '.join(_PARTS)}")
        figures[part] = found | {"took_s": round(time.perf_counter() - begin, 1)}
        bars += held
        print(json.dumps({part: figures[part]}), file=sys.stderr, flush=True)
    report(figures, bars)


if __name__ == "__main__":
    main()
