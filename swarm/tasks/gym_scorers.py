"""Safe equivalents of the reasoning-gym scorers that evaluate what they are given (`gym_safety.REPLACED`).

Each gives what the original gives for answers in the asked-for form, partial credit included, and 0 (or the
original's floor) for text that only `eval` could have read.
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final

from swarm.tasks.expressions import Fractions, NotAnExpression, SympyAlgebra, parse_expression
from swarm.tasks.literals import Literal, NotALiteral, parse_list

__all__ = ["REPLACEMENTS", "Scorer"]

Scorer = Callable[[str, dict[str, Any], Any], float]  # answer, entry, config of the dataset

_BASE_LITERAL = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|[0-9]+)")


def _rows(value: list[Literal]) -> str:
    """Spell a list of rows as reasoning-gym does: cells by blanks, rows by line breaks."""
    if not all(isinstance(row, list | str) for row in value):
        raise NotALiteral("a row that is not a list")
    return "\n".join(" ".join(str(cell) for cell in row) for row in value if isinstance(row, list | str))


def _binary_matrix(answer: str, entry: dict[str, Any], config: Any) -> float:
    if answer == entry["answer"]:
        return 1.0
    try:
        return 0.1 if _rows(parse_list(answer)) == entry["answer"] else 0.0
    except NotALiteral:
        return 0.0


def _n_queens(answer: str, entry: dict[str, Any], config: Any) -> float:
    solutions = entry["metadata"]["valid_answers"]
    if answer in solutions:
        return 1.0
    try:
        return 0.5 if _rows(parse_list(answer)) in solutions else 0.0
    except NotALiteral:
        return 0.0


def _spiral_matrix(answer: str, entry: dict[str, Any], config: Any) -> float:
    answer, oracle = answer.strip(), entry["answer"].strip()
    if answer == oracle:
        return 1.0
    try:
        return 0.1 if " ".join(str(item) for item in parse_list(answer)) == oracle else 0.0
    except NotALiteral:
        return 0.0


def _string_insertion(answer: str, entry: dict[str, Any], config: Any) -> float:
    if answer == entry["answer"]:
        return 1.0
    try:
        items = parse_list(answer)
    except NotALiteral:
        return 0.0
    texts = [item for item in items if isinstance(item, str)]
    return 0.1 if len(texts) == len(items) and "".join(texts) == entry["answer"] else 0.0


def _bitwise_arithmetic(answer: str, entry: dict[str, Any], config: Any) -> float:
    if not _BASE_LITERAL.fullmatch(answer.strip()):
        return 0.0
    try:
        return 1.0 if int(answer.strip(), 0) == int(entry["answer"], 16) else 0.0
    except ValueError:
        return 0.0


def _number_sorting(answer: str, entry: dict[str, Any], config: Any) -> float:
    try:
        given = [float(number) for number in parse_list(answer) if not isinstance(number, list)]
        wanted = [float(number) for number in parse_list(entry["answer"]) if not isinstance(number, list)]
    except ValueError:
        return 0.0
    is_descending = entry["metadata"]["direction"] != "ascending"
    is_right = (
        len(given) == len(wanted)
        and given == sorted(given, reverse=is_descending)
        and all(abs(left - right) <= 1 for left, right in zip(given, wanted, strict=True))
    )
    return 1.0 if is_right else 0.0


def _countdown(answer: str, entry: dict[str, Any], config: Any) -> float:
    if not answer.strip():
        return 0.01
    try:
        value = parse_expression(answer, Fractions())
    except NotAnExpression:
        return 0.01
    if sorted(int(number) for number in re.findall(r"[0-9]+", answer)) != sorted(entry["metadata"]["numbers"]):
        return 0.05
    return 1.0 if value == entry["metadata"]["target"] else 0.05


def _puzzle24(answer: str, entry: dict[str, Any], config: Any) -> float:
    try:
        value = parse_expression(answer.strip(), Fractions())
    except NotAnExpression:
        return 0.01
    numbers = [int(number) for number in re.findall(r"\b[0-9]+\b", answer)]
    are_allowed = len(numbers) == 4 and all(config.min_value <= number <= config.max_value for number in numbers)
    return 1.0 if are_allowed and value == Fraction(24) else 0.01


def _integral(answer: str, entry: dict[str, Any], config: Any) -> float:
    import sympy

    variable = entry["metadata"]["variable"]
    algebra = SympyAlgebra({variable, "C"})
    try:
        derivative = sympy.diff(parse_expression(answer, algebra), sympy.Symbol(variable))
    except NotAnExpression:
        return 0.0
    integrand = parse_expression(str(entry["metadata"]["integrand"]), algebra)
    return 1.0 if sympy.simplify(derivative - integrand) == 0 else 0.0


def _complex_arithmetic(answer: str, entry: dict[str, Any], config: Any) -> float:
    from reasoning_gym.algebra.complex_arithmetic import ComplexArithmeticDataset

    try:
        distance = abs(ComplexArithmeticDataset.parse_string_to_complex(answer) - complex(*entry["metadata"]["result"]))
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return math.exp(-distance) if math.isfinite(distance) else 0.0


def _game_of_life_halting(answer: str, entry: dict[str, Any], config: Any) -> float:
    return 1.0 if answer.strip().lower() == str(entry["answer"]).lower() else 0.0


REPLACEMENTS: Final[Mapping[str, Scorer]] = {
    "binary_matrix": _binary_matrix,
    "bitwise_arithmetic": _bitwise_arithmetic,
    "complex_arithmetic": _complex_arithmetic,
    "countdown": _countdown,
    "game_of_life_halting": _game_of_life_halting,
    "intermediate_integration": _integral,
    "n_queens": _n_queens,
    "number_sorting": _number_sorting,
    "puzzle24": _puzzle24,
    "simple_integration": _integral,
    "spiral_matrix": _spiral_matrix,
    "string_insertion": _string_insertion,
}
