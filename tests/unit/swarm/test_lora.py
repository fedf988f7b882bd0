"""Adapters: what a policy with them is, whole and in parts."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from swarm.config import LoraConfig
from swarm.lora import AdaptedState, add_adapters, policy_state

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


class Layers(nn.Module):
    """One of each layer that peft adapts in a language model, and one that it leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 4)
        self.conv = Conv1D(5, 4)  # keeps its weight as [num_inputs, num_outputs]
        self.norm = nn.LayerNorm(5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(self.linear(self.embed(tokens))))


def adapted(dtype=torch.float32) -> nn.Module:
    """With adapters that have learned something."""
    torch.manual_seed(0)
    model = Layers().to(dtype)
    add_adapters(model, LoraConfig(rank=2, alpha=6.0, target_modules=r"embed|linear|conv"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def test_merged_weights_do_what_layers_with_adapters_do():
    model, plain = adapted(), Layers()
    state = policy_state(model)
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    tokens = torch.arange(11)
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_the_parts_are_live_and_merged_in_float32():
    model = adapted(torch.bfloat16)
    state = policy_state(model)
    assert isinstance(state, AdaptedState)
    assert sorted(state.adapters) == ["conv.weight", "embed.weight", "linear.weight"]
    assert state.base["linear.weight"].data_ptr() == model.linear.base_layer.weight.data_ptr()
    adapter = state.adapters["linear.weight"]
    assert (tuple(adapter.a.shape), tuple(adapter.b.shape), adapter.scaling) == ((2, 6), (4, 2), 3.0)
    expected = state.base["linear.weight"].double() + 3.0 * adapter.b.double() @ adapter.a.double()
    torch.testing.assert_close(state["linear.weight"], expected.to(torch.bfloat16), rtol=2**-7, atol=0)
    assert state["linear.weight"].dtype == torch.bfloat16
    assert torch.equal(state["norm.weight"], model.norm.weight)


def test_without_adapters_the_state_is_the_models_own():
    model = Layers()
    assert policy_state(model)["linear.weight"].data_ptr() == model.linear.weight.data_ptr()
