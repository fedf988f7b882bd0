"""Speculative decoding against plain decoding: how fast, on which policies, and what the drafter's learning costs.

    python benchmarks/tlt.py [--sure FOLDER] [--unsure smollm2-135m] [--parts tail,round,adapt,learning,vllm] [--short]

tail      batches of 1, 2 and 4 sequences, T = 1: each drafter and the tuner against plain decoding; the same requests,
          turn by turn. *sure* is what `benchmarks/warm_start.py` made; *unsure* is the model as it comes. The learned
          drafter is taught on other questions first, and how long that takes is said
round     a whole long-tail round, partial rollouts and the tuner on, against both off
adapt     *sure* over rounds of reinforcement learning: accepted length of a drafter that goes on learning and of one
          that does not, what the latter has on the same questions with the policy as it was at first, and the share
          of a round's time that learning takes
learning  rewards of `swarm-node silo` over seeds, with and without: equal, number by number
vllm      the tail of *sure* on the vLLM engine, whose drafters these are as well

A ceiling is what would come of the policy's own numbers: for drafts without noise of their own a token is right with
the largest probability at most, on average; verifying a draft costs what this machine takes for so many tokens. Two
more limits are of the drafts as they were: were making them free (its time is measured, and left out), and were a pass
to cost the same whatever its rows, as it nearly does on a GPU while a batch is small.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from _tlt import (
    BATCHES,
    DEPTH,
    MAX_SEQ_LEN,
    NUM_TAUGHT_PROMPTS,
    engine_of,
    fared,
    prompts_of,
    speculators,
    take_turns,
    teach,
)
from _tlt_rounds import adapt, learning
from _tlt_vllm import vllm_tail
from april import enforce, tail_length
from harness import Bar, report

from protocol.messages import TaskRef
from swarm.config import EngineConfig, ModelConfig, RolloutConfig
from swarm.drafting.head import HeadDrafter
from swarm.drafting.learner import HeadLearner
from swarm.drafting.speculator import make_speculator
from swarm.engine.base import EngineStats
from swarm.engine.torch import TorchEngine
from swarm.policy import Policy, load_policy
from swarm.rollout.collector import RolloutCollector
from swarm.rollout.partial import PartialRollouts
from swarm.types import Task

_PARTS = ("tail", "round", "adapt", "learning", "vllm")
_BEST, _SUFFIX, _NEVER_BELOW, _ROUND = 1.7, 1.3, 0.97, 2.0
_ROUND_SLOTS, _ROUND_WARMUP = 32, 4


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


def share_of_a_draft_token(policy: Policy, learner: HeadLearner) -> float:
    """Return what a token of the learned drafter reads of weights, against a pass of the policy."""
    head = policy.model.get_output_embeddings().weight
    of_the_policy = sum(one.numel() for one in policy.model.parameters())  # embedding and LM head are one here
    of_the_drafter = sum(one.numel() for one in learner.model.parameters()) + len(learner.vocabulary) * head.shape[1]
    return of_the_drafter / of_the_policy


def time_drafting(engine: TorchEngine) -> list[float]:
    """Let an engine note how long each call of its drafters takes; return where."""
    assert engine.speculator is not None
    propose, taken = engine.speculator.propose, []

    def timed(*args: Any) -> list[list[int]]:
        begin = time.perf_counter()
        drafts = propose(*args)
        taken.append(time.perf_counter() - begin)
        return drafts

    engine.speculator.propose = timed  # type: ignore[method-assign]
    return taken


def limits(
    engine: TorchEngine, seconds: float, plain_s: float, drafting_s: float, drafter_share: float
) -> dict[str, float]:
    """Return tokens and rows of a sequence and pass, and how fast that were without the time of drafts, or of rows."""
    stats = engine.stats
    tokens = stats.num_tokens_generated / stats.num_slot_steps
    rows = 1 + stats.num_speculated_tokens / stats.num_slot_steps
    return {
        "tokens_a_pass": round(tokens, 3),
        "rows_a_pass": round(rows, 3),
        "drafting_share": round(drafting_s / seconds, 3),
        "were_drafts_free": round(plain_s / (seconds - drafting_s), 3),
        "were_rows_free": round(tokens / (1 + (rows - 1) * drafter_share), 3),
    }


def tail_of(policy: Policy, name: str, num_groups: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """Compare every way of decoding at small batches."""
    learner, taught = teach(policy, policy.model, prompts_of(policy, 31, NUM_TAUGHT_PROMPTS), num_steps)
    print(f"{name}: taught: {json.dumps(taught)}", file=sys.stderr, flush=True)
    share = share_of_a_draft_token(policy, learner)
    figures: dict[str, Any] = {"teaching": taught, "draft_token_reads_of_a_pass": round(share, 4)}
    bars = []
    for batch in BATCHES:
        ways = {way: engine_of(policy, batch, one) for way, one in speculators(policy, learner, batch).items()}
        prompts = prompts_of(policy, 77, num_groups)
        drafting = {way: time_drafting(engine) for way, engine in ways.items() if engine.speculator is not None}
        seconds, written = take_turns(ways, prompts)
        num_tokens = sum(map(len, written["plain"]))
        found: dict[str, Any] = {"tokens_per_s_plain": round(num_tokens / seconds["plain"], 1)}
        costs = pass_costs(policy, batch, range(2, DEPTH + 2))
        if "sureness" not in figures:
            figures["sureness"] = sureness(policy, [p for p in prompts for _ in range(4)], written["plain"])
        right = figures["sureness"]["largest_probability"]
        found["ceiling_without_noise"] = round(ceiling(right, costs), 3)
        found["ceiling_with_noise"] = round(ceiling(1.0, costs), 3)
        for way in list(ways)[1:]:
            found[way] = {
                "times_plain": round(seconds["plain"] / seconds[way], 3),
                **limits(
                    ways[way],
                    seconds[way],
                    seconds["plain"],
                    sum(drafting[way]),
                    share if way in ("head", "auto") else 0.0,
                ),
                **fared(ways[way]),
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


def row_s(policy: Policy) -> tuple[float, float]:
    """Return what one more row takes in a pass of many: in the layers, with 128 positions, and in the LM head."""
    runner = engine_of(policy, _ROUND_SLOTS, None)._runner
    least: dict[int, tuple[float, float]] = {}
    with torch.inference_mode():
        for _ in range(15):
            for num in (_ROUND_SLOTS // 2, _ROUND_SLOTS):
                tokens, ones, lengths = torch.full((num,), 5), [1] * num, [128] * num
                begin = time.perf_counter()
                hidden = runner.extend(tokens, ones, lengths)
                middle = time.perf_counter()
                runner.logits(hidden)
                taken = middle - begin, time.perf_counter() - middle
                seen = least.get(num, taken)
                least[num] = min(seen[0], taken[0]), min(seen[1], taken[1])
    fewer, more = least[_ROUND_SLOTS // 2], least[_ROUND_SLOTS]
    return 2 * (more[0] - fewer[0]) / _ROUND_SLOTS, 2 * (more[1] - fewer[1]) / _ROUND_SLOTS


def round_limits(
    policy: Policy, off_s: float, num_rounds: int, before: Mapping[str, EngineStats], engines: Mapping[str, TorchEngine]
) -> dict[str, Any]:
    """Return what a round would take if all its tokens were rows of full passes, and how many passes each way needs."""
    since = {way: engine.stats for way, engine in engines.items()}
    num_passes = {way: (since[way].num_steps - before[way].num_steps) / num_rounds for way in engines}
    written = (since["off"].num_tokens_generated - before["off"].num_tokens_generated) / num_rounds
    prefilled = (since["off"].num_tokens_prefilled - before["off"].num_tokens_prefilled) / num_rounds
    in_layers_s, in_head_s = row_s(policy)
    rows_s = (written + prefilled) * in_layers_s + written * in_head_s
    return {
        "tokens_written": round(written, 1),
        "tokens_prefilled": round(prefilled, 1),
        "row_ms": [round(1e3 * in_layers_s, 3), round(1e3 * in_head_s, 3)],
        "in_full_passes_s": round(rows_s, 3),
        "times_as_fast_in_full_passes": round(off_s / rows_s, 3),
        "num_passes": {way: round(one, 1) for way, one in num_passes.items()},
        "times_as_fast_were_passes_alike": {way: round(num_passes["off"] / one, 3) for way, one in num_passes.items()},
    }


def long_round(policy: Policy, num_rounds: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """A round whose lengths have a long tail, with everything on and with everything off."""
    learner, taught = teach(policy, policy.model, prompts_of(policy, 31, NUM_TAUGHT_PROMPTS), num_steps)
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
    always = "on, drafts in every pass, tokens kept, x4"
    settings[always] = settings["on, tokens kept, x4"]
    sides: dict[str, RolloutCollector] = {}
    engines: dict[str, TorchEngine] = {}
    for way, config in settings.items():
        head = HeadDrafter(
            learner.model, policy.model, lambda: learner.vocabulary, num_slots=_ROUND_SLOTS, capacity=MAX_SEQ_LEN
        )
        mode = "head" if way == always else "auto" if way.startswith("on") else "off"
        engine = engines[way] = TorchEngine(
            policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=_ROUND_SLOTS),
            max_seq_len=MAX_SEQ_LEN, speculator=make_speculator(mode, head),
        )  # fmt: skip
        enforce(engine, tail_length)
        sides[way] = (
            PartialRollouts(engine, asked, config, 1, tasks)
            if config.is_partial
            else RolloutCollector(engine, asked, config, 1)
        )
    times: dict[str, list[float]] = {way: [] for way in sides}
    before: dict[str, EngineStats] = {}
    for round_index in range(num_rounds + _ROUND_WARMUP):
        if round_index == _ROUND_WARMUP:
            before = {way: copy.copy(engine.stats) for way, engine in engines.items()}
        for way, rollouts in sides.items():
            begin = time.perf_counter()
            rollouts.collect(tasks(round_index), round_index=round_index)
            times[way].append(time.perf_counter() - begin)
    round_s = {way: statistics.fmean(one[_ROUND_WARMUP:]) for way, one in times.items()}
    figures = {
        "teaching": taught,
        "round_s": {way: round(one, 3) for way, one in round_s.items()},
        "times_as_fast": {way: round(round_s["off"] / one, 3) for way, one in round_s.items()},
        "limits": round_limits(policy, round_s["off"], num_rounds, before, engines),
        "last_rounds": {way: rollouts.describe() for way, rollouts in sides.items()},
    }
    return figures, [
        Bar(f"sure, long-tail round: {way}, against neither", round(round_s["off"] / round_s[way], 3), _ROUND)
        for way in sides
        if way.startswith("on")
    ]


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
            found, held = adapt(load_policy(ModelConfig(name=options.sure)), max(10, round(50 * scale)), num_steps)
        elif part == "vllm" and options.sure:
            found, held = vllm_tail(load_policy(ModelConfig(name=options.sure)), max(2, round(4 * scale)), num_steps)
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
