import pytest

from node.experiment.plan import make_plan, node_assignments
from node.experiment.units import Unit
from node.layers import ConfigError, Layer, read_assignments, read_toml


def plan(*weaker, nodes=(), **flags):
    given = Layer("command line", {f"experiment.{name}": value for name, value in flags.items()})
    return make_plan([given, *weaker], node_assignments(nodes))


def settings(unit, name):
    section, _, key = name.partition(".")
    return [getattr(getattr(config, section), key) for config in unit.configs]


def test_all_arms_of_a_seed_come_before_the_next_and_have_the_same_seeds():
    found = make_plan(
        [Layer("flags", {"experiment.arms": ["8/0", "4/4"], "experiment.seeds": 2, "experiment.nodes": 3})], {}
    )
    assert [(unit.arm, unit.seed) for unit in found.units] == [("8/0", 1), ("4/4", 1), ("8/0", 2), ("4/4", 2)]
    seeds = [[config.seed for config in unit.configs] for unit in found.units]
    assert seeds == [[1001, 1002, 1003]] * 2 + [[2001, 2002, 2003]] * 2


def test_the_paper_s_comparison_is_what_is_run_by_default():
    found = plan()
    assert [arm.name for arm in found.arms] == ["8/0", "6/2", "4/4", "2/6"]
    assert len(found.units) == 20
    assert found.rounds == 300
    assert {len(unit.configs) for unit in found.units} == {8}
    assert settings(found.units[1], "sapo.num_external") == [2] * 8
    assert settings(found.units[0], "trainer.learning_rate")[0] == 2e-4  # the preset of `tiny`


def test_of_two_places_the_more_particular_one_wins(tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text(
        """
        [experiment]
        arms = ["4/4", "slow=4/4+trainer.learning_rate=1e-5"]
        seeds = 1
        [trainer]
        learning_rate = 3e-5
        [rollout]
        max_new_tokens = 5
        [[nodes]]
        count = 2
        [[nodes]]
        model.system_prompt = "be brief"
        trainer.learning_rate = 7e-5
        """
    )
    fast, slow = plan(read_assignments(["rollout.max_new_tokens=6"]), read_toml(file)).units
    assert settings(fast, "rollout.max_new_tokens") == [6, 6, 6]  # --set before the file
    assert settings(fast, "trainer.learning_rate") == [3e-5, 3e-5, 7e-5]  # a node of its own before the file
    assert settings(slow, "trainer.learning_rate") == [1e-5, 1e-5, 7e-5]  # and before the arm
    assert settings(fast, "model.system_prompt") == [None, None, "be brief"]
    [again] = plan(read_toml(file), nodes=["3.trainer.learning_rate=9e-5"], arms=["4/4"]).units
    assert settings(again, "trainer.learning_rate") == [3e-5, 3e-5, 9e-5]


def test_a_unit_is_the_same_after_it_has_been_sent_to_another_process():
    unit = plan(arms=["a=4/4+tasks.sources=products:2"], seeds=1, nodes=()).units[0]
    assert Unit.load(unit.dump()) == unit


@pytest.mark.parametrize(
    ("weaker", "nodes", "says"),
    [
        ({"experiment.sedes": 3}, (), "experiment.sedes: extra"),
        ({"experiment.seeds": 0}, (), "experiment.seeds: input should be greater"),
        ({"seed": 4}, (), "say how many with --seeds"),
        ({"trainer.learning_rte": 4}, (), "did you mean trainer.learning_rate"),
        ({"nodes": [{"count": 0}]}, (), "count = 0 is not a number of nodes"),
        ({"nodes": 3}, (), "write one"),
        ({"nodes": [{"count": 3}], "experiment.nodes": 4}, (), "3 nodes are described"),
        ({}, ["9.model.name=tiny"], "names node 9, and there are 8"),
        ({}, ["model.name=tiny"], "not of the form NODE.key=value"),
        ({}, ["1.model.nme=tiny"], "did you mean model.name"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(weaker, nodes, says):
    with pytest.raises(ConfigError, match=says) as caught:
        plan(Layer("a file", weaker), nodes=nodes)
    assert "\n" not in str(caught.value)
