"""The compiled kernels against the model's own forward pass, for every instruction set that this CPU has."""

import os
import shutil
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from swarm.config import EngineConfig
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine, sampling
from swarm.engine.torch.llama import LlamaRunner
from swarm.engine.torch.native import NativeRunner
from swarm.native import INSTRUCTION_SETS, kernels

NUM_SETS = kernels().instruction_set + 1 if kernels() else 0
needs_kernels = pytest.mark.skipif(not NUM_SETS, reason="the decode kernels were not compiled on this machine")
ENDS = {"max_position_embeddings": 1024, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": None}
SHAPES = {
    # every width has tails: of 32 outputs, of 64 lanes of a head, of 16 positions, of the heads that share keys
    "plain": lambda: LlamaConfig(
        vocab_size=203, hidden_size=64, intermediate_size=112, num_attention_heads=4, num_key_value_heads=2, **ENDS
    ),
    "one key head": lambda: LlamaConfig(
        vocab_size=17, hidden_size=80, intermediate_size=48, num_attention_heads=5, num_key_value_heads=1, **ENDS
    ),
    "bias": lambda: Qwen2Config(
        vocab_size=96, hidden_size=112, intermediate_size=16, num_attention_heads=7, num_key_value_heads=1,
        tie_word_embeddings=True, **ENDS,
    ),
    "all biases": lambda: LlamaConfig(
        vocab_size=100, hidden_size=48, intermediate_size=80, num_attention_heads=3, num_key_value_heads=3,
        attention_bias=True, **ENDS,
    ),
    "wide heads": lambda: Qwen3Config(
        vocab_size=250, hidden_size=32, intermediate_size=64, num_attention_heads=9, num_key_value_heads=1,
        head_dim=80, **ENDS,
    ),
    "widest heads": lambda: Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=256, **ENDS,
    ),
    "one layer": lambda: LlamaConfig(
        vocab_size=203, hidden_size=64, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
        **{**ENDS, "num_hidden_layers": 1},
    ),
    "heads of 64": lambda: LlamaConfig(
        vocab_size=131, hidden_size=192, intermediate_size=96, num_attention_heads=3, num_key_value_heads=1, **ENDS
    ),
}  # fmt: skip
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@cache
def model_of(shape: str, dtype: torch.dtype):
    """A random model that uses every weight; bf16 weights in whatever dtype computes with them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


@cache
def exact_model_of(shape: str, dtype: torch.dtype):
    """The same weights in float64."""
    model = AutoModelForCausalLM.from_config(SHAPES[shape]()).eval().requires_grad_(False)
    model.load_state_dict(model_of(shape, dtype).state_dict())
    return model.double()


def sequence(length: int, vocab: int, salt: int = 0) -> list[int]:
    return [(index * index + 7 * index + 13 * salt) % vocab for index in range(length)]


@pytest.fixture(params=range(NUM_SETS), ids=INSTRUCTION_SETS[:NUM_SETS])
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(kernels(), "instruction_set", request.param)
    return request.param


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def test_ci_has_the_kernels():
    if not os.environ.get("CI") or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("only CI promises a compiler")
    assert kernels() is not None


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(instruction_set, shape, dtype):
    model, exact = model_of(shape, dtype), exact_model_of(shape, dtype)
    vocab, lengths = model.config.vocab_size, [1, 17, 40]
    runner = NativeRunner(model, 4, 48)
    tokens = [sequence(length + 3, vocab, salt) for salt, length in enumerate(lengths)]
    got = [runner.logits(runner.prefill([t[:n] for t, n in zip(tokens, lengths, strict=True)], [0, 1, 2]))]
    for step in range(3):
        column = torch.tensor([t[n + step] for t, n in zip(tokens, lengths, strict=True)])
        got.append(runner.logits(runner.decode(column, [n + step for n in lengths])))
    for row, (whole, length) in enumerate(zip(tokens, lengths, strict=True)):
        ids = torch.tensor([whole])
        ours = torch.stack([step[row] for step in got]).double()
        truth = exact(ids).logits[0, length - 1 :]
        if dtype == torch.float32:
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
        else:
            plain = model(ids).logits[0, length - 1 :].double()
            assert (ours - truth).square().mean() <= 2 * (plain - truth).square().mean()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["plain", "wide heads", "heads of 64"])
def test_a_token_has_the_same_bits_in_every_batch(instruction_set, shape, dtype):
    """However many rows are computed together, in whatever order and at whatever lengths."""
    model = model_of(shape, dtype)
    lengths = [1 + 5 * index % 23 for index in range(26)]
    prompts = [sequence(length, model.config.vocab_size, salt) for salt, length in enumerate(lengths)]
    last = torch.tensor([prompt.pop() for prompt in prompts])
    prompts = [prompt or [0] for prompt in prompts]
    held = [len(prompt) for prompt in prompts]
    alone_prefill, alone_decode = [], []
    single = NativeRunner(model, 1, 64)
    for row, prompt in enumerate(prompts):
        alone_prefill.append(single.logits(single.prefill([prompt], [0])))
        alone_decode.append(single.logits(single.decode(last[row : row + 1], held[row : row + 1])))
    for size in (2, 3, 5, 7, 8, 9, 11, 12, 13, 26):
        runner = NativeRunner(model, size, 64)
        for start in range(0, len(prompts) - size + 1, size):
            rows = slice(start, start + size)
            order = list(range(size))[::-1]
            prefilled = runner.logits(runner.prefill([prompts[start + index] for index in order], order))
            assert torch.equal(prefilled.flip(0), torch.cat(alone_prefill[rows])), size
            decoded = runner.logits(runner.decode(last[rows], held[rows]))
            assert torch.equal(decoded, torch.cat(alone_decode[rows])), size


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_prefill_and_decoding_give_the_same_bits(instruction_set, dtype, num_threads):
    """A sequence longer than one call takes, decoded from any length, by any number of threads."""
    model = model_of("plain", dtype)
    whole = sequence(600, model.config.vocab_size)
    before = torch.get_num_threads()
    reference = NativeRunner(model, 1, 640)
    torch.set_num_threads(num_threads)
    try:
        runner = NativeRunner(model, 3, 640)
    finally:
        torch.set_num_threads(before)
    for length in (2, 16, 17, 512, 513, 600):
        expected = reference.prefill([whole[:length]], [0])
        runner.prefill([whole[: length - 1], [5], whole[:length]], [0, 1, 2])
        decoded = runner.decode(torch.tensor([whole[length - 1], 9]), [length - 1, 1])
        assert torch.equal(decoded[:1], expected)
    exact = exact_model_of("plain", dtype)(torch.tensor([whole])).logits[0, -1]
    tolerance = 1e-4 if dtype == torch.float32 else 0.2 * float(exact.abs().max())
    torch.testing.assert_close(runner.logits(expected)[0].double(), exact, rtol=0, atol=tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_sequences_begin_with_is_computed_once_and_has_the_same_bits(instruction_set, dtype, monkeypatch):
    """Prefixes that end within a block and at its end, one within another, one twice, more rows than a call takes."""
    model = model_of("plain", dtype)
    base = sequence(700, 203)
    sequences = [base[:650], base[:20], base[:20], [*base[:32], 5, 6], [*base[:33], 7], [*base[:600], 9], [8], base[:1]]
    num_last = [3, 20, 1, 2, 1, 2, 1, 1]
    slots = [3, 0, 5, 1, 7, 2, 4, 6]
    apart, together = (NativeRunner(model, len(slots), 1024) for _ in range(2))
    expected = torch.cat([apart.prefill([s], [at], [n]) for s, at, n in zip(sequences, slots, num_last, strict=True)])
    counts, forward = [], together._library.forward

    def counted(model, isa, rows, out):
        counts.append(rows._obj.num)
        forward(model, isa, rows, out)

    monkeypatch.setattr(together._library, "forward", counted)
    assert torch.equal(together.prefill(sequences, slots, num_last), expected)
    assert sum(counts) == 650 + 2 + 1 + 1 + 1  # the first sequence, and what others add to a prefix of it
    lengths = [len(s) for _, s in sorted(zip(slots, sequences, strict=True))]
    tokens = torch.arange(len(slots))
    assert torch.equal(together.decode(tokens, lengths), apart.decode(tokens, lengths))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_prefilled_while_others_decode_has_the_same_bits(instruction_set, dtype):
    """More rows than a call takes, slots that have moved, and sequences that share their beginning."""
    model = model_of("plain", dtype)
    running = [sequence(length, 203, 1) for length in (3, 40, 17)]
    fresh = [sequence(600, 203), [*sequence(32, 203), 5, 6], [7]]
    apart, together = (NativeRunner(model, 6, 640) for _ in range(2))
    for runner in (apart, together):
        runner.prefill(running, [0, 4, 2])
        runner.move(4, 1, 40)
    tokens, lengths, slots, num_last = torch.tensor([9, 8, 7]), [3, 40, 17], [3, 5, 4], [2, 3, 1]
    expected = torch.cat([apart.decode(tokens, lengths), apart.prefill(fresh, slots, num_last)])
    assert torch.equal(together.decode_and_prefill(tokens, lengths, fresh, slots, num_last), expected)
    lengths = [4, 41, 18, 600, 1, 34]
    assert torch.equal(together.decode(torch.arange(6), lengths), apart.decode(torch.arange(6), lengths))


@needs_kernels
def test_the_engine_prefills_while_others_decode():
    """One call of the kernels for a step, and what comes out is what an engine with room for all writes."""
    model = model_of("plain", torch.float32)
    asked = [Request(at, tuple(sequence(9, 203, at % 3)), at, SamplingParams(3 + at % 5)) for at in range(12)]

    def engine(num_slots):
        return TorchEngine(model, eos_token_ids=[], config=EngineConfig(max_slots=num_slots), max_seq_len=64)

    narrow, counts = engine(4), []
    forward = narrow._runner._forward
    narrow._runner._forward = lambda *args: (counts.append(len(args[0])), forward(*args))[1]
    narrow.submit(asked)
    done = {}
    while narrow.num_unfinished:
        counts.clear()
        done |= {one.request_id: one for one in narrow.step()}
        assert len(counts) == (2 if narrow.stats.num_steps == 1 else 1)
    for one in engine(12).generate(asked):
        assert (one.token_ids, one.logprobs) == (done[one.request_id].token_ids, done[one.request_id].logprobs)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["plain", "one layer"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 48])
def test_copied_and_moved_slots_go_on_alike(dtype, shape, length):
    model = model_of(shape, dtype)
    runner = NativeRunner(model, 5, 50)
    prompt, other = sequence(length, 203), sequence(length, 203, 1)
    runner.prefill([other, prompt], [0, 3])
    runner.copy_prefix(3, [1, 4], length)
    runner.move(4, 2, length)
    rows = runner.decode(torch.tensor([8] * 5), [length] * 5)
    assert torch.equal(rows[1:4], rows[1:2].expand(3, -1))  # what the source of a move holds is not said
    assert not torch.equal(rows[0], rows[1])


@needs_kernels
@pytest.mark.parametrize("vocab", [8, 100, 257, 1024, 8192 + 5])
def test_tokens_are_drawn_as_by_operations(instruction_set, vocab, monkeypatch):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=generator) * 3
    logits[1, : vocab // 2] = -torch.inf
    logits[2, 3:] = -torch.inf
    logits[3] += 300
    logits[4] -= 300
    seeds, positions = torch.randint(-(1 << 62), 1 << 62, (64,), generator=generator), torch.arange(64) * 7
    temperature = torch.tensor([1.0, 0.0, 0.3, 2.0]).repeat(16)
    whole = sampling.draw(logits, seeds, positions, temperature)
    some = torch.randperm(vocab, generator=generator)[: vocab // 2 + 1].sort().values
    among = sampling.draw(logits[:, some], seeds, positions, temperature, vocabulary=some, vocab_size=vocab)
    monkeypatch.setattr(sampling, "kernels", lambda: None)
    expected = sampling.draw(logits, seeds, positions, temperature)
    assert torch.equal(whole[0], expected[0])
    for found, right in zip(whole[1:], expected[1:], strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)
    expected = sampling.draw(logits[:, some], seeds, positions, temperature, vocabulary=some, vocab_size=vocab)
    rows = expected[1].isfinite()  # where none of the logits is finite there is nothing to draw
    assert torch.equal(among[0][rows], expected[0][rows])
    for found, right in zip(among[1:], expected[1:], strict=True):
        torch.testing.assert_close(found[rows], right[rows], rtol=1e-5, atol=1e-4)
    assert set(among[0].tolist()) <= set(some.tolist())


@needs_kernels
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=72, num_attention_heads=3, intermediate_size=96),
        LlamaConfig(hidden_size=64, num_attention_heads=8, intermediate_size=96),
        LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=100),
        LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, hidden_act="gelu"),
        LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, mlp_bias=True),
        LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, head_dim=512),
        MistralConfig(hidden_size=64, num_attention_heads=4, intermediate_size=96, sliding_window=8),
    ],
    ids=["hidden", "head", "intermediate", "activation", "mlp bias", "wide head", "window"],
)  # fmt: skip
def test_other_models_are_left_to_other_runners(config):
    config.num_hidden_layers, config.vocab_size = 1, 64
    assert not NativeRunner.supports(AutoModelForCausalLM.from_config(config))


@needs_kernels
def test_support_ends_with_the_dtype():
    model = model_of("plain", torch.float32)
    assert NativeRunner.supports(model)
    assert NativeRunner.supports(model_of("plain", torch.bfloat16))
    half = AutoModelForCausalLM.from_config(SHAPES["plain"]()).half()
    assert not NativeRunner.supports(half)
    assert LlamaRunner.supports(half)
