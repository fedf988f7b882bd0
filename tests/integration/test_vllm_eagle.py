"""vLLM loads an exported drafter like any EAGLE checkpoint, and keeps as much of its drafts as this project's engine.

It takes half a minute of CPU: `make soak`.
"""

import copy
import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from swarm.config import EngineConfig, ModelConfig, TrainerConfig
from swarm.devices import look_at
from swarm.drafting.head import HeadDrafter
from swarm.drafting.head_export import export_head
from swarm.drafting.learner import HeadLearner
from swarm.drafting.speculator import Speculator
from swarm.drafting.tuner import Strategy
from swarm.engine.base import Request, SamplingParams
from swarm.engine.torch import TorchEngine
from swarm.engine.vllm.installed import find_vllm, why_not
from swarm.policy import export, load_policy
from swarm.trainer import Trainer
from swarm.types import TrainingBatch, TrainingGroup

NO_VLLM = why_not(find_vllm(), look_at(torch.device("cpu")))
pytestmark = [pytest.mark.soak, pytest.mark.skipif(NO_VLLM is not None, reason=f"{NO_VLLM}")]

DEPTH, LENGTH, MAX_SEQ_LEN = 4, 24, 64
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip
SCRIPT = textwrap.dedent("""
    import json, sys
    from vllm import LLM, SamplingParams
    asked = json.loads(sys.argv[1])
    model = LLM(
        model=asked["policy"], max_model_len=asked["max_seq_len"], max_num_seqs=4, enforce_eager=True,
        skip_tokenizer_init=True, disable_log_stats=False, async_scheduling=False, dtype="float32",
        speculative_config={"method": "eagle", "model": asked["drafter"], "num_speculative_tokens": asked["depth"]},
    )
    params = SamplingParams(temperature=0, max_tokens=asked["length"], ignore_eos=True, detokenize=False)
    out = model.generate([{"prompt_token_ids": one} for one in asked["prompts"]], params, use_tqdm=False)
    found = {one.name: one.value for one in model.get_metrics() if "spec_decode" in one.name and hasattr(one, "value")}
    print(json.dumps({"tokens": [list(one.outputs[0].token_ids) for one in out], "found": found}))
""")


def test_an_exported_drafter_drafts_for_vllm_what_it_drafts_here(tmp_path):
    policy = load_policy(ModelConfig(name="tiny"))
    requests = [
        Request(at, tuple(policy.encode_prompt(f"{2 + at // 6}+{3 + at % 6}=")), at,
                SamplingParams(LENGTH, temperature=0, ignore_eos=True))
        for at in range(42)
    ]  # fmt: skip

    def engine(speculator=None):
        return TorchEngine(
            policy.model, eos_token_ids=(), config=EngineConfig(max_slots=4), max_seq_len=MAX_SEQ_LEN,
            speculator=speculator,
        )  # fmt: skip

    plain = engine().generate(requests)
    learner = HeadLearner(policy.model)
    trainer = Trainer(copy.deepcopy(policy.model), TrainerConfig(learning_rate=1e-12))
    trainer.observer = learner.observe
    pairs = zip(requests, plain, strict=True)
    groups = [TrainingGroup(one.prompt_ids, (done.token_ids,), (1.0,), (None,)) for one, done in pairs]
    trainer.update(TrainingBatch(tuple(groups)))
    deadline = time.monotonic() + 60
    while learner.num_steps < 200 and time.monotonic() < deadline:
        learner.step()
    learner.next_round()
    head = HeadDrafter(learner.model, policy.model, lambda: learner.vocabulary, num_slots=4, capacity=MAX_SEQ_LEN)
    ours = Speculator([head], Strategy("head", DEPTH, 4 * DEPTH))
    engine(ours).generate(requests)
    export(policy, tmp_path / "policy")
    export_head(learner.model, tmp_path / "drafter")
    asked = {
        "policy": str(tmp_path / "policy"), "drafter": str(tmp_path / "drafter"), "depth": DEPTH, "length": LENGTH,
        "max_seq_len": MAX_SEQ_LEN, "prompts": [list(one.prompt_ids) for one in requests],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)], env={**os.environ, **ENVIRONMENT}, capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["tokens"] == [list(one.token_ids) for one in plain]
    per_draft = theirs["found"]["vllm:spec_decode_num_accepted_tokens"] / theirs["found"]["vllm:spec_decode_num_drafts"]
    counts = ours.counts["head"]
    print(f"kept of a draft: {per_draft:.2f} by vLLM, {counts.num_kept / counts.num_drafts:.2f} here")
    # vLLM always drafts to the full depth; here a draft ends where it is unlikely
    assert per_draft == pytest.approx(counts.num_kept / counts.num_drafts, rel=0.2)
    assert per_draft > 0.5, "a drafter whose weights landed elsewhere is right by chance"
