"""The learned drafter's network, EAGLE-shaped (arXiv 2401.15077): one decoder layer over the policy's last states.

    (state after token t, embedding of token t+1)  →  fc, one layer  →  about the state after token t+1

The policy's LM head turns what comes out into the distribution of token t+2. Embedding and LM head are the policy's
own, frozen and never kept here. As in EAGLE's checkpoints there is no norm before the layer and none after it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from swarm.fused import fuse

__all__ = ["HeadModel", "head_config", "supports_head"]

_MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


def supports_head(model: nn.Module) -> bool:
    """Whether a drafter of this kind can learn from the model: Llama and its kin, whose LM head is a bare matrix."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return (
        config.model_type in _MODEL_TYPES
        and getattr(config, "hidden_act", None) == "silu"
        and rope.get("rope_type", "default") in _STATIC_ROPE
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and getattr(head, "bias", None) is None
    )


def head_config(model: nn.Module) -> LlamaConfig:
    """Return the sizes of a drafter for a model: its own, with one layer."""
    config: Any = model.config
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(getattr(config, "rope_parameters", None) or {"rope_type": "default"}),
        tie_word_embeddings=False,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


class HeadModel(nn.Module):
    """The weights that learn, under the names of EAGLE's checkpoints: `fc`, `layers.0.*`."""

    _supports_attention_backend = True  # its attention goes through transformers' interface

    def __init__(self, config: LlamaConfig, seed: int = 0) -> None:
        """Begin near the identity: before it has learned, the state after a token is about the one before."""
        super().__init__()
        self.config = config
        size = config.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.fc = nn.Linear(2 * size, size, bias=False)
            layer = LlamaDecoderLayer(config, 0)
            for parameter in (*layer.parameters(), self.fc.weight):
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=config.initializer_range)
        with torch.no_grad():
            self.fc.weight[:, size:] += torch.eye(size)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary_emb = LlamaRotaryEmbedding(config)
        fuse(self)

    def forward(self, embedded: Tensor, states: Tensor, position_ids: Tensor) -> Tensor:
        """Return what the states after the embedded tokens are taken to be.

        embedded: [1, num_tokens, hidden], of tokens. states: likewise, the policy's after the tokens before them.
        position_ids: [1, num_tokens]. Who attends to whom is `packed_attention`'s to say.
        """
        joined: Tensor = self.fc(torch.cat([embedded, states], dim=-1))
        angles = self.rotary_emb(joined, position_ids)
        out: Tensor = self.layers[0](joined, position_embeddings=angles, position_ids=position_ids)
        return out
