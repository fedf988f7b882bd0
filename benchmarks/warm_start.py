"""Teach a model to write out reasoning-gym solutions step by step, until it is as sure as trained policies are.

    python benchmarks/warm_start.py --out FOLDER [--model smollm2-135m] [--nats 0.3] [--most-s 1500]

Supervised learning through the trainer: an advantage of 1 for every worked solution is the gradient of its likelihood.
It ends when what the model writes itself at temperature 1 has less than `--nats` of surprisal a token: what makes
drafts worth verifying is that. About ten minutes for smollm2-135m on two cores. The seed is none of the benchmarks'.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harness import Bar, report

from swarm.config import EngineConfig, ModelConfig, TrainerConfig
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy, export, load_policy
from swarm.tasks.gym import import_reasoning_gym
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

__all__ = ["TASKS", "questions", "worked"]

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 4, "max_terms": 16, "min_digits": 1, "max_digits": 3},
    "gcd": {},
    "prime_factorization": {},
    "spell_backward": {"min_word_len": 3, "max_word_len": 12},
}
MAX_NEW_TOKENS = 320
_SEED = 20_111
_NUM_QUESTIONS = 20_000  # of each task
_BATCH = 16  # solutions of one optimizer step
_STEPS_BETWEEN_LOOKS = 20
_NUM_LOOKED_AT = 16


def _chain_sum(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
    terms = facts["expression"].split()
    opening = rng.choice(("Let me add these up from left to right.", "I will go through the terms one by one."))
    total, lines = int(terms[0]), [opening]
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{rng.choice(('Next:', 'Then', 'So'))} {total} {sign} {term} = {after}")
        total = after
    return lines


def _gcd(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
    larger, smaller = sorted(facts["numbers"], reverse=True)
    lines = [rng.choice(("I use Euclid's algorithm.", "Divide again and again, and keep the remainder."))]
    while smaller:
        lines.append(f"{larger} = {larger // smaller} * {smaller} + {larger % smaller}")
        larger, smaller = smaller, larger % smaller
    return [*lines, rng.choice(("The remainder is 0, so we stop.", "Nothing remains, so this is the divisor."))]


def _prime_factorization(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
    left, lines = facts["number"], [rng.choice(("Divide by small primes.", "Let me try primes in order."))]
    for factor in facts["factors"]:
        lines.append(f"{left} / {factor} = {left // factor}, {rng.choice(('so keep', 'which gives'))} {factor}")
        left //= factor
    return lines


def _spell_backward(facts: Mapping[str, Any], rng: random.Random) -> list[str]:
    word, lines, done = facts["word"], [rng.choice(("Take the letters from the end.", "Go from last to first."))], ""
    for letter in reversed(word):
        done += letter
        lines.append(f"{rng.choice(('Add', 'Take'))} {letter}: {done}")
    return lines


_WORKINGS: dict[str, Callable[[Mapping[str, Any], random.Random], list[str]]] = {
    "chain_sum": _chain_sum,
    "gcd": _gcd,
    "prime_factorization": _prime_factorization,
    "spell_backward": _spell_backward,
}


def questions(task: str, seed: int, num: int) -> list[Any]:
    """Return entries of a reasoning-gym task."""
    return list(import_reasoning_gym().create_dataset(task, seed=seed, size=num, **TASKS[task]))


def worked(task: str, entry: Mapping[str, Any], rng: random.Random) -> str:
    """Return a solution step by step; its wording varies, its numbers are right."""
    return "\n".join([*_WORKINGS[task](entry["metadata"], rng), f"The answer is {entry['answer']}."])


def _batches(policy: Policy, rng: random.Random) -> Callable[[], TrainingBatch]:
    entries = {task: questions(task, _SEED, _NUM_QUESTIONS) for task in TASKS}

    def draw() -> TrainingBatch:
        groups = []
        for _ in range(_BATCH):
            task = rng.choice(list(TASKS))
            entry = rng.choice(entries[task])
            ids = policy.encode_completion(worked(task, entry, rng), finished=True)
            assert ids is not None
            groups.append(TrainingGroup(policy.encode_prompt(entry["question"]), (ids,), (1.0,), (None,)))
        return TrainingBatch(tuple(groups))

    return draw


def surprisal(policy: Policy, engine: TorchEngine) -> tuple[float, float]:
    """Return nats a token of what the engine's policy writes at temperature 1, and the tokens of one completion."""
    entries = [entry for task in TASKS for entry in questions(task, _SEED + 1, _NUM_LOOKED_AT // len(TASKS))]
    requests = [
        Request(number, policy.encode_prompt(entry["question"]), number, SamplingParams(MAX_NEW_TOKENS))
        for number, entry in enumerate(entries)
    ]
    done = engine.generate(requests)
    num_tokens = sum(len(one.token_ids) for one in done)
    return -sum(sum(one.logprobs) for one in done) / num_tokens, num_tokens / len(done)


def main() -> None:
    """Teach, say how far it is now and then, and write the policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, or empty")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--nats", type=float, default=0.3, help="surprisal of a token at which it ends")
    parser.add_argument("--most-s", type=float, default=1500.0, help="seconds after which it ends as well")
    options = parser.parse_args()
    policy = load_policy(ModelConfig(name=options.model))
    engine = TorchEngine(
        policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=_NUM_LOOKED_AT), max_seq_len=512
    )
    config = TrainerConfig(learning_rate=2e-4, warmup_updates=10, normalization="dapo", max_tokens_per_microbatch=1024)
    trainer = Trainer(policy.model, config)
    draw, begin, step = _batches(policy, random.Random(_SEED)), time.monotonic(), 0
    nats, num_tokens = surprisal(policy, engine)
    before = nats
    while nats >= options.nats and time.monotonic() - begin < options.most_s:
        for _ in range(_STEPS_BETWEEN_LOOKS):
            stats = trainer.update(draw())
        step += _STEPS_BETWEEN_LOOKS
        engine.load_policy(trainer.policy_state(), trainer.policy_version)
        nats, num_tokens = surprisal(policy, engine)
        print(
            f"{time.monotonic() - begin:6.0f} s  step {step}  of solutions {stats.entropy:.3f} nats a token, "
            f"of its own {nats:.3f} over {num_tokens:.0f} tokens each", file=sys.stderr, flush=True,
        )  # fmt: skip
    export(policy, options.out)
    figures = {
        "model": options.model, "nats_before": before, "nats": nats, "tokens_per_completion": num_tokens,
        "num_steps": step, "seconds": time.monotonic() - begin,
    }  # fmt: skip
    report(figures, [Bar("nats a token", nats, 0.5, at_least=False)])


if __name__ == "__main__":
    main()
