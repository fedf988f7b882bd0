"""The policy: which weights and tokenizer a name stands for, prompts in, text out, and export.

A name is a built-in (`tiny`, `smollm2-135m`), a `.gguf` file, a local folder, or a hub id. Weights are read
from safetensors and GGUF only, never from pickles. GGUF files and their cache belong to `swarm.models.gguf`;
training, sampling and checkpoints belong to others.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from swarm.config import ModelConfig
from swarm.devices import look_at
from swarm.errors import ModelError
from swarm.models.gguf import load_gguf
from swarm.models.loading import LOAD_ERRORS, first_line, load_checked, quiet, quiet_hub
from swarm.models.presets import locate

__all__ = ["Policy", "export", "load_policy", "resolve_device", "write_folder"]

MIN_PARAMS_FOR_BF16 = 20_000_000  # below, a step is bound by overhead and fp32 costs nothing


@dataclass(frozen=True, slots=True)
class Policy:
    """A causal language model with its tokenizer and the way it is asked."""

    name: str
    model: PreTrainedModel  # eval mode, on its device
    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: frozenset[int]  # any of them ends a completion
    end_token_id: int  # the one among them that this policy is taught to end its own answers with
    system_prompt: str | None = None

    def encode_prompt(self, question: str) -> tuple[int, ...]:
        """Return the token ids that ask `question`, up to where the completion begins.

        The chat template, with the system prompt if there is one; without a template the question and a newline.
        """
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(question + "\n")["input_ids"]
            return tuple(ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids)
        messages = [{"role": "user", "content": question}]
        if self.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def encode_completion(self, text: str, *, finished: bool) -> tuple[int, ...] | None:
        """Return the tokens of an answer that another policy wrote, ended by this one's EOS if it is finished.

        None where the tokenizer has no tokens for the text. What looks like a special token in it is plain text.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.eos_token_ids.union(self.tokenizer.all_special_ids).intersection(ids):
            return None  # the unknown token, or a tokenizer that finds special tokens in plain text
        return (*ids, self.end_token_id) if finished else tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_policy(config: ModelConfig) -> Policy:
    """Load the model that `config` names. Raises ModelError, in one line that names the fix."""
    device = resolve_device(config.device)
    with quiet():
        model, tokenizer = _load_pretrained(config, device)
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model {config.name} does not fit on {device}: choose a smaller one, or --device cpu"
        ) from error
    eos_token_ids = _eos_token_ids(model, tokenizer)
    if not eos_token_ids:
        raise ModelError(f"model {config.name} names no EOS token: set eos_token_id in its generation_config.json")
    end_token_id = _end_token_id(tokenizer, eos_token_ids)
    policy = Policy(config.name, model, tokenizer, eos_token_ids, end_token_id, config.system_prompt)
    if config.system_prompt is not None and tokenizer.chat_template is None:
        raise ModelError(f"model {config.name} has no chat template: leave model.system_prompt unset")
    try:
        policy.encode_prompt("1 + 1 =")
    except TemplateError as error:
        raise ModelError(
            f"the chat template of {config.name} refuses a prompt ({first_line(error)}): unset model.system_prompt"
        ) from error
    return policy


def resolve_device(name: str) -> torch.device:
    """Return the device that `name` stands for; `auto` takes the fastest there is."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ModelError(f"unsupported device {name!r}: use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device {name} is not there, torch sees {torch.cuda.device_count()} GPUs: use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device mps is not there: use --device cpu")
    return device


def export(policy: Policy, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and vLLM load as it is.

    Raises ModelError if it exists and is not empty, or cannot be written.
    """
    write_folder(folder, lambda partial: _save(policy, partial))


def write_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a folder beside, with files alone, then sync and rename it: it is there whole or not at all.

    Raises ModelError if it exists and is not empty, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} is not empty: export to a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            with quiet():
                save(partial)
            mode = (partial / "config.json").stat().st_mode
            for path in partial.iterdir():
                path.chmod(mode)  # safetensors writes for the owner alone; an export is to be read by servers
                _sync(path)
            _sync(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(folder.parent)
    except OSError as error:
        raise ModelError(f"cannot export to {folder}: {error.strerror or first_line(error)}") from error


def _save(policy: Policy, folder: Path) -> None:
    generation = policy.model.generation_config
    kept = None if generation is None else generation.eos_token_id
    if generation is not None:
        eos = sorted(policy.eos_token_ids)
        generation.eos_token_id = eos[0] if len(eos) == 1 else eos
    try:
        policy.model.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
    finally:
        if generation is not None:
            generation.eos_token_id = kept


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_pretrained(config: ModelConfig, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = locate(config.name)
    if isinstance(source, Path) and source.suffix == ".gguf":
        # Packed at four bits or more, a file of this size holds about as many parameters as bytes.
        return load_gguf(source, _dtype(config.dtype, device, source.stat().st_size))
    where = f"model {config.name}"
    fix = (
        ""
        if isinstance(source, Path)
        else ": no such folder here, and not loadable as a hub id; check name and network"
    )
    try:
        with quiet_hub():
            shape = AutoConfig.from_pretrained(source)
            with torch.device("meta"):
                num_params = AutoModelForCausalLM.from_config(shape).num_parameters()
            dtype = _dtype(config.dtype, device, num_params)
            model = load_checked(AutoModelForCausalLM, where, source, dtype=dtype, use_safetensors=True)
            return model, AutoTokenizer.from_pretrained(source)
    except LOAD_ERRORS as error:
        raise ModelError(f"{where} cannot be loaded{fix} ({first_line(error)})") from error


def _dtype(name: str, device: torch.device, num_params: int) -> torch.dtype:
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if num_params < MIN_PARAMS_FOR_BF16:
        return torch.float32
    return torch.bfloat16 if look_at(device).has_fast_bf16 else torch.float32


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends an answer: as the model, the tokenizer and the chat template each have it."""
    found: set[int] = set()
    generation = model.generation_config
    for ids in (
        model.config.eos_token_id,
        tokenizer.eos_token_id,
        None if generation is None else generation.eos_token_id,
    ):
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
    if tokenizer.chat_template is not None:
        found.update(_template_end(tokenizer))
    return frozenset(found)


def _end_token_id(tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> int:
    """The token that ends an answer in the chat template, else the tokenizer's EOS, else the first of the model's."""
    found = _template_end(tokenizer) if tokenizer.chat_template is not None else []
    own = tokenizer.eos_token_id
    if not found and own in eos_token_ids:
        found = [own]
    return found[0] if found else min(eos_token_ids)


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template writes right after an answer, if there is one."""
    answer = "31415926"
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return []  # a template that takes no answers cannot say how one ends
    after = tokenizer(text.rpartition(answer)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return [
        token for token in after[:1] if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
    ]
