import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from swarm.fused import fuse, gated_silu, rms_norm

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def double(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def test_rms_norm_of_a_row_worked_out_by_hand():
    # rms of (3, 4) is sqrt(12.5) = 3.5355339
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[0.8485281, 11.3137085]]))


def test_gradients_equal_those_of_the_composed_operations():
    x, weight = (
        double(3, 5, 8, seed=1).float().detach().requires_grad_(),
        double(8, seed=2).float().detach().requires_grad_(),
    )
    grad = double(3, 5, 8, seed=3).float().detach()
    rms_norm(x, weight, 1e-5).backward(grad)
    wide, heavy = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (heavy * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), heavy.grad, rtol=1e-5, atol=1e-5)


def test_gated_silu_passes_the_numerical_gradient_check():
    assert torch.autograd.gradcheck(gated_silu, (double(4, 6, seed=4), double(4, 6, seed=5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_llama_has_the_same_output_and_gradients(dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)
    ids = torch.randint(0, 97, (2, 11))

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        return logits.detach().clone(), [parameter.grad.float().clone() for parameter in model.parameters()]

    logits, gradients = run()
    assert fuse(model) == 2 * 2 + 1 + 2  # norms of two layers, the last norm, two feed-forward blocks
    fused_logits, fused_gradients = run()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(fused_logits, logits, rtol=tolerance, atol=tolerance)
    for fused, own in zip(fused_gradients, gradients, strict=True):
        scale = float(own.abs().max())
        torch.testing.assert_close(fused, own, rtol=tolerance, atol=tolerance * max(scale, 1.0))


def test_a_variant_keeps_its_own_code():
    # Gemma scales by 1 + weight and gates with GELU
    torch.manual_seed(0)
    model = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=8))
    assert fuse(model) == 0


def test_modules_with_the_parts_but_another_result_are_left_alone():
    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-5

        def forward(self, x):
            return rms_norm(x, self.weight + 1, self.variance_epsilon)

    assert fuse(Offset()) == 0
