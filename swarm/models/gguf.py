"""GGUF files: weights unpacked to dense tensors, with a cache of the unpacked model.

Reading a GGUF file takes many seconds, most of them for its tokenizer. The result is kept in the user's
cache folder under the digest of the file, so that the second load is as fast as that of any folder.
"""

import contextlib
import hashlib
import io
import os
import shutil
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from swarm.errors import ModelError
from swarm.models.loading import LOAD_ERRORS, first_line, load_checked

__all__ = ["cache_root", "load_gguf"]

CACHE_VERSION = 1  # raised when what a cached folder holds changes
_COMPLETE = "complete"  # marks a cached folder whose every file has been written


def cache_root() -> Path:
    """Return the folder of unpacked models: `$SWARM_NODE_CACHE`, else under the user's cache folder."""
    if named := os.environ.get("SWARM_NODE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swarm-node"


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a `.gguf` file as a dense model with its tokenizer and chat template. Raises ModelError."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: fetch it again")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = f"{CACHE_VERSION}-{transformers.__version__}"
    cached = cache_root() / "gguf" / f"{digest[:32]}-{str(dtype).removeprefix('torch.')}-{version}"
    if not (cached / _COMPLETE).is_file():
        model, tokenizer = _unpack(path, dtype)
        _store(model, tokenizer, cached)
        return model, tokenizer
    try:
        model = load_checked(AutoModelForCausalLM, f"cached model {cached}", cached, dtype=dtype, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(cached)
    except LOAD_ERRORS as error:
        raise ModelError(f"the cached copy of {path} is damaged ({first_line(error)}): delete {cached}") from error


def _unpack(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        # Its progress bar knows no off switch, and would tear the display.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            model = load_checked(
                AutoModelForCausalLM,
                str(path),
                path.parent,
                gguf_file=path.name,
                dtype=dtype,
                quantization_config=GgufConfig(dequantize=True),
            )
    except LOAD_ERRORS as error:
        raise ModelError(f"{path} cannot be loaded ({first_line(error)}): fetch it again, or name another") from error
    return model, tokenizer


def _store(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the unpacked model beside, then rename. A cache that cannot be written costs time only."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / _COMPLETE).touch()
            if not folder.exists():
                os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or first_line(error)
        warnings.warn(f"unpacked model not cached in {folder} ({reason}): the next start is slow too", stacklevel=2)
