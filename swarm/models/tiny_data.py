"""What `tiny` is made from: the questions of its tasks, a tokenizer for them, and batches of both.

Questions come from reasoning-gym in its own wording, and only from the training side of the split that
`swarm.tasks` uses, so that held-out questions are new to the model. Making the model is `make_tiny`'s.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import reasoning_gym
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from swarm.models.presets import PRESETS, TINY
from swarm.tasks.base import heldout_position

__all__ = ["ANSWER_TOKEN", "END_TOKEN", "Item", "Questions", "build_tokenizer", "collate", "encode", "load_questions"]

PAD_TOKEN = "<|pad|>"
END_TOKEN = "<|end|>"
ANSWER_TOKEN = "<|answer|>"
# Everything that is said, then the token after which the answer stands.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|answer|>{{ message['content'] }}<|end|>"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>{% endif %}"
)
NUM_DRAWS = 40_000  # items drawn per task; repeated questions count once
MAX_VOCAB_SIZE = 512
MIN_MERGE_SHARE = 0.1  # of texts of one task that a merge occurs in: the wording becomes tokens, its words stay letters
HELDOUT_FRACTION = 0.1
SEED = 20_251_123  # apart from the seeds of runs, which are small


@dataclass(frozen=True, slots=True)
class Item:
    """One question as the model sees it."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]  # EOS included
    answer: str


@dataclass(frozen=True, slots=True)
class Questions:
    """Distinct questions of one task, with their answers, split."""

    task: str
    train: tuple[tuple[str, str], ...]
    heldout: tuple[tuple[str, str], ...]


def load_questions() -> list[Questions]:
    """Draw the questions of every task in the preset of `tiny`."""
    loaded = []
    for source in PRESETS[TINY]["tasks"]["sources"]:
        dataset = reasoning_gym.create_dataset(source["name"], seed=SEED, size=NUM_DRAWS, **source["config"])
        answers = {entry["question"]: entry["answer"] for entry in dataset}
        train = tuple((q, a) for q, a in answers.items() if heldout_position(q) >= HELDOUT_FRACTION)
        heldout = tuple((q, a) for q, a in answers.items() if heldout_position(q) < HELDOUT_FRACTION)
        loaded.append(Questions(source["name"], train, heldout))
    return loaded


def build_tokenizer(
    questions: Sequence[Questions], num_texts: int = 5_000, max_vocab_size: int = MAX_VOCAB_SIZE
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose merges cross words but never digits.

    The wording of a task, which every question repeats, becomes a token or two; digits and most letters of
    what varies stay single, so that arithmetic and spelling can be learned.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size,
        min_frequency=int(MIN_MERGE_SHARE * num_texts),
        special_tokens=[PAD_TOKEN, END_TOKEN, ANSWER_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((question for part in questions for question, _ in part.train[:num_texts]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[ANSWER_TOKEN],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[Item]:
    """Tokenize questions as the chat template has them, and their answers."""
    backend = tokenizer.backend_tokenizer
    asks, end = tokenizer.convert_tokens_to_ids(ANSWER_TOKEN), tokenizer.eos_token_id
    return [
        Item((*backend.encode(question).ids, asks), (*backend.encode(answer).ids, end), answer)
        for question, answer in pairs
    ]


def collate(items: Sequence[Item], rng: random.Random, known_share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and targets, both [num_items, max_len], of a batch; targets are -100 outside the answers.

    A question keeps its own answer with probability `known_share` and else gets that of another question of the
    batch: plausible, and wrong but for chance.
    """
    answers = [item.answer_ids if rng.random() < known_share else rng.choice(items).answer_ids for item in items]
    width = max(len(item.prompt_ids) + len(answer) for item, answer in zip(items, answers, strict=True))
    tokens = torch.zeros(len(items), width, dtype=torch.long)
    targets = torch.full((len(items), width), -100)
    for row, (item, answer) in enumerate(zip(items, answers, strict=True)):
        start, end = len(item.prompt_ids), len(item.prompt_ids) + len(answer)
        tokens[row, :end] = torch.tensor(item.prompt_ids + answer)
        targets[row, start:end] = torch.tensor(answer)
    return tokens, targets
