from fractions import Fraction

import pytest
import sympy

from swarm.tasks.expressions import Fractions, NotAnExpression, SympyAlgebra, parse_expression
from swarm.tasks.literals import NotALiteral, parse_list

HOSTILE = [
    "__import__('os').system('touch pwned')",
    "open('pwned', 'w')",
    "[x for x in range(10**9)]",
    "(lambda: 1)()",
    "().__class__.__bases__[0]",
    "exec('1')",
    "[" * 10_000,
    "(" * 10_000 + "1" + ")" * 10_000,
    "1 if 1 else 2",
    "x := 1",
    "\x00",
    "9" * 5000,
]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1 + 2 * 3", 7), ("(1+2)*3", 9), ("-4 - -4", 0), ("1/3 + 1/6", Fraction(1, 2)), ("2*(3-.5)", 5), ("8/2/2", 2)],
)
def test_arithmetic_is_exact(text, value):
    assert parse_expression(text, Fractions()) == value


@pytest.mark.parametrize("text", [*HOSTILE, "", "1 +", "1 2", "2**3", "1/0", "x", "sin(1)", "(1", "1)", "4!"])
def test_what_is_not_arithmetic_is_refused(text):
    with pytest.raises(NotAnExpression):
        parse_expression(text, Fractions())


@pytest.mark.parametrize(
    "text", ["-x**2 + 3*x/2 - C", "x**-2", "2**3**2", "exp(-x)*sin(2*x)", "sqrt(x)/pi", "-(x+1)**2", "log(x)**2 + 1.5"]
)
def test_algebra_reads_as_sympy_does(text):
    x, c = sympy.Symbol("x"), sympy.Symbol("C")
    assert parse_expression(text, SympyAlgebra({"x", "C"})) == sympy.parse_expr(text, local_dict={"x": x, "C": c})


@pytest.mark.parametrize(
    "text", [*HOSTILE, "y", "9**9**9", "x**(10**9)", "2**100000", "system(x)", "x/0", "lambdify(x)"]
)
def test_what_is_not_algebra_is_refused(text):
    with pytest.raises(NotAnExpression):
        parse_expression(text, SympyAlgebra({"x"}))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[0, 1], [1, -2]]", [[0, 1], [1, -2]]),
        ("(1, 2,)", [1, 2]),
        ("['a', \"b'c\"]", ["a", "b'c"]),
        ("[]", []),
        (" [1.5, [2]] ", [1.5, [2]]),
    ],
)
def test_lists_are_read(text, value):
    assert parse_list(text) == value


@pytest.mark.parametrize(
    "text", [*HOSTILE, "", "1", "[1", "[1)", "[1 2]", "[,]", "[1]]", "[1] [2]", "['a' * 9]", "'a'"]
)
def test_what_is_not_a_list_is_refused(text):
    with pytest.raises(NotALiteral):
        parse_list(text)
