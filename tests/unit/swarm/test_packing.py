"""Packed rows: log-probabilities and gradients equal one-by-one forward passes of the model's own attention."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from swarm.packed_attention import supports_packed_attention, use_packed_attention
from swarm.packing import Part, pack, pad, split_into_microbatches
from swarm.types import TrainingGroup

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, initializer_range=0.3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
}
CPU = torch.device("cpu")


def make_group(prompt_length, completion_lengths, seed):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(61, (n,), generator=generator).tolist())

    n = len(completion_lengths)
    return TrainingGroup(ids(prompt_length), tuple(ids(k) for k in completion_lengths), (1.0,) * n, (None,) * n)


BATCHES = {
    "ragged": [make_group(7, [5, 1, 9, 3], 1), make_group(3, [4], 2), make_group(11, [2, 6], 3)],
    "even": [make_group(6, [4, 4, 4], 4), make_group(6, [4, 4, 4], 5)],
    "no shared prompt": [make_group(6, [4], 6), make_group(6, [4], 7)],
    "single tokens": [make_group(1, [1, 1], 8), make_group(2, [1], 9)],
    "trunk without branches between": [make_group(2, [3, 2], 10), make_group(9, [1, 1], 11), make_group(4, [2, 5], 12)],
}


def one_by_one(model, groups):
    values = []
    for group in groups:
        for ids in group.completion_ids:
            logits = model(input_ids=torch.tensor([group.prompt_ids + ids]), use_cache=False).logits[0, :-1]
            logprobs = torch.log_softmax(logits, -1)[len(group.prompt_ids) - 1 :]
            values.append(logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.cat(values)


def laid_out(model, groups, layout):
    parts = [Part(index, tuple(range(len(group.completion_ids)))) for index, group in enumerate(groups)]
    if layout == "packed":
        row = pack(groups, parts, CPU)
        with use_packed_attention(model, row):
            output = model.get_decoder()(input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False)
    else:
        row = pad(groups, parts, CPU)
        output = model.get_decoder()(input_ids=row.input_ids, attention_mask=row.attention_mask, use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)[row.predictors]
    return torch.log_softmax(model.lm_head(hidden), -1).gather(1, row.targets[:, None])[:, 0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_by_one_in_value_and_gradient(name, batch, layout):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    groups = BATCHES[batch]
    results = []
    for function in (one_by_one, lambda m, g: laid_out(m, g, layout)):
        model.zero_grad()
        values = function(model, groups)
        (values * torch.linspace(-1, 1, values.numel())).sum().backward()
        results.append((values.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    (expected, expected_grads), (got, got_grads) = results
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for got_grad, expected_grad in zip(got_grads, expected_grads, strict=True):
        # The same sums in another order: rounding grows with the size of what is summed.
        torch.testing.assert_close(got_grad, expected_grad, rtol=1e-4, atol=1e-5 * max(1.0, expected_grad.abs().max()))


def test_a_prompt_stands_once_and_last_tokens_do_not():
    groups = [make_group(7, [5, 1, 9, 3], 1)]
    row = pack(groups, [Part(0, (0, 1, 2, 3))], CPU)
    assert row.input_ids.shape == (1, 7 + 4 + 0 + 8 + 2)
    assert row.position_ids[0].tolist() == [*range(7), *range(7, 11), *range(7, 15), *range(7, 9)]
    assert row.predictors.tolist() == [6, *range(7, 11), 6, 6, *range(11, 19), 6, 19, 20]


def test_attention_implementation_is_restored():
    model = MODELS["llama"]()
    before = model.config._attn_implementation
    row = pack(BATCHES["even"], [Part(0, (0, 1, 2))], CPU)
    with pytest.raises(ZeroDivisionError), use_packed_attention(model, row):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_microbatches_hold_the_limit_and_everything_once():
    groups = [make_group(10, [5] * 4, n) for n in range(3)] + [make_group(10, [20] * 5, 9)]
    microbatches = split_into_microbatches(groups, range(4), 60, shares_prompts=True)
    # 30 tokens a small group: two, then one; the last (110 tokens) is cut into 10 + 2 * 20, 10 + 2 * 20, 10 + 20.
    shape = [[(part.group, part.completions) for part in parts] for parts in microbatches]
    whole = tuple(range(4))
    assert shape == [[(0, whole), (1, whole)], [(2, whole)], [(3, (0, 1))], [(3, (2, 3))], [(3, (4,))]]


def test_single_completion_larger_than_a_microbatch_goes_alone():
    groups = [make_group(10, [50, 2], 0)]
    microbatches = split_into_microbatches(groups, range(1), 20, shares_prompts=True)
    assert [[part.completions for part in parts] for parts in microbatches] == [[(0,)], [(1,)]]


def test_models_that_packing_cannot_serve_are_known():
    assert supports_packed_attention(MODELS["llama"](), 10_000)
    with torch.device("meta"):
        mistral = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16))
        assert supports_packed_attention(mistral, 16)
        assert not supports_packed_attention(mistral, 17)
        assert not supports_packed_attention(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), 8)
        assert supports_packed_attention(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)), 8)
