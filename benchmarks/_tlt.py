"""What the parts of benchmarks/tlt.py share: questions, requests, engines, and how the learned drafter is taught."""

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from warm_start import MAX_NEW_TOKENS, TASKS, questions

from swarm.config import EngineConfig, TrainerConfig
from swarm.drafting.head import HeadDrafter
from swarm.drafting.learner import HeadLearner
from swarm.drafting.ngram import NgramDrafter
from swarm.drafting.speculator import Speculator, make_speculator
from swarm.drafting.suffix import SuffixDrafter
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Engine, Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

__all__ = [
    "BATCHES",
    "DEPTH",
    "MAX_SEQ_LEN",
    "NUM_TAUGHT_PROMPTS",
    "engine_of",
    "fared",
    "prompts_of",
    "requests_of",
    "speculators",
    "take_turns",
    "teach",
]

BATCHES = (1, 2, 4)  # sequences that are left of a round
DEPTH = 6
MAX_SEQ_LEN = 512
_MEMBERS = 4  # completions of a question
NUM_TAUGHT_PROMPTS = 256  # that the learned drafter learns from, before it is measured


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
        max_seq_len=MAX_SEQ_LEN, speculator=speculator,
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


def speculators(policy: Policy, learner: HeadLearner, batch: int) -> dict[str, Speculator | None]:
    """Return every way of decoding, each with drafters of its own."""

    def head() -> HeadDrafter:
        return HeadDrafter(
            learner.model, policy.model, lambda: learner.vocabulary, num_slots=batch, capacity=MAX_SEQ_LEN
        )

    def fixed(drafter: Any) -> Speculator:
        return Speculator([drafter], Strategy(drafter.name, DEPTH, DEPTH * batch))

    return {
        "plain": None,
        "suffix": fixed(SuffixDrafter()),
        "ngram": fixed(NgramDrafter()),
        "head": fixed(head()),
        "auto": make_speculator("auto", head()),
    }


def take_turns(
    engines: Mapping[str, Engine], prompts: Sequence[tuple[int, ...]]
) -> tuple[dict[str, float], dict[str, list[tuple[int, ...]]]]:
    """Let every engine answer the same questions, turn by turn; return the seconds of each, and what it wrote."""
    seconds = dict.fromkeys(engines, 0.0)
    written: dict[str, list[tuple[int, ...]]] = {way: [] for way in engines}
    for place, prompt in enumerate(prompts):
        requests = requests_of([prompt], _MEMBERS, MAX_NEW_TOKENS, 100 * place)
        for way, engine in engines.items():
            begin = time.perf_counter()
            done = engine.generate(requests)
            seconds[way] += time.perf_counter() - begin
            written[way] += [one.token_ids for one in done]
    return seconds, written


def fared(engine: Any) -> dict[str, Any]:
    """Return how the drafts of an engine fared."""
    counts = engine.speculator.counts
    num_drafts = sum(one.num_drafts for one in counts.values())
    return {
        "accepted_length": round(1 + sum(one.num_kept for one in counts.values()) / max(1, num_drafts), 3),
        "acceptance": {
            drafter: round(one.num_kept / one.num_tokens, 3) for drafter, one in counts.items() if one.num_tokens
        },
    }
