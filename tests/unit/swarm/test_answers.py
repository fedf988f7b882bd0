import time

import pytest

from swarm.tasks.answers import extract_answer

TAG, BOXED, NUMBER, WHOLE = ("answer_tag",), ("boxed",), ("last_number",), ("whole_text",)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>4</answer>", "4"),
        ("<answer>1</answer> no: <answer> 2 \n</answer>.", "2"),
        ("<answer>a<answer>b</answer>", "b"),
        ("<answer></answer>", ""),
        ("<answer>never closed", None),
        ("</answer>3<answer>", None),
        ("plain 4", None),
    ],
)
def test_answer_tag(text, answer):
    assert extract_answer(text, TAG) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"{\boxed{x}", "x"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a} {not this}", "a"),
        (r"boxed{4}", None),
    ],
)
def test_boxed(text, answer):
    assert extract_answer(text, BOXED) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7", "7"),
        ("the answer is -12.", "-12"),
        ("it is 1,234,567.50!", "1234567.50"),
        ("5-3", "3"),
        ("(2)-3", "3"),
        ("x = \u22123", "-3"),
        ("1e3", "1e3"),
        ("about .5", ".5"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("\u0663", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert extract_answer(text, NUMBER) == answer


def test_the_first_rule_that_finds_an_answer_counts():
    rules = ("answer_tag", "boxed", "last_number", "whole_text")
    assert extract_answer(r"<answer>1</answer> \boxed{2} 3", rules) == "1"
    assert extract_answer(r"\boxed{2} 3", rules) == "2"
    assert extract_answer("a 3 b", rules) == "3"
    assert extract_answer(" yes\n", rules) == "yes"
    assert extract_answer(" \n", rules) is None
    assert extract_answer("yes", WHOLE) == "yes"


@pytest.mark.parametrize("piece", ["<answer>", "</answer>", "\\boxed{", "{", "}", "1,", "1e", "-", "9", ".", "\\"])
def test_hostile_text_takes_linear_time(piece):
    began_s = time.process_time()
    for rules in (TAG, BOXED, NUMBER, WHOLE):
        extract_answer(piece * 100_000, rules)
    assert time.process_time() - began_s < 5
