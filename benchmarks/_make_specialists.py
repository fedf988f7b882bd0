"""Make the models of `configs/sapo-mixed.toml`: a smaller one beside `tiny`, and a specialist for each task.

    python benchmarks/_make_specialists.py [--out runs/specialists] [--rounds 1000]

    small             as `tiny` is made, with half of its weights and a tokenizer of 300 tokens in place of 354
    tiny-sums         `tiny` after a silo run on chain_sum alone, by `swarm-node silo` and `swarm-node export`
    small-spelling    `small` after a silo run on spell_backward alone

What is there already is left as it is.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import torch
from harness import REPOSITORY

from node.config import to_toml
from node.experiment.plan import make_plan
from node.layers import read_toml
from swarm.config import TasksConfig
from swarm.models.make_tiny import Recipe, diffuse, make_model, save, tokenized, warm_up
from swarm.models.tiny_data import build_tokenizer, load_questions

CONFIG: Final = REPOSITORY / "configs/sapo-mixed.toml"
SMALL: Final = Recipe(hidden_size=96, num_layers=3, num_heads=3, num_kv_heads=1, intermediate_size=320)
SMALL_VOCAB_SIZE: Final = 300
SPECIALISTS: Final = {"tiny-sums": ("tiny", "chain_sum"), "small-spelling": ("small", "spell_backward")}


def make_small(out: Path) -> None:
    """Make the smaller model."""
    torch.set_num_threads(1)
    start_s = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - start_s:6.1f} s  {line}", flush=True)

    questions = load_questions()
    tokenizer = build_tokenizer(questions, max_vocab_size=SMALL_VOCAB_SIZE)
    splits = tokenized(questions, tokenizer)
    model = make_model(SMALL, tokenizer)
    report(f"small: {model.num_parameters()} parameters, {len(tokenizer)} tokens")
    warm_up(model, splits, SMALL, report)
    diffuse(model, splits, SMALL, report)
    save(model, tokenizer, out)


def make_specialist(model: str, task: str, out: Path, rounds: int) -> None:
    """Let a model learn one task alone, with the settings that it has in the swarm, and export it."""
    config = make_plan([read_toml(CONFIG)], {}).units[0].configs[0]
    sources = tuple(source for source in config.tasks.sources if source.name == task)
    given = {
        "rounds": rounds,
        "model": config.model.model_copy(update={"name": model}),
        "tasks": TasksConfig(sources=sources, answer=config.tasks.answer),
    }
    run_dir = out.with_name(f"{out.name}.run")
    shutil.rmtree(run_dir, ignore_errors=True)  # what an interrupted one has left
    settings = out.with_name(f"{out.name}.toml")
    settings.write_text(to_toml(config.model_copy(update=given)), encoding="utf-8")
    program = str(Path(sys.executable).parent / "swarm-node")
    subprocess.run([program, "silo", "--config", str(settings), "--run-dir", str(run_dir)], check=True)
    subprocess.run([program, "export", str(run_dir), str(out)], check=True)


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/specialists"), help="as configs/sapo-mixed.toml has it")
    parser.add_argument("--rounds", type=int, default=1000, help="of each silo run")
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "small").exists():
        make_small(out / "small")
    for name, (model, task) in SPECIALISTS.items():
        if not (out / name).exists():
            make_specialist(model if model == "tiny" else str(out / model), task, out / name, args.rounds)


if __name__ == "__main__":
    main()
