"""Chunked log-probabilities against the full softmax, in value and gradient."""

import math

import pytest
import torch

from swarm.logprobs import LogitsHead, target_logprobs


def full_logprobs(hidden, head, targets, temperature):
    logits = hidden @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), [(1.0, None, False), (0.25, None, True), (0.5, 2.0, True)])
def test_equals_full_softmax(chunk_tokens, temperature, scale, softcap, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=generator, dtype=torch.float32)
    weight = torch.randn(33, 8, generator=generator)
    bias = torch.randn(33, generator=generator) if with_bias else None
    targets = torch.randint(33, (10,), generator=generator)
    upstream = torch.randn(10, generator=generator)
    gradients = []
    for function in ("chunked", "full"):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
        head = LogitsHead(leaves[1], leaves[2] if with_bias else None, scale, softcap)
        if function == "chunked":
            values = target_logprobs(leaves[0], head, targets, temperature=temperature, chunk_tokens=chunk_tokens)
        else:
            values = full_logprobs(leaves[0], head, targets, temperature)
        (values * upstream).sum().backward()
        gradients.append([values, *(leaf.grad for leaf in leaves)])
    for chunked, full in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-5)


def test_by_hand():
    # Logits at temperature 2: (0, ln 3) / ... chosen so that the softmax is (1/4, 3/4).
    head = LogitsHead(torch.tensor([[0.0], [2.0 * math.log(3.0)]]), None)
    hidden = torch.ones(1, 1, requires_grad=True)
    value = target_logprobs(hidden, head, torch.tensor([1]), temperature=2.0)
    value.sum().backward()
    assert value.item() == pytest.approx(math.log(0.75))
    # d log p1 / dh = (w1 - sum_j p_j w_j) / T = 2 ln 3 * (1 - 3/4) / 2
    assert hidden.grad.item() == pytest.approx(math.log(3.0) / 4)


def test_frozen_head_gets_no_gradient():
    weight = torch.randn(5, 4)
    hidden = torch.randn(3, 4, requires_grad=True)
    target_logprobs(hidden, LogitsHead(weight, None), torch.tensor([0, 1, 2])).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_softmax_is_fp32_for_bf16_weights():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 32, generator=generator).bfloat16()
    weight = torch.randn(1000, 32, generator=generator).bfloat16()
    targets = torch.randint(1000, (64,), generator=generator)
    values = target_logprobs(hidden, LogitsHead(weight, None), targets, chunk_tokens=16)
    assert values.dtype == torch.float32
    exact = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(values, exact, rtol=1e-5, atol=1e-4)
