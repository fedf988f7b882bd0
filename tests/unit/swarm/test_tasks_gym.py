import pytest

from swarm.tasks.gym import ReasoningGymSource, canonical_config
from swarm.tasks.gym_safety import PRESAMPLED, REPLACED, SAFE
from swarm.tasks.gym_scorers import REPLACEMENTS

NO_TEXT_ANSWER = {"propositional_logic", "boxnet", "graph_color", "rubiks_cube", "rush_hour"}
USABLE = sorted(SAFE | set(REPLACED))


@pytest.mark.parametrize("name", sorted({"products", "word_sorting", *PRESAMPLED}))
def test_an_item_depends_on_seed_and_index_only(name):
    first, second = ReasoningGymSource(name, {}), ReasoningGymSource(name, {})
    forward = [first.question(3, index) for index in (0, 1, 511, 512, 2**31 - 1)]
    backward = [second.question(3, index) for index in (2**31 - 1, 512, 511, 1, 0)]
    assert forward == backward[::-1]
    assert len({*forward, *(first.question(4, index) for index in range(5))}) > 5


@pytest.mark.parametrize("name", USABLE)
def test_the_right_answer_is_right_twice_and_junk_is_not(name):
    source = ReasoningGymSource(name, {})
    answer = source._entry(11, 4)["answer"]
    if name not in NO_TEXT_ANSWER:
        assert source.score(11, 4, answer) >= 1.0
        assert source.score(11, 4, answer) >= 1.0
    try:
        junk = source.score(11, 4, "zzz")
    except Exception:
        return  # the scoring process counts it
    assert junk < 1.0


@pytest.mark.parametrize("name", USABLE)
def test_making_an_item_prints_nothing(name, capfd):
    ReasoningGymSource(name, {}).question(5, 1)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", sorted(REPLACEMENTS))
def test_replacements_agree_with_the_originals_on_the_right_answers(name):
    source = ReasoningGymSource(name, {})
    for index in range(5):
        entry = source._entry(2, index)
        original = source._dataset_of(2, index)[0].score_answer(entry["answer"], entry)
        assert source.score(2, index, entry["answer"]) == original == 1.0


@pytest.mark.parametrize(
    ("name", "spell"),
    [
        ("binary_matrix", lambda answer: str([[int(cell) for cell in row.split()] for row in answer.split("\n")])),
        ("n_queens", lambda answer: str([row.split() for row in answer.split("\n")])),
        ("spiral_matrix", lambda answer: str([int(cell) for cell in answer.split()])),
        ("string_insertion", lambda answer: str(list(answer))),
    ],
)
def test_replacements_keep_the_partial_credit_for_python_lists(name, spell):
    source = ReasoningGymSource(name, {})
    entry = source._entry(2, 0)
    listed = spell(entry["answer"])
    original = source._dataset_of(2, 0)[0].score_answer(listed, entry)
    assert 0 < original < 1
    assert source.score(2, 0, listed) == original


def test_replacements_do_not_repeat_known_faults():
    halting = ReasoningGymSource("game_of_life_halting", {})
    right = halting._entry(0, 0)["answer"]
    assert halting.score(0, 0, "False" if right == "True" else "True") == 0.0  # the original takes any text
    assert ReasoningGymSource("complex_arithmetic", {}).score(0, 0, "nan") == 0.0  # 1 by the original
    game = ReasoningGymSource("puzzle24", {})
    assert game.score(0, 0, "7 * 7 / 2 + 0 / 1") < 1  # 24.5, which the original rounds to 24


def test_settings_have_one_spelling():
    assert canonical_config({"b": (1, 2), "a": {3, 1}}) == '{"a":[1,3],"b":[1,2]}'
