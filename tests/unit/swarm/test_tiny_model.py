"""The shipped `tiny`: its size, its tokenizer, how much it knows and how rarely it says it."""

import random
from pathlib import Path

import pytest
import reasoning_gym
import torch

from node.config import RunConfig
from swarm.config import ModelConfig
from swarm.models import make_tiny, tiny_data
from swarm.models.presets import FALLBACK, PRESETS, builtin_path, preset
from swarm.policy import Policy, load_policy
from swarm.tasks.base import heldout_position

SOURCES = PRESETS["tiny"]["tasks"]["sources"]


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return load_policy(ModelConfig())


def heldout(task: str, settings: dict[str, int], num_items: int, seed: int) -> dict[str, str]:
    """Return held-out questions with their answers, drawn apart from those that the model was made from."""
    dataset = reasoning_gym.create_dataset(task, seed=seed, size=40 * num_items, **settings)
    pairs = {entry["question"]: entry["answer"] for entry in dataset if heldout_position(entry["question"]) < 0.1}
    return dict(list(pairs.items())[:num_items])


def pass_at_1(policy: Policy, pairs: dict[str, str], *, sample: bool) -> float:
    """Return the share of exact answers that transformers itself generates."""
    torch.manual_seed(0)
    by_length: dict[int, list[tuple[tuple[int, ...], str]]] = {}
    for question, answer in pairs.items():
        ids = policy.encode_prompt(question)
        by_length.setdefault(len(ids), []).append((ids, answer))
    num_right = 0
    for length, rows in by_length.items():
        prompts = torch.tensor([ids for ids, _ in rows])
        written = policy.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=sample, top_k=0
        )
        for tokens, (_, answer) in zip(written[:, length:].tolist(), rows, strict=True):
            num_right += policy.decode(tokens) == answer
    return num_right / len(pairs)


def test_it_is_small_and_llama_shaped(tiny):
    assert type(tiny.model).__name__ == "LlamaForCausalLM"
    assert 800_000 <= tiny.model.num_parameters() <= 1_200_000
    assert tiny.model.config.num_key_value_heads < tiny.model.config.num_attention_heads
    assert sum(path.stat().st_size for path in builtin_path("tiny").iterdir()) < 8_000_000


def test_digits_stand_alone_and_the_wording_is_short(tiny):
    ids = tiny.encode_prompt("State the final answer to the following arithmetic problem: 47 - 35 =")
    tokens = tiny.tokenizer.convert_ids_to_tokens(ids)
    assert tokens[1:-1] == ["4", "7", "Ġ-Ġ", "3", "5", "Ġ="]
    assert tokens[-1] == "<|answer|>"


@pytest.mark.parametrize("text", ["日本語 ünïcode\n\t\x00", "1234567890", " leading and trailing ", "<|unknown|>"])
def test_tokenizer_writes_any_text_back(tiny, text):
    assert tiny.decode(tiny.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("source", SOURCES, ids=[source["name"] for source in SOURCES])
def test_it_knows_heldout_answers_and_rarely_says_them(tiny, source):
    pairs = heldout(source["name"], source["config"], 256, seed=99)
    assert len(pairs) == 256
    assert pass_at_1(tiny, pairs, sample=True) <= 0.12  # bar over the mixture: 0.10; three standard errors: 0.06


def test_the_mixture_starts_below_a_tenth(tiny):
    pairs: dict[str, str] = {}
    for source in SOURCES:
        pairs |= heldout(source["name"], source["config"], 512 // len(SOURCES), seed=123)
    assert 0.01 <= pass_at_1(tiny, pairs, sample=True) <= 0.10


def test_every_preset_fits_the_settings():
    for settings in [*PRESETS.values(), FALLBACK]:
        config = RunConfig.model_validate(settings)
        assert config.tasks.sources
        for source in config.tasks.sources:
            reasoning_gym.create_dataset(source.name, seed=0, size=1, **source.config)
    assert preset("tiny") is PRESETS["tiny"]
    assert preset("some-owner/some-model") is FALLBACK


def test_no_heldout_question_is_trained_on():
    for part in tiny_data.load_questions():
        assert len(part.heldout) >= 256
        assert min(heldout_position(question) for question, _ in part.train) >= 0.1
        assert max(heldout_position(question) for question, _ in part.heldout) < 0.1


def test_batch_has_targets_on_answers_alone():
    items = [tiny_data.Item((5, 6), (7, 1), "a"), tiny_data.Item((5, 6, 8), (9, 9, 1), "b")]
    tokens, targets = tiny_data.collate(items, random.Random(0))
    assert tokens.tolist() == [[5, 6, 7, 1, 0, 0], [5, 6, 8, 9, 9, 1]]
    assert targets.tolist() == [[-100, -100, 7, 1, -100, -100], [-100, -100, -100, 9, 9, 1]]


def test_known_share_is_the_share_of_answers_that_stay():
    items = [tiny_data.Item((5,), (10 + number, 1), str(number)) for number in range(1000)]
    tokens, _ = tiny_data.collate(items, random.Random(1), known_share=0.3)
    num_kept = sum(row[1] == 10 + number for number, row in enumerate(tokens.tolist()))
    assert 250 <= num_kept <= 350  # three standard errors


def test_script_teaches_then_diffuses_and_repeats_itself(tmp_path: Path):
    recipe = make_tiny.Recipe(
        hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, intermediate_size=32, batch_size=32,
        warm_up_steps=60, diffuse_steps=30, diffuse_learning_rate=3e-3, known_share=0.0,
    )  # fmt: skip
    pairs = [(f"Say {number}.", str(number)) for number in range(10)] * 20
    questions = [tiny_data.Questions("say", tuple(pairs), tuple(pairs[:10]))]

    def make() -> tuple[dict[str, torch.Tensor], float, float]:
        tokenizer = tiny_data.build_tokenizer(questions, num_texts=50)
        splits = make_tiny.tokenized(questions, tokenizer)
        model = make_tiny.make_model(recipe, tokenizer)
        make_tiny.warm_up(model, splits, recipe, lambda line: None)
        warm = make_tiny.pass_at_1(model, splits[0].heldout, None, 0)
        make_tiny.diffuse(model, splits, recipe, lambda line: None)
        return dict(model.state_dict()), warm, make_tiny.pass_at_1(model, splits[0].train, 1.0, 0)

    first, warm, diffused = make()
    second, _, _ = make()
    assert warm == 1.0
    assert diffused < 0.5
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
