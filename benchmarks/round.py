"""Time whole rounds (generate, score, update, load the new weights) against genrl and against TRL.

    python benchmarks/round.py [--only genrl|trl] [--alone] [--peer-env FOLDER] [--trl-env FOLDER]

Ours and the peer take turns on one machine. A peer runs in an environment of its own, with the scripts in
`../shared/peers`; where these or the environment are missing, ours is reported alone. Each side's figure is the
median of its rounds, its first one included.

`genrl` trains a random model of 2 layers, 64 wide, on the reasoning-gym tasks of genrl's own example; TRL
trains smollm2-135m on `products`. A random model earns nothing, and without rewards neither we nor genrl (in
three of four rounds) update at all. So on both sides every second completion is given the reward 1 after it has
been scored, and each round pays for a whole update. Beside that stands genrl as it is, against our rounds
without their updates. TRL updates in every round anyway.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from harness import REPOSITORY, Bar, peer_python, report, run_peer

from node.config import RunConfig
from node.parts import Parts, build_parts

__all__: list[str] = []

SHARED = REPOSITORY.parent / "shared" / "peers"
PEER_TIME_LIMIT_S = 900.0
PHASES = ("rollout", "scoring", "update", "load_policy")

# Runs a peer's script with every second answer right, after it has been scored as ever.
ALTERNATING_REWARDS = """
import itertools, runpy, sys
from reasoning_gym import factory
real, turn = factory.get_score_answer_fn, itertools.count()
def get_score_answer_fn(name):
    score = real(name)
    return lambda answer, entry: (score(answer, entry), float(next(turn) % 2))[1]
factory.get_score_answer_fn = get_score_answer_fn
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# The tasks and settings of genrl's example, as its `datasets.yaml` lists them.
GENRL_TASKS: dict[str, dict[str, Any]] = {
    "arc_1d": {"min_size": 10, "max_size": 30, "num_train": 3},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 4},
    "base_conversion": {"min_base": 2, "max_base": 16, "min_value": 0, "max_value": 1000},
    "bf": {"difficulty": 1},
    "binary_matrix": {"min_n": 3, "max_n": 10, "p_zero": 0.25},
    "calendar_arithmetic": {
        "year": 2023,
        "offset_upper_bound": 100,
        "leap_year_range": 200,
        "tasks": ["count_days", "weekday_of_date", "is_leap_year", "recurring_event_day"],
    },
    "decimal_arithmetic": {"min_terms": 2, "max_terms": 6, "precision": 5},
    "fraction_simplification": {"min_value": 1, "max_value": 100, "min_factor": 2, "max_factor": 100},
    "propositional_logic": {"min_vars": 2, "max_vars": 4, "min_statements": 2, "max_statements": 4},
}


def write_random_model(folder: Path) -> None:
    """Write a random Qwen2 of 2 layers, 64 wide, with a byte-level vocabulary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    symbols = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=len(symbols),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(args: argparse.Namespace, model: dict[str, Any], tasks: dict[str, Any]) -> RunConfig:
    """Return the settings of a round with the sizes that both sides have."""
    return RunConfig.model_validate(
        {
            "seed": 1,
            "model": model,
            "tasks": tasks,
            "rollout": {"num_completions": args.completions, "max_new_tokens": args.tokens},
            "sapo": {"num_local": args.questions},
            "trainer": {"learning_rate": 1e-6},
            "engine": {"max_seq_len": 2048},
        }
    )


def time_rounds(parts: Parts, config: RunConfig, first_round: int, num_rounds: int) -> list[dict[str, float]]:
    """Run rounds and return the seconds of each, in all and by phase."""
    import random

    from swarm import sapo

    rewards = tuple(float(index % 2) for index in range(config.rollout.num_completions))
    timings = []
    for round_index in range(first_round, first_round + num_rounds):
        marks = [time.perf_counter()]
        tasks = parts.tasks.train_batch(round_index, config.sapo.num_local)
        groups = parts.rollouts.collect(tasks, round_index=round_index)
        marks.append(time.perf_counter())
        own = [group.with_rewards(rewards) for group in parts.scorer.score_groups(groups)]
        marks.append(time.perf_counter())
        batch = sapo.build_batch(own, [], config.sapo, random.Random(round_index))
        stats = parts.trainer.update(batch)
        marks.append(time.perf_counter())
        parts.rollouts.load_policy(parts.trainer.policy_state(), parts.trainer.policy_version)
        marks.append(time.perf_counter())
        if stats.skipped or batch.num_completions != config.sapo.num_local * config.rollout.num_completions:
            raise RuntimeError(f"round {round_index} did not learn from every completion: {stats}")
        phases = {f"{name}_s": end - start for name, start, end in zip(PHASES, marks, marks[1:], strict=False)}
        timings.append({"round_s": marks[-1] - marks[0], **phases})
    return timings


def compare(
    args: argparse.Namespace, config: RunConfig, peers: dict[str, list[str | Path]], seconds_key: str
) -> dict[str, Any]:
    """Let the peers, by name, and ours take turns. Returns the seconds of every round, and medians."""
    ours: list[dict[str, float]] = []
    theirs: dict[str, list[float]] = {name: [] for name in peers}
    found: dict[str, Any] = {}
    for repeat in range(args.repeats):
        for name, command in peers.items():
            answer = run_peer(command, time_limit_s=PEER_TIME_LIMIT_S, env={"HF_HUB_OFFLINE": "1"})
            found["peer"] = answer["peer"]
            theirs[name] += answer[seconds_key]
            print(f"{name}: {[round(s, 3) for s in answer[seconds_key]]} s a round", flush=True)
        parts = build_parts(config, threading.Event())
        try:
            ours += time_rounds(parts, config, repeat * args.rounds + 1, args.rounds)
        finally:
            parts.scorer.close()
            parts.engine.close()
        print(f"ours: {[round(t['round_s'], 3) for t in ours[-args.rounds :]]} s a round", flush=True)
    found["ours_s"] = [timing["round_s"] for timing in ours]
    for key in ours[0]:
        found[f"ours_{key}_median"] = statistics.median(timing[key] for timing in ours)
    for name, seconds in theirs.items():
        found[f"{name}_s"] = seconds
        found[f"{name}_s_median"] = statistics.median(seconds)
    return found


def peer_script_python(folder: Path) -> Path | None:
    """Return the interpreter for a peer's script, or None where the script or the environment is missing."""
    return peer_python(folder) if SHARED.is_dir() else None


