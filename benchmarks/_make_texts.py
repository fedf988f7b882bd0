"""Write `texts.json`: what a small model writes, for benchmarks that need text as a swarm carries it.

    python benchmarks/_make_texts.py [--out benchmarks/texts.json]

smollm2-135m answers questions of eight reasoning-gym tasks at temperature 1, by our engine. Each question is answered
more often than is needed: kept are the first eight answers of at least 600 characters, cut there, because 600
characters is the length that every figure is given for. The seed of the tasks is none that the dictionary of the
protocol was made with, which has seen no text by a model at all.
"""

import argparse
import json
import threading
from pathlib import Path

from node.config import RunConfig
from node.parts import build_parts

__all__: list[str] = []

TASKS = (  # that are told in words: to a bare sum this model gives a short answer
    "aiw",
    "family_relationships",
    "gsm_symbolic",
    "knights_knaves",
    "leg_counting",
    "simple_equations",
    "simple_geometry",
    "time_intervals",
)
NUM_CHARS = 600
NUM_COMPLETIONS = 8
NUM_ANSWERS = 16  # of each question: some end early
MAX_NEW_TOKENS = 256
NUM_GROUPS = 8
MAX_GROUPS_PER_TASK = 2
QUESTIONS_PER_ROUND = 4
MAX_ROUNDS = 30
SEED = 20_251


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("texts.json"))
    args = parser.parse_args()
    config = RunConfig.model_validate(
        {
            "seed": SEED,
            "model": {"name": "smollm2-135m"},
            "tasks": {"sources": [{"name": name} for name in TASKS]},
            "rollout": {"num_completions": NUM_ANSWERS, "max_new_tokens": MAX_NEW_TOKENS},
        }
    )
    parts = build_parts(config, threading.Event())
    found: list[tuple[str, list[str]]] = []
    try:
        for round_index in range(1, MAX_ROUNDS + 1):
            tasks = parts.tasks.train_batch(round_index, QUESTIONS_PER_ROUND)
            for group in parts.rollouts.collect(tasks, round_index=round_index):
                name = group.task.ref.source.rpartition("/")[2]
                texts = [text[:NUM_CHARS] for text in group.texts if len(text) >= NUM_CHARS][:NUM_COMPLETIONS]
                num_of_task = sum(task == name for task, _ in found)
                if len(texts) == NUM_COMPLETIONS and num_of_task < MAX_GROUPS_PER_TASK and len(found) < NUM_GROUPS:
                    found.append((name, texts))
            print(f"round {round_index}: {len(found)} groups", flush=True)
            if len(found) == NUM_GROUPS:
                break
        else:
            raise SystemExit(f"too few long answers after {MAX_ROUNDS} rounds")
    finally:
        parts.scorer.close()
        parts.engine.close()
    rows = [{"task": name, "texts": texts} for name, texts in sorted(found)]
    args.out.write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n")
    print(f"{args.out}: {len(rows)} groups, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
