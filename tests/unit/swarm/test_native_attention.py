"""Attention by the compiled kernels against its definition in float64, for every instruction set that this CPU has."""

import pytest
import torch

from swarm.native import INSTRUCTION_SETS, kernels
from swarm.native.attention import Plan, native_attention
from swarm.packing import PackedRow, Span

NUM_SETS = kernels().instruction_set + 1 if kernels() else 0
pytestmark = pytest.mark.skipif(not NUM_SETS, reason="the kernels were not compiled on this machine")
DTYPES = [pytest.param(torch.float32, 5e-6, id="fp32"), pytest.param(torch.bfloat16, 1e-2, id="bf16")]
NOTHING = torch.empty(0)

# heads, key heads, head_dim, prompts, completions, the prompt of each completion
SHAPES = {
    "completions of two prompts": (4, 2, 16, [37, 130], [5, 70, 1], [0, 0, 1]),
    "no completions apart": (9, 3, 64, [300], [], []),
    "a prompt without completions": (3, 1, 80, [5, 17, 65], [64, 16, 100], [1, 1, 2]),
    "widest heads": (2, 2, 256, [70], [9], [0]),
    "many heads to a key head": (60, 1, 48, [70], [9], [0]),
    "one token": (2, 1, 16, [1], [], []),
}


def row_of(trunks, branches, parents):
    spans = [Span(tuple(lengths), max(lengths, default=0), None, None) for lengths in (trunks, branches)]
    return PackedRow(NOTHING, NOTHING, NOTHING, NOTHING, (), *spans, tuple(parents), None)


def visible(row):
    """Which key each query sees, [num_tokens, num_tokens]."""
    num_tokens = row.trunks.num_tokens + row.branches.num_tokens
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    start, trunks = 0, []
    for length in row.trunks.lengths:
        trunks.append(slice(start, start + length))
        mask[trunks[-1], trunks[-1]] = torch.ones(length, length, dtype=torch.bool).tril()
        start += length
    for length, parent in zip(row.branches.lengths, row.parents, strict=True):
        own = slice(start, start + length)
        mask[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
        mask[own, trunks[parent]] = True
        start += length
    return mask


def definition(query, key, value, mask, scaling):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), value)


def inputs_of(shape, dtype):
    heads, kv_heads, width, *lengths = shape
    row = row_of(*lengths)
    num_tokens = row.trunks.num_tokens + row.branches.num_tokens
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(num_tokens, n, width, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    return row, [tensor.to(dtype) for tensor in tensors]


def gradients(function, tensors, upstream):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture(params=range(NUM_SETS), ids=INSTRUCTION_SETS[:NUM_SETS])
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(kernels(), "instruction_set", request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.usefixtures("instruction_set")
def test_value_and_gradients(shape, dtype, tolerance):
    row, (*tensors, upstream) = inputs_of(shape, dtype)
    plan = Plan.of(row, shape[0], shape[1], torch.get_num_threads())
    got = gradients(lambda q, k, v: native_attention(q, k, v, plan, 0.2), tensors, upstream)
    exact = [tensor.double() for tensor in tensors]
    expected = gradients(lambda q, k, v: definition(q, k, v, visible(row), 0.2), exact, upstream.double())
    for ours, truth in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        # a single key has weight 1 whatever its score: then gradients are zero, and their error that of values near 1
        assert float((ours.double() - truth).abs().max()) <= tolerance * max(1.0, float(truth.abs().max()))


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_threads_change_nothing_that_is_seen(num_threads):
    """However many parts a family is cut into, the gradients are those of one part, up to the order of sums."""
    shape = SHAPES["completions of two prompts"]
    row, (*tensors, upstream) = inputs_of(shape, torch.float32)
    plans = [Plan.of(row, shape[0], shape[1], threads) for threads in (1, num_threads)]
    results = [gradients(lambda q, k, v, p=p: native_attention(q, k, v, p, 0.2), tensors, upstream) for p in plans]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_strides_of_a_model_are_read_as_they_are():
    """Queries, keys and values may be slices of one projection."""
    row, (query, key, value, _) = inputs_of((4, 2, 16, [9], [3, 4], [0, 0]), torch.float32)
    plan = Plan.of(row, 4, 2, 1)
    together = torch.cat((query, key, value), dim=1)
    parts = together.split([4, 2, 2], dim=1)
    assert not parts[1].is_contiguous()
    torch.testing.assert_close(
        native_attention(*parts, plan, 0.2), native_attention(query, key, value, plan, 0.2), rtol=0, atol=0
    )


def test_no_future_and_no_sibling_is_seen():
    """Garbage in tokens that a query does not see, infinities too, changes no bit of its output."""
    row, (query, key, value, _) = inputs_of((2, 1, 16, [20], [70, 70], [0, 0]), torch.float32)
    plan = Plan.of(row, 2, 1, 1)
    before = native_attention(query, key, value, plan, 0.2)
    spoiled = [tensor.clone() for tensor in (key, value)]
    for tensor in spoiled:
        tensor[20 + 65 : 20 + 70] = 1e30  # the end of the first completion
    after = native_attention(query, *spoiled, plan, 0.2)
    assert torch.equal(before[: 20 + 65], after[: 20 + 65])
    assert torch.equal(before[20 + 70 :], after[20 + 70 :])
    assert not torch.equal(before[20 + 65 : 20 + 70], after[20 + 65 : 20 + 70])


@pytest.mark.parametrize("num_threads", [1, 3, 16])
def test_every_query_is_in_one_chunk_and_every_chunk_in_one_item(num_threads):
    trunks, branches, parents = [100, 3, 40], [50, 1, 200, 7], [0, 0, 2, 2]
    plan = Plan.of(row_of(trunks, branches, parents), 6, 2, num_threads)
    segments = plan.segments.tolist()
    assert [s[1] for s in segments] == [100, 50, 1, 3, 40, 200, 7]  # each prompt, then its completions
    assert [s[0] for s in segments] == [0, 143, 193, 100, 103, 194, 394]
    covered = {(segment, query) for segment, low, high in plan.chunks.tolist() for query in range(low, high)}
    assert covered == {(number, query) for number, s in enumerate(segments) for query in range(s[1])}
    items = plan.items.tolist()
    assert [low for low, *_ in items] + [len(plan.chunks)] == [0, *(high for _, high, *_ in items)]
    for low, high, first_key, num_keys, _ in items:
        for segment, *_ in plan.chunks[low:high].tolist():
            assert first_key <= segments[segment][2] < first_key + num_keys
    assert plan.num_sums == sum(item[3] for item in items)
