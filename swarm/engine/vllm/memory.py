"""How much memory vLLM's KV cache gets, beside a trainer on the same device."""

from typing import Any

from swarm.config import EngineConfig
from swarm.devices import look_at
from swarm.errors import EngineError

__all__ = ["bytes_per_token", "kv_cache_bytes", "memory_share"]

_MIB = 2**20
_BLOCK_TOKENS = 128  # of vLLM's largest usual block: each sequence wastes part of one
_SHARE = 0.5  # of what is free: the rest is left to the trainer


def bytes_per_token(model: Any, num_gpus: int = 1) -> int:
    """Return what one token's keys and values take, on each of the GPUs that share the heads."""
    text = model.config.get_text_config()
    num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * -(-num_heads // num_gpus) * head_dim * model.dtype.itemsize)


def kv_cache_bytes(model: Any, config: EngineConfig, max_seq_len: int) -> int:
    """Return the cache's size on each GPU: all slots at full length, or what the setting or the free memory allows.

    With less than all slots need, vLLM lets requests wait. Raises EngineError where not even one sequence fits, or
    where what is set does not fit beside the weights.
    """
    num_gpus = config.tensor_parallel_size
    per_sequence = (-(-max_seq_len // _BLOCK_TOKENS) + 1) * _BLOCK_TOKENS * bytes_per_token(model, num_gpus)
    wanted = (config.max_slots + 1) * per_sequence
    free_bytes = look_at(model.device).free_bytes - _weight_bytes(model, num_gpus)
    if config.kv_cache_mb:
        allowed, reason = config.kv_cache_mb * _MIB, f"engine.kv_cache_mb is {config.kv_cache_mb}"
        if min(wanted, allowed) > free_bytes:
            raise EngineError(
                f"vLLM's KV cache of {min(wanted, allowed) / _MIB:,.0f} MiB does not fit: {free_bytes / _MIB:,.0f} MiB "
                "are free beside its weights: lower engine.kv_cache_mb"
            )
    else:
        allowed = int(free_bytes * _SHARE)
        reason = f"{free_bytes / _MIB:,.0f} MiB are free beside its weights, half of which are the trainer's"
    least = 2 * per_sequence  # vLLM keeps a block for itself
    if allowed < least:
        raise EngineError(
            f"vLLM's KV cache needs {least / _MIB:,.0f} MiB for one sequence of {max_seq_len} tokens, and {reason}: "
            "lower engine.max_seq_len, or raise engine.kv_cache_mb"
        )
    return min(wanted, allowed)


def memory_share(model: Any, cache_bytes: int, num_gpus: int = 1) -> float:
    """Return which part of the device's memory vLLM takes for weights and KV cache: more must be free at its start."""
    share = (_weight_bytes(model, num_gpus) + cache_bytes) / look_at(model.device).total_bytes
    return min(max(share, 0.001), 1.0)


def _weight_bytes(model: Any, num_gpus: int) -> int:
    """Return what the weights take that come with vLLM: its own on each GPU, and on a CPU those in shared memory."""
    num_bytes = int(sum(parameter.nbytes for parameter in model.parameters()))
    return num_bytes // num_gpus if model.device.type == "cuda" else 2 * num_bytes
