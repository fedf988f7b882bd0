"""Writes the learned drafter as an EAGLE checkpoint: what vLLM's `speculative_config` takes with method "eagle".

A `config.json` of a Llama with one layer, and a `model.safetensors` with `fc.weight` and `layers.0.*`. Embedding and LM
head are the policy's: who loads it takes them from there.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from swarm.drafting.head_model import HeadModel
from swarm.policy import write_folder

__all__ = ["export_head", "load_head"]

_WEIGHTS = "model.safetensors"


def export_head(model: HeadModel, folder: Path) -> None:
    """Write the drafter to a folder that is not there yet. Raises ModelError where that cannot be."""

    def save(partial: Path) -> None:
        config = model.config.to_dict()
        config.pop("_attn_implementation_autoset", None)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": dtype, "torch_dtype": dtype}
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})

    write_folder(folder, save)


@torch.no_grad()
def load_head(model: HeadModel, folder: Path) -> None:
    """Take the weights that `export_head` wrote. Raises KeyError or RuntimeError where they do not fit."""
    model.load_state_dict(load_file(folder / _WEIGHTS))
