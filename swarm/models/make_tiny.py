"""Make the built-in model `tiny`: `python -m swarm.models.make_tiny --out FOLDER`.

Two phases of supervised learning. A warm-up teaches the tasks. Then the model is made *diffuse*: most answers
it sees are those of other questions, so that it still knows and rarely says it, as a pre-trained model does.
Reinforcement learning, which is not part of this, brings out what it knows. The same seed makes the same
bytes on the same machine with the same number of threads.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from swarm.models.tiny_data import Item, Questions, build_tokenizer, collate, encode, load_questions

__all__ = ["Recipe", "Splits", "diffuse", "main", "make_model", "pass_at_1", "save", "tokenized", "warm_up"]

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How `tiny` is made. The defaults make the model that is shipped."""

    seed: int = 7
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 448
    batch_size: int = 96  # questions per task and step
    warm_up_steps: int = 1_200
    warm_up_learning_rate: float = 3e-3
    diffuse_steps: int = 100
    diffuse_learning_rate: float = 3e-3
    known_share: float = 0.05  # answers that stay right while the model is made diffuse
    diffuse_pass_at_1: float = 0.06  # of the finished model, sampled at temperature 1
    num_halvings: int = 8


@dataclass(frozen=True, slots=True)
class Splits:
    """The tokenized questions of one task."""

    task: str
    train: list[Item]
    heldout: list[Item]


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=256,
        initializer_range=0.5 / math.sqrt(recipe.hidden_size),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(config)


def warm_up(model: LlamaForCausalLM, splits: Sequence[Splits], recipe: Recipe, report: Report) -> None:
    """Teach the tasks."""
    _supervise(model, splits, recipe, recipe.warm_up_steps, recipe.warm_up_learning_rate, 1.0, report)


def diffuse(model: LlamaForCausalLM, splits: Sequence[Splits], recipe: Recipe, report: Report) -> None:
    """Make right answers rare, and keep what was learned underneath.

    Only what turns knowledge into words changes: the last norm and the output layer. They learn the answers of
    other questions, and are then mixed with what they were, as much of each as gives `diffuse_pass_at_1`.
    """
    outputs = [*model.model.norm.parameters(), *model.lm_head.parameters()]
    known = [parameter.detach().clone() for parameter in outputs]
    model.requires_grad_(False)
    for parameter in outputs:
        parameter.requires_grad_(True)
    _supervise(model, splits, recipe, recipe.diffuse_steps, recipe.diffuse_learning_rate, recipe.known_share, report)
    model.requires_grad_(True)
    unsure = [parameter.detach().clone() for parameter in outputs]

    low, high = 0.0, 1.0  # share of the unsure output; more of it makes right answers rarer
    for _ in range(recipe.num_halvings):
        share = (low + high) / 2
        for parameter, sure, vague in zip(outputs, known, unsure, strict=True):
            parameter.data = torch.lerp(sure, vague, share)
        sampled = sum(pass_at_1(model, part.train[:512], 1.0, recipe.seed) for part in splits) / len(splits)
        low, high = (share, high) if sampled > recipe.diffuse_pass_at_1 else (low, share)
    report(f"{share:.3f} of the diffuse output layer gives sampled pass@1 {sampled:.3f} on training questions")


def _supervise(
    model: LlamaForCausalLM,
    splits: Sequence[Splits],
    recipe: Recipe,
    num_steps: int,
    learning_rate: float,
    known_share: float,
    report: Report,
) -> None:
    """AdamW on answer tokens; the learning rate rises over a twentieth of the steps and falls as a cosine."""
    rng = random.Random(recipe.seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    num_rising = max(1, num_steps // 20)
    model.train()
    for step in range(num_steps):
        scale = min((step + 1) / num_rising, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * max(scale, 0.01)
        for part in splits:
            tokens, targets = collate(rng.sample(part.train, recipe.batch_size), rng, known_share)
            logits = model(tokens).logits[:, :-1]  # [batch_size, max_len - 1, vocab]
            loss = cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
            torch.autograd.backward(loss / len(splits))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            greedy = {part.task: round(pass_at_1(model, part.heldout[:256], None, recipe.seed), 3) for part in splits}
            report(f"step {step + 1} of {num_steps}, loss {loss.item():.3f}, held-out greedy {greedy}")
            model.train()
    model.eval()


@torch.no_grad()
def pass_at_1(model: LlamaForCausalLM, items: Sequence[Item], temperature: float | None, seed: int) -> float:
    """Return the share of items answered exactly; greedy where the temperature is None."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[Item]] = {}
    for item in items:
        by_length.setdefault(len(item.prompt_ids), []).append(item)
    num_right = 0
    for length, group in by_length.items():
        tokens = torch.tensor([item.prompt_ids for item in group])
        for _ in range(max(len(item.answer_ids) for item in group)):
            logits = model(tokens).logits[:, -1]  # [num_items, vocab]
            if temperature is None:
                drawn = logits.argmax(-1, keepdim=True)
            else:
                drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, drawn], dim=1)
        for row, item in zip(tokens[:, length:].tolist(), group, strict=True):
            num_right += tuple(row[: len(item.answer_ids)]) == item.answer_ids
    return num_right / len(items)


def tokenized(questions: Sequence[Questions], tokenizer: PreTrainedTokenizerFast) -> list[Splits]:
    """Tokenize the questions of every task."""
    return [Splits(part.task, encode(tokenizer, part.train), encode(tokenizer, part.heldout)) for part in questions]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model and tokenizer, under the class name of the tokenizer that every version of transformers knows."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")
    for path in out.iterdir():
        path.chmod(0o644)


def main() -> None:
    """Make the model, measure it, and write both to a new folder."""
    parser = argparse.ArgumentParser(prog="python -m swarm.models.make_tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet, or empty")
    out: Path = parser.parse_args().out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"{out} is not empty: name a new folder")
    torch.set_num_threads(1)  # sums of floats depend on the number of threads
    recipe, start = Recipe(), time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - start:6.1f} s  {line}", flush=True)

    questions = load_questions()
    tokenizer = build_tokenizer(questions)
    splits = tokenized(questions, tokenizer)
    model = make_model(recipe, tokenizer)
    report(
        f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, "
        + ", ".join(f"{part.task}: {len(part.train)} + {len(part.heldout)} questions" for part in splits)
    )
    warm_up(model, splits, recipe, report)
    figures = {f"{part.task}_greedy_warm": pass_at_1(model, part.heldout[:512], None, recipe.seed) for part in splits}
    diffuse(model, splits, recipe, report)
    for part in splits:
        figures[f"{part.task}_greedy"] = pass_at_1(model, part.heldout[:512], None, recipe.seed)
        figures[f"{part.task}_sampled"] = pass_at_1(model, part.heldout[:512], 1.0, recipe.seed)
    save(model, tokenizer, out)
    report(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
