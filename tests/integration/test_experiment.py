"""`swarm-node experiment`, as a person runs it, on a model of a few thousand weights."""

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

NUM_NODES, ROUNDS = 3, 8
SETTINGS = {
    "tasks.answer": '["whole_text"]',
    "rollout.max_new_tokens": "2",
    "rollout.num_completions": "16",
    "trainer.learning_rate": "3e-3",
    "evaluation.num_items": "8",
    "evaluation.every_rounds": "4",
}


def sapo(run_dir, *more, arms="8/0,4/4", seeds=1, rounds=ROUNDS, nodes=NUM_NODES, source=("--model", "model")):
    sets = [text for name, value in SETTINGS.items() for text in ("--set", f"{name}={value}")]
    given = [*source, "--tasks", "questions.jsonl", *sets, "--arms", arms, "--seeds", str(seeds)]
    given += ["--nodes", str(nodes)] if nodes else []
    return ["experiment", "sapo", *given, "--rounds", str(rounds), "--jobs", "2", "--run-dir", run_dir, *more]


def unit(workplace, run_dir, name):
    return json.loads((workplace.path / run_dir / "units" / f"{name}.json").read_text())


def steady(found):
    """What does not depend on the machine."""
    nodes = [
        {**node, "columns": {name: column for name, column in node["columns"].items() if not name.endswith("_s")}}
        for node in found["nodes"]
    ]
    return {**found, "nodes": nodes, "wall_s": None, "cpu_s": None}


@pytest.fixture(scope="module")
def finished(new_workplace):
    """A folder in which an experiment of two arms has been run, and what it printed."""
    workplace = new_workplace()
    done = workplace.run(*sapo("first", "--json"))
    assert done.returncode == 0, done.stderr
    return workplace, json.loads(done.stdout.splitlines()[-1])


def test_every_arm_is_measured_on_every_node(finished):
    workplace, found = finished
    assert [arm["name"] for arm in found["arms"]] == ["8/0", "4/4"]
    for arm in found["arms"]:
        nodes = unit(workplace, "first", f"{arm['slug']}-seed1")["nodes"]
        rewards = [sum(node["columns"]["reward_mean"]) for node in nodes]
        assert len(rewards) == NUM_NODES
        assert arm["measures"]["reward_cumulative"]["mean"] == pytest.approx(sum(rewards) / NUM_NODES)
        assert 0 <= arm["measures"]["heldout_after"]["mean"] <= 1
    silo, half = found["arms"]
    assert silo["measures"]["external_missing_share"] is None
    assert half["measures"]["external_missing_share"]["mean"] < 1
    assert half["measures"]["num_completions"]["mean"] < silo["measures"]["num_completions"]["mean"]
    gained = half["measures"]["reward_cumulative"]["mean"] / silo["measures"]["reward_cumulative"]["mean"]
    assert half["against"]["8/0"]["reward_cumulative"]["ratio"]["mean"] == pytest.approx(gained)


def test_nodes_learn_from_each_other_and_alone_from_nobody(finished):
    workplace, _ = finished
    for node in unit(workplace, "first", "4-4-seed1")["nodes"]:
        columns = node["columns"]
        assert max(columns["num_external"]) > 0
        assert [i + j for i, j in zip(columns["num_local"], columns["num_external"], strict=True)] == [8] * ROUNDS
        assert [round_index for round_index, _ in node["heldout"]] == [0, 4, 8]
    for node in unit(workplace, "first", "8-0-seed1")["nodes"]:
        assert node["columns"]["num_local"] == [8] * ROUNDS
        assert sum(node["columns"]["num_admitted"]) == 0


def test_a_unit_that_is_run_twice_is_the_same_bit_for_bit(finished):
    workplace, _ = finished
    assert workplace.run(*sapo("second", arms="4/4")).returncode == 0
    first, second = (unit(workplace, folder, "4-4-seed1") for folder in ("first", "second"))
    assert steady(first) == steady(second)
    rewards = [node["columns"]["reward_mean"] for node in first["nodes"]]
    assert rewards[0] != rewards[1], "nodes ask different questions"


