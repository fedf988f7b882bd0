import pytest

from node.experiment.arms import parse_arms
from node.layers import ConfigError


def test_an_arm_says_how_many_groups_of_its_own_and_of_others_a_round_has():
    [silo, half] = parse_arms(["8/0, 4/4"])
    assert half.settings == {"sapo.num_local": 4, "sapo.num_external": 4}
    assert silo.settings == {"sapo.num_local": 8, "sapo.num_external": 0, "sapo.publish": "none"}
    assert [silo.name, half.name] == ["8/0", "4/4"]
    assert [silo.slug, half.slug] == ["8-0", "4-4"]


def test_a_named_arm_has_settings_of_its_own_which_win_over_what_follows_from_its_shape():
    [arm] = parse_arms(["giving=8/0+sapo.publish=all+trainer.learning_rate=1e-4"])
    assert arm.name == arm.slug == "giving"
    assert arm.settings["sapo.publish"] == "all"
    assert arm.settings["trainer.learning_rate"] == "1e-4"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "there is no arm"),
        ("4", "'4' is not an arm: write I/J"),
        ("4/-1", "is not an arm"),
        ("0/8", "asks no question of its own"),
        ("4/4,4/4", "two arms are called 4/4"),
        ("a=4/4+nothing", "not of the form key=value"),
        ("a=4/4+sapo.num_local=2", "sets sapo.num_local twice"),
    ],
)
def test_what_is_no_arm_is_refused_in_a_line_that_says_what_is_one(text, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_arms([text])
    assert "\n" not in str(caught.value)
