"""What every way of loading a model shares: quiet libraries, and loud incomplete weights."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from swarm.errors import ModelError

__all__ = ["LOAD_ERRORS", "first_line", "load_checked", "quiet", "quiet_hub"]

# What transformers, tokenizers, gguf and safetensors raise for files that are missing, corrupt or of an unknown kind.
LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    SafetensorError,
    struct.error,
)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and notices of transformers off the terminal."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's notices of its retries off the terminal; how far a download is stays to be seen."""
    logger = getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(level)


def load_checked(loader: Any, where: str, source: Any, **options: Any) -> PreTrainedModel:
    """Load weights, and refuse a file that lacks some: they would silently be random."""
    model, info = loader.from_pretrained(source, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(f"{where} lacks {len(missing)} weights, {missing[0]} among them: fetch or export it again")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{type(model).__name__} is no PreTrainedModel")
    return model
