"""The part of benchmarks/tlt.py that asks the vLLM engine: the tail of a round, with drafts and without."""

import json
import sys
from typing import Any

from _tlt import BATCHES, MAX_SEQ_LEN, NUM_TAUGHT_PROMPTS, fared, prompts_of, speculators, take_turns, teach
from harness import Bar

from swarm.config import EngineConfig
from swarm.drafting.speculator import MAX_DEPTH
from swarm.engine.vllm.engine import VllmEngine
from swarm.engine.vllm.host import VllmHost
from swarm.engine.vllm.memory import kv_cache_bytes
from swarm.policy import Policy

__all__ = ["vllm_tail"]

_GOAL = 1.0  # none was set but that it gains


def _host(policy: Policy, num_draft_tokens: int) -> VllmHost:
    """Start vLLM, as a node's engine does."""
    config = EngineConfig(max_slots=max(BATCHES))
    return VllmHost(
        policy.model, max_slots=max(BATCHES), max_seq_len=MAX_SEQ_LEN,
        kv_cache_bytes=kv_cache_bytes(policy.model, config, MAX_SEQ_LEN), num_draft_tokens=num_draft_tokens, num_gpus=1,
    )  # fmt: skip


def vllm_tail(policy: Policy, num_groups: int, num_steps: int) -> tuple[dict[str, Any], list[Bar]]:
    """Compare every way of decoding at small batches. Plain decoding has a vLLM that was started without drafts."""
    learner, taught = teach(policy, policy.model, prompts_of(policy, 31, NUM_TAUGHT_PROMPTS), num_steps)
    figures: dict[str, Any] = {"teaching": taught}
    bars: list[Bar] = []
    plain, drafting = _host(policy, 0), _host(policy, MAX_DEPTH)
    try:
        for batch in BATCHES:
            ways = {
                way: VllmEngine(
                    policy.model, eos_token_ids=policy.eos_token_ids, config=EngineConfig(max_slots=batch),
                    max_seq_len=MAX_SEQ_LEN, host=plain if one is None else drafting, speculator=one,
                )
                for way, one in speculators(policy, learner, batch).items()
            }  # fmt: skip
            seconds, written = take_turns(ways, prompts_of(policy, 77, num_groups))
            num_tokens = sum(map(len, written["plain"]))
            found: dict[str, Any] = {"tokens_per_s_plain": round(num_tokens / seconds["plain"], 1)}
            for way in list(ways)[1:]:
                pairs = list(zip(written[way], written["plain"], strict=True))
                found[way] = {
                    "times_plain": round(seconds["plain"] / seconds[way] * sum(map(len, written[way])) / num_tokens, 3),
                    **fared(ways[way]),
                    "completions_equal": sum(one == other for one, other in pairs),  # in bf16 near ties break otherwise
                    "num_completions": len(pairs),
                }
            best = max(found[way]["times_plain"] for way in list(ways)[1:])
            bars.append(Bar(f"vllm, batch {batch}: best drafter against plain", best, _GOAL))
            figures[f"batch {batch}"] = found
            print(f"vllm, batch {batch}: {json.dumps(found)}", file=sys.stderr, flush=True)
    finally:
        plain.close()
        drafting.close()
    return figures, bars