def test_what_is_finished_is_kept_and_more_arms_and_seeds_may_come(finished):
    workplace, _ = finished
    before = (workplace.path / "first/units/4-4-seed1.json").stat().st_mtime_ns
    done = workplace.run(*sapo("first", arms="8/0,4/4,shy=2/6+sapo.publish=none"))
    assert done.returncode == 0, done.stderr
    assert "1 of 3 units are to be run" in done.stdout
    assert (workplace.path / "first/units/4-4-seed1.json").stat().st_mtime_ns == before
    assert "| shy |" in (workplace.path / "first/results.md").read_text()
    assert max(unit(workplace, "first", "shy-seed1")["nodes"][0]["columns"]["num_external"]) == 0


def test_another_setting_in_the_same_folder_is_refused_by_its_name(finished):
    workplace, _ = finished
    done = workplace.run(*sapo("first", "--set", "trainer.max_grad_norm=0.5"))
    assert done.returncode == 2
    assert "was run with trainer.max_grad_norm = 1.0, not 0.5" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_everything_is_drawn_anew_from_the_units(finished):
    workplace, _ = finished
    drawn = ["reward.png", "heldout.png", "cumulative.png", "results.md", "results.json"]
    before = {name: (workplace.path / "first" / name).read_bytes() for name in drawn}
    for name in drawn:
        (workplace.path / "first" / name).unlink()
    done = workplace.run("experiment", "plot", "first")
    assert done.returncode == 0, done.stderr
    after = {name: (workplace.path / "first" / name).read_bytes() for name in drawn}
    assert all(after[name] == before[name] for name in ("results.md", "results.json"))
    assert all(after[name].startswith(b"\x89PNG") for name in drawn[:3])


def test_a_folder_without_an_experiment_is_a_mistake_of_one_line(workplace):
    done = workplace.run("experiment", "plot", "nowhere")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "swarm-node: nowhere holds no experiment: there is no readable plan.json; check the path"
    ]


def test_a_model_that_is_not_there_is_a_mistake_of_one_line(workplace):
    done = workplace.run(*sapo("none", source=("--model", "nosuch/model"), arms="8/0"), HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "nosuch/model" in done.stderr.splitlines()[-1]
    assert not list((workplace.path / "none/units").glob("*.json"))


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_experiment_leaves_finished_units_and_no_process(workplace, number):
    running = workplace.start(*sapo("stopped", arms="4/4", rounds=100_000))
    try:
        deadline_s = time.monotonic() + 240
        # The process of the unit, and one that scores for it: by then the nodes are there.
        while len(children := psutil.Process(running.pid).children(recursive=True)) < 2:
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        begin_s = time.monotonic()
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
        assert time.monotonic() - begin_s < 10
    finally:
        running.kill()
    assert running.returncode == 130
    assert err.splitlines()[-1] == "stopped; the same command with --run-dir stopped goes on"
    assert not list((workplace.path / "stopped/units").glob("*.json"))
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_nodes_may_have_different_models_tokenizers_and_settings(workplace):
    from transformers import AutoTokenizer, LlamaForCausalLM

    other = workplace.path / "other"
    make_other_model(workplace.path / "model", other)
    assert (
        AutoTokenizer.from_pretrained(other).get_vocab()
        != AutoTokenizer.from_pretrained(workplace.path / "model").get_vocab()
    )
    assert LlamaForCausalLM.from_pretrained(other).config.num_hidden_layers == 1
    (workplace.path / "mixed.toml").write_text(
        '[[nodes]]\ncount = 2\n[[nodes]]\nmodel.name = "other"\nsapo.num_local = 3\n'
    )
    done = workplace.run(*sapo("mixed", "--config", "mixed.toml", arms="4/4", nodes=None))
    assert done.returncode == 0, done.stderr
    first, second, third = unit(workplace, "mixed", "4-4-seed1")["nodes"]
    assert Path(third["settings"]["model.name"]) == other
    assert third["settings"]["sapo.num_local"] == 3
    assert Path(first["settings"]["model.name"]) == (workplace.path / "model").resolve()
    assert max(third["columns"]["num_external"]) > 0, "the one learns from those with another tokenizer"
    assert max(first["columns"]["num_external"] + second["columns"]["num_external"]) > 0


def make_other_model(source: Path, target: Path) -> None:
    """Make a smaller model whose tokens are the same characters under other numbers."""
    import string

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["<eos>", "<pad>", *string.digits, "\n", " ", *reversed(string.ascii_lowercase)]
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(characters)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(target)
    shape = LlamaConfig.from_pretrained(source)
    shape.num_hidden_layers, shape.eos_token_id, shape.pad_token_id = 1, 0, 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(shape).save_pretrained(target)
