"""Blocked attention against the definition, written as one softmax over all scores."""

import pytest
import torch

from swarm.cpu_attention import block_attention


def definition(query, key, value, bias, scaling):
    repeat = query.shape[2] // key.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (query, key.repeat_interleave(repeat, 2), value.repeat_interleave(repeat, 2)))
    scores = scaling * q @ k.transpose(-1, -2)
    if bias is None:
        bias = torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return (torch.softmax(scores + bias, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(5, None), (128, None), (300, None), (700, None), (9, 20), (130, 600)]
)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_value_and_gradient(num_queries, num_keys, num_kv_heads):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    keys = num_keys or num_queries
    bias = None
    if num_keys is not None:
        hidden = torch.rand(2, 1, num_queries, keys, generator=generator) < 0.4
        hidden[..., 0] = False
        bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    inputs = [normal(2, num_queries, 4, 8), normal(2, keys, num_kv_heads, 8), normal(2, keys, num_kv_heads, 8)]
    upstream = normal(2, num_queries, 4, 8)
    results = []
    for function in (block_attention, definition):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        out = function(*leaves, bias, 0.3)
        out.backward(upstream)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
