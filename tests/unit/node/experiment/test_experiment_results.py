"""From the rows of nodes to the table, over real files."""

import json

import pytest

from node.experiment.figures import smoothed
from node.experiment.plan import make_plan
from node.experiment.record import read_unit, refuse_other_unit, unit_path, write_unit
from node.experiment.report import write_report
from node.experiment.results import write_plan
from node.layers import Layer
from node.run_folder import RunFolderError
from swarm.errors import UserError

ROUNDS = 6


def plan(**changes):
    settings = {
        "experiment.arms": ["8/0", "4/4"],
        "experiment.seeds": 3,
        "experiment.nodes": 2,
        "rounds": ROUNDS,
        **changes,
    }
    return make_plan([Layer("test", settings)], {})


def rows(unit, number):
    """A node that earns more with others, and in some seeds more than in others."""
    reward = 0.1 * unit.seed + (0.2 if unit.arm == "4/4" else 0.0)
    num_external = unit.configs[number].sapo.num_external
    before = {"gym/sums": 0.1, "gym/words": 0.1}
    by_source = {"gym/sums": reward, "gym/words": 2 * reward}
    return [
        {
            "round": index,
            "reward_mean": reward,
            "num_groups": 8 - num_external,
            "num_groups_zero_advantage": 2,
            "num_local": 8 - num_external,
            "num_external": num_external,
            "num_external_missing": 0,
            "num_tokens_generated": 100,
            "num_completions": 64,
            "num_refused": {"duplicate": 1},
            "bytes_in": 10,
            "bytes_out": 20,
            "cpu_so_far_s": 0.5 * index,
            "wall_so_far_s": 0.75 * index,
            **({"pass_at_1_heldout_before": 0.1, "pass_at_1_heldout_before_by_source": before} if index == 1 else {}),
            **({"pass_at_1_heldout": reward, "pass_at_1_heldout_by_source": by_source} if index == ROUNDS else {}),
        }
        for index in range(1, ROUNDS + 1)
    ]


def write(folder, of, units=None):
    write_plan(folder, of, "memory")
    for unit in of.units if units is None else units:
        nodes = [rows(unit, number) for number in range(len(unit.configs))]
        write_unit(unit_path(folder, unit), unit, "memory", nodes, wall_s=3.0, cpu_s=2.0)


def test_a_unit_comes_back_as_columns(tmp_path):
    unit = plan().units[1]
    write(tmp_path, plan(), [unit])
    found = read_unit(unit_path(tmp_path, unit))
    assert (found.arm, found.seed, found.mode) == ("4/4", 1, "memory")
    node = found.nodes[0]
    assert node.columns["reward_mean"] == [pytest.approx(0.3)] * ROUNDS
    assert node.columns["cpu_s"] == [0.5] * ROUNDS
    assert node.columns["wall_s"] == [0.75] * ROUNDS
    assert node.heldout == [(0, 0.1), (ROUNDS, pytest.approx(0.3))]
    assert node.num_refused == {"duplicate": ROUNDS}
    assert found.settings["sapo.num_external"] == 4
    assert node.settings == {"seed": 1001}
    assert node.heldout_before_by_source == {"gym/sums": 0.1, "gym/words": 0.1}
    assert node.heldout_after_by_source["gym/words"] == pytest.approx(0.6)


