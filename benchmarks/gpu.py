"""Everything that is measured on a GPU, in one script: it needs torch, transformers and this package, and no network.

    python benchmarks/gpu.py [--parts engine trainer passes speculation april] [--models tiny smollm2-135m qwen2.5-0.5b]
                             [--device cuda] [--short] [--profile]

engine       tokens per second against transformers.generate, and the distance to the roofline (`_gpu_engine`)
trainer      an update against the same one in plain transformers, tokens per second and memory (`_gpu_trainer`)
passes       a pass that verifies 1 to 8 drafted tokens by a recorded graph and by its operations one by one, at batches
             of 1, 2, 4 and 8, and whether completions are those of plain decoding (`_gpu_passes`)
speculation  what verifying k tokens costs, and what drafts of a known quality give, at batches of 1, 2, 4 and 32
             (`_gpu_speculation`)
april        a round with a long tail: partial rollouts against synchronous ones (`_gpu_april`)

`--device cpu --short` runs all of it in minutes on a machine without a GPU, which shows that it runs; its bars are not
meant for that. The last line is JSON with the device's name, figures and bars.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from _gpu import MODELS, roofline  # noqa: E402
from _gpu_april import april_part  # noqa: E402
from _gpu_engine import engine_part  # noqa: E402
from _gpu_passes import passes_part  # noqa: E402
from _gpu_speculation import speculation_part  # noqa: E402
from _gpu_trainer import trainer_part  # noqa: E402
from harness import Bar, hardware, report  # noqa: E402

PARTS = ("engine", "trainer", "passes", "speculation", "april")
SHORT: dict[str, Any] = {
    "models": ["tiny"], "batches": [1, 4], "tokens": 16, "num_mixed": 8, "repeats": 1, "num_sequences": 4,
    "seq_len": 64, "update_prompt_len": 16, "updates": 2, "speculation_batches": [1, 4], "verified": [2, 8],
    "steps": 4, "pass_batches": [1, 4], "drafted": [1, 8], "april_rounds": 2, "april_groups": 2,
}  # fmt: skip


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the arguments; `--short` changes the sizes that none of them sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--short", action="store_true", help="small sizes, to see whether it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-peers", action="store_true", help="engine: ours alone")
    parser.add_argument("--profile", action="store_true", help="also print kernels by their time")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 256], help="engine")
    parser.add_argument("--prompt-len", type=int, default=32, help="engine, passes, speculation, april")
    parser.add_argument("--tokens", type=int, default=64, help="engine, passes, speculation: of each completion")
    parser.add_argument("--num-mixed", type=int, default=64, help="engine: requests of mixed lengths")
    parser.add_argument("--num-sequences", type=int, default=32, help="trainer")
    parser.add_argument("--seq-len", type=int, default=512, help="trainer")
    parser.add_argument("--update-prompt-len", type=int, default=128, help="trainer")
    parser.add_argument("--updates", type=int, default=6, help="trainer: the first is a warm-up")
    parser.add_argument("--microbatch-tokens", type=int, default=16384, help="trainer")
    parser.add_argument("--chunk-tokens", type=int, default=4096, help="trainer")
    parser.add_argument("--pass-batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--drafted", type=int, nargs="+", default=list(range(1, 9)), help="passes: of a sequence")
    parser.add_argument("--speculation-batches", type=int, nargs="+", default=[1, 2, 4, 32])
    parser.add_argument("--verified", type=int, nargs="+", default=[2, 4, 8, 12], help="speculation: tokens of a step")
    parser.add_argument("--steps", type=int, default=16, help="speculation: timed, for the cost of verifying")
    parser.add_argument("--longest", type=int, default=200, help="speculation: tokens of the longest completion")
    parser.add_argument("--april-rounds", type=int, default=12)
    parser.add_argument("--april-groups", type=int, default=8, help="of a round, of eight completions each")
    if parser.parse_args(words).short:
        parser.set_defaults(**SHORT)
    return parser.parse_args(words)


def main() -> None:
    """Measure what was asked for and report it."""
    import torch

    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: --device cpu --short shows whether this script runs")
    name = torch.cuda.get_device_name(0) if args.device == "cuda" else hardware()["cpu"]
    print(name, file=sys.stderr)
    figures: dict[str, Any] = {"device": name, "roofline": roofline(args.device)}
    bars: list[Bar] = []
    parts: dict[str, Any] = {
        "engine": lambda: engine_part(args, figures["roofline"]),
        "trainer": lambda: trainer_part(args, figures["roofline"]),
        "passes": lambda: passes_part(args),
        "speculation": lambda: speculation_part(args),
        "april": lambda: april_part(args),
    }
    for part in args.parts:
        figures[part], found = parts[part]()
        bars += found
    report(figures, bars)


if __name__ == "__main__":
    main()
