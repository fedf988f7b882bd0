"""The compiled parts of a training step against the same written in torch, in float64."""

import pytest
import torch
from torch.nn import functional

from swarm.native import INSTRUCTION_SETS, kernels
from swarm.native import training as native_training

NUM_SETS = kernels().instruction_set + 1 if kernels() else 0
pytestmark = [
    pytest.mark.skipif(not NUM_SETS, reason="the kernels were not compiled on this machine"),
    pytest.mark.usefixtures("instruction_set"),
]


@pytest.fixture(params=range(NUM_SETS), ids=INSTRUCTION_SETS[:NUM_SETS])
def instruction_set(request, monkeypatch):
    monkeypatch.setattr(kernels(), "instruction_set", request.param)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def normal(*shape, dtype, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def check(got, expected):
    tolerance = 2e-6 if got.dtype == torch.float32 else 1e-2
    assert float((got.double() - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [16, 1040, 5008])
def test_log_mass_and_gradient(dtype, vocab, scale):
    logits, grad = normal(9, vocab, dtype=dtype, scale=8.0), normal(9, dtype=torch.float32, seed=1)
    targets = torch.randint(vocab, (9,), generator=torch.Generator().manual_seed(2))
    exact = logits.double().requires_grad_()
    logprobs = torch.log_softmax(exact * scale, -1).gather(1, targets[:, None])[:, 0]
    logprobs.backward(grad.double())
    log_mass, of_target = native_training.logit_mass(logits, targets, scale)
    check(of_target - log_mass, logprobs.detach())
    native_training.logit_gradient_(logits, targets, log_mass, grad, scale)
    check(logits, exact.grad)


def test_log_mass_of_extreme_logits():
    logits = torch.full((2, 32), -torch.inf)
    logits[0, 3], logits[1, 7], logits[1, 30] = 1e4, -1e4, -1e4
    log_mass, of_target = native_training.logit_mass(logits, torch.tensor([3, 7]), 1.0)
    torch.testing.assert_close(log_mass, torch.logsumexp(logits, -1), rtol=1e-6, atol=0)
    assert of_target.tolist() == [1e4, -1e4]


def test_rms_norm(dtype):
    x, weight, grad = normal(37, 96, dtype=dtype), normal(96, dtype=dtype, seed=1), normal(37, 96, dtype=dtype, seed=2)
    exact, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = exact_weight * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    expected.backward(grad.double())
    out, inverse = native_training.rms_norm(x, weight, 1e-5)
    check(out, expected.detach())
    grad_x, grad_weight = native_training.rms_norm_gradient(x, weight, inverse, grad, needs_weight=True)
    check(grad_x, exact.grad)
    check(grad_weight, exact_weight.grad)
    frozen, none = native_training.rms_norm_gradient(x, weight, inverse, grad, needs_weight=False)
    assert none is None
    assert torch.equal(frozen, grad_x)


def test_gated_silu(dtype):
    gate, up, grad = (normal(11, 48, dtype=dtype, scale=scale, seed=n) for n, scale in enumerate((6.0, 1.0, 1.0)))
    gate[0, :4] = torch.tensor([200.0, -200.0, 0.0, -90.0])
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    expected = functional.silu(exact_gate) * exact_up
    expected.backward(grad.double())
    check(native_training.gated_silu(gate, up), expected.detach())
    grad_gate, grad_up = native_training.gated_silu_gradient(gate, up, grad)
    check(grad_gate, exact_gate.grad)
    check(grad_up, exact_up.grad)
