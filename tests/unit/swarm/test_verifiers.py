import pytest

from swarm.tasks.verifiers import VERIFIERS, parse_number


def judge(verifier, given, **line):
    return VERIFIERS[verifier](given, {"verifier": verifier, **line})


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("Paris", "paris", True),
        (" New   York.", "new york", True),
        ("\uff21", "a", True),
        ("Paris, France", "Paris", False),
        ("", "x", False),
    ],
)
def test_exact(given, wanted, right):
    assert judge("exact", given, answer=wanted) is right


@pytest.mark.parametrize(
    ("given", "wanted", "tolerance", "right"),
    [
        ("42", "42", 0, True),
        ("+042.0", "42", 0, True),
        ("1,234.5", "1234.5", 0, True),
        ("$3", "3", 0, True),
        ("50%", "0.5", 0, True),
        ("1/3", "2/6", 0, True),
        ("1e3", "1000", 0, True),
        ("\u22123", "-3", 0, True),
        ("3.14", "3.14159", 0, False),
        ("3.14", "3.14159", 0.01, True),
        ("0.1", "0.3", 0.2, True),
        ("12", "1", 0, False),
        ("nan", "1", 0, False),
        ("inf", "1", 0, False),
        ("1/0", "1", 0, False),
        ("1e99999999", "1", 0, False),
        ("9" * 5000, "1", 0, False),
        ("0x10", "16", 0, False),
        ("", "0", 0, False),
    ],
)
def test_number(given, wanted, tolerance, right):
    assert judge("number", given, answer=wanted, tolerance=tolerance) is right


def test_numbers_are_exact():
    assert parse_number("0.1") * 3 == parse_number("0.3")
    assert parse_number("10000000000000000000001") != parse_number("10000000000000000000000")


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        (r"\frac{1}{2}", "0.5", True),
        ("1/2", r"\frac{1}{2}", True),
        ("(x+1)**2", "x**2 + 2*x + 1", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("2/3", "1/2", False),
        ("__import__('os').system('touch pwned')", "1/2", False),
        ("", "1", False),
    ],
)
def test_math(given, wanted, right):
    assert judge("math", given, answer=wanted) is right


@pytest.mark.parametrize(("given", "right"), [("ab", True), (" aab\n", True), ("abc", False), ("xab", False)])
def test_regex_matches_the_whole_answer(given, right):
    assert judge("regex", given, answer="a+b") is right


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("B", True),
        ("(b)", True),
        ("B.", True),
        ("b) green", True),
        ("Green", True),
        ("A", False),
        ("red", False),
        ("D", False),
        ("but not A", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("wanted", ["B", "green"])
def test_choice(given, right, wanted):
    assert judge("choice", given, answer=wanted, choices=["red", "green", "blue"]) is right