def sizes(args: argparse.Namespace) -> list[str]:
    """Return the sizes of a round as the peers' scripts take them."""
    return [f"--{name}={getattr(args, name)}" for name in ("questions", "completions", "tokens")]


def against_genrl(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], float | None]:
    """A random model on the tasks of genrl's example, with its system prompt."""
    from reasoning_gym.utils import SYSTEM_PROMPTS

    setup = SHARED / "setup.sh"
    if not args.alone and peer_python(args.peer_env) is None and setup.exists():
        print(f"making the peer's environment in {args.peer_env}", flush=True)
        subprocess.run(["bash", str(setup), str(args.peer_env)], check=True, stdin=subprocess.DEVNULL)
    python = None if args.alone else peer_script_python(args.peer_env)
    model = scratch / "random"
    write_random_model(model)
    config = settings(
        args,
        {"name": str(model), "system_prompt": SYSTEM_PROMPTS["default"]},
        {"sources": [{"name": n, "config": c} for n, c in GENRL_TASKS.items()], "answer": ["answer_tag"]},
    )
    peers: dict[str, list[str | Path]] = {}
    if python is not None:
        script = [SHARED / "genrl_round.py", *sizes(args), f"--rounds={args.rounds}"]
        peers = {
            "genrl_whole_round": [python, "-c", ALTERNATING_REWARDS, *script],
            "genrl_as_it_is": [python, *script],
        }
    figures = compare(args, config, peers, "round_s")
    if python is None:
        return figures, None
    figures["peer_note"] = "needed one import added (get_dht_time) to be imported at all"
    without_update_s = figures["ours_rollout_s_median"] + figures["ours_scoring_s_median"]
    figures["times_as_fast_as_it_is_without_our_update"] = figures["genrl_as_it_is_s_median"] / without_update_s
    return figures, figures["genrl_whole_round_s_median"] / figures["ours_round_s_median"]


def against_trl(args: argparse.Namespace, scratch: Path) -> tuple[dict[str, Any], float | None]:
    """smollm2-135m on products of two one-digit numbers, from the same weights."""
    from swarm.config import ModelConfig
    from swarm.policy import export, load_policy

    model = scratch / "smollm2-135m"
    export(load_policy(ModelConfig(name="smollm2-135m")), model)
    digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    tasks = {"sources": [{"name": "products", "config": digits}], "answer": ["last_number"]}
    python = None if args.alone else peer_script_python(args.trl_env)
    # TRL reports the time from the end of one step to the end of the next: one less than its steps.
    peers: dict[str, list[str | Path]] = {}
    if python is not None:
        peers["trl"] = [python, SHARED / "trl_round.py", model, *sizes(args), f"--steps={args.rounds + 1}"]
    figures = compare(args, settings(args, {"name": str(model)}, tasks), peers, "step_s")
    return figures, figures["trl_s_median"] / figures["ours_round_s_median"] if peers else None


def main() -> None:
    """Measure what was asked for and report it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("questions", 4), ("completions", 8), ("tokens", 64), ("rounds", 4), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("genrl", "trl"))
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    parser.add_argument("--peer-env", type=Path, default=REPOSITORY.parent / "genrl-env")
    parser.add_argument("--trl-env", type=Path, default=REPOSITORY.parent / "trl-env")
    args = parser.parse_args()
    figures: dict[str, Any] = {name: getattr(args, name) for name in ("questions", "completions", "tokens")}
    bars = []
    scratch = Path(tempfile.mkdtemp(prefix="round-"))
    try:
        for name, measure, target in (("genrl", against_genrl, 10.0), ("trl", against_trl, 4.0)):
            if args.only in (None, name):
                figures[name], ratio = measure(args, scratch)
                bars.append(Bar(f"a round, times as fast as {name}", ratio, target))
                if ratio is None:
                    print(f"{name} is not here: ours alone", file=sys.stderr)
    finally:
        shutil.rmtree(scratch)
    report(figures, bars)


if __name__ == "__main__":
    main()