def test_the_table_has_every_arm_and_each_against_the_baselines(tmp_path):
    write(tmp_path, plan())
    found = write_report(tmp_path)
    silo, half = found["arms"]
    assert found["baselines"] == ["8/0", "4/4"]
    assert silo["measures"]["reward_cumulative"]["per_seed"] == pytest.approx([0.6, 1.2, 1.8])
    against = half["against"]["8/0"]["reward_cumulative"]
    assert against["difference"]["low"] == pytest.approx(against["difference"]["mean"]) == pytest.approx(1.2)
    assert against["ratio"]["mean"] == pytest.approx(2.0)
    text = (tmp_path / "results.md").read_text()
    assert "| 8/0 | 1.2 (0.6 to 1.8) |" in text
    assert "| 4/4 | +100.0 (+66.7 to +200.0) % |" in text
    assert "| 8/0 | 0.6, 0.100 | 1.2, 0.200 | 1.8, 0.300 |" in text
    assert json.loads((tmp_path / "results.json").read_text()) == found
    for name in ("reward", "heldout", "cumulative"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nodes_that_differ_have_a_table_of_their_own(tmp_path):
    mixed = plan(nodes=[{"model.name": "tiny"}, {"model.name": "some/other"}], **{"experiment.nodes": 2})
    write(tmp_path, mixed)
    assert [node["model"] for node in write_report(tmp_path)["arms"][0]["nodes"]] == ["tiny", "some/other"]
    text = (tmp_path / "results.md").read_text()
    assert "| I/J | node | cumulative reward | sums | words |" in text
    assert "| 4/4 | 2, other | 2.4 | 0.100 to 0.400 | 0.100 to 0.800 |" in text
    (tmp_path / "alike").mkdir()
    write(tmp_path / "alike", plan())
    write_report(tmp_path / "alike")
    assert "Each node" not in (tmp_path / "alike/results.md").read_text()
    assert (tmp_path / "skills.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "alike/skills.png").exists()


def test_curves_of_some_arms_can_be_drawn_and_the_tables_have_all(tmp_path):
    write(tmp_path, plan())
    write_report(tmp_path)
    all_arms = {name: (tmp_path / name).read_bytes() for name in ("reward.png", "cumulative.png", "results.md")}
    write_report(tmp_path, ["4/4"])
    some = {name: (tmp_path / name).read_bytes() for name in all_arms}
    assert some["results.md"] == all_arms["results.md"]
    assert some["cumulative.png"] == all_arms["cumulative.png"]
    assert some["reward.png"] != all_arms["reward.png"]
    with pytest.raises(UserError, match="has no finished unit of arm 3/5; it has 8/0, 4/4"):
        write_report(tmp_path, ["4/4", "3/5"])


def test_arms_are_compared_over_the_seeds_that_both_have(tmp_path):
    whole = plan()
    write(tmp_path, whole, [unit for unit in whole.units if unit.arm == "4/4" or unit.seed == 2])
    silo, half = write_report(tmp_path)["arms"]
    assert "| 8/0 |  | 1.2, 0.200 |  |" in (tmp_path / "results.md").read_text()
    assert silo["seeds"] == [2]
    assert half["seeds"] == [1, 2, 3]
    assert half["against"]["8/0"]["reward_cumulative"]["difference"]["per_seed"] == pytest.approx([1.2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainer.learning_rate": 1e-3}, "trainer.learning_rate = 0.0002, not 0.001"),
        ({"experiment.nodes": 3}, "number of nodes = 2, not 3"),
        ({"experiment.round_s": 30.0}, "experiment.round_s = 15.0, not 30.0"),
        ({"rounds": 7}, "rounds = 6, not 7"),
    ],
)
def test_a_unit_of_other_settings_is_refused_by_the_first_that_differs(tmp_path, changes, says):
    write(tmp_path, plan())
    before, now = plan().units[0], plan(**changes).units[0]
    path = unit_path(tmp_path, before)
    refuse_other_unit(path, before, "memory")
    with pytest.raises(UserError, match=says):
        refuse_other_unit(path, now, "memory")


def test_what_processes_did_is_not_mixed_with_a_simulation(tmp_path):
    write(tmp_path, plan())
    unit = plan().units[0]
    with pytest.raises(UserError, match="--real = false, not true"):
        refuse_other_unit(unit_path(tmp_path, unit), unit, "real")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 9}', '{"schema_version": 1, "nodes": [{}]}'])
def test_a_file_that_is_no_unit_is_named(tmp_path, text):
    path = tmp_path / "unit.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match="is no unit of an experiment"):
        read_unit(path)


def test_nothing_finished_is_nothing_to_draw(tmp_path):
    write_plan(tmp_path, plan(), "memory")
    with pytest.raises(RunFolderError, match="no unit of the experiment"):
        write_report(tmp_path)


def test_a_curve_is_smoothed_by_as_many_values_as_there_are_on_both_sides():
    assert smoothed([1.0, 2.0, 6.0, 3.0], 3).tolist() == [1.5, 3.0, pytest.approx(11 / 3), 4.5]
    assert smoothed([1.0, 2.0], 1).tolist() == [1.0, 2.0]
