"""The verifiers of JSONL tasks: is an extracted answer right? Every one returns 0 or 1.

    exact   equal after case, white space and a final full stop are normalised
    number  equal as numbers, within `tolerance` (absolute; 0 by default)
    math    equal as mathematics, by math-verify
    regex   the whole answer matches the pattern that the file gives
    choice  the letter of the right choice, or its text

The file is trusted, the answer is hostile. What cannot be bounded here (a pattern that backtracks for ever,
algebra that explodes) is bounded by the limits of the scoring process.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, Final

from swarm.tasks.expressions import NotAnExpression, SympyAlgebra, parse_expression

__all__ = ["VERIFIERS", "Verifier", "load_math_verify", "normalize", "parse_number"]

Verifier = Callable[[str, Mapping[str, Any]], bool]  # answer, the line of the file

_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\$?(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.(?P<decimals>[0-9]*))?"
    r"(?:[eE](?P<exponent>[-+]?[0-9]{1,4}))?(?:/(?P<divisor>[0-9]+))?(?P<percent>%?)"
)
_MAX_NUMBER_CHARS: Final = 1000
_CHOICE_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:)]?(?=\s|$)")


def normalize(text: str) -> str:
    """Return text with case, width, runs of white space and a final full stop made equal."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.removesuffix(".").rstrip()


def parse_number(text: str) -> Fraction | None:
    """Return the number that `text` spells: sign, thousands commas, decimals, exponent, fraction, percent."""
    text = text.strip().replace("\u2212", "-").removesuffix(".")
    match = _NUMBER.fullmatch(text) if len(text) <= _MAX_NUMBER_CHARS else None
    if match is None:
        return None
    whole, decimals = match["whole"].replace(",", ""), match["decimals"] or ""
    if not whole + decimals:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["divisor"]:
        if int(match["divisor"]) == 0:
            return None
        value /= int(match["divisor"])
    if match["percent"]:
        value /= 100
    return -value if match["sign"] == "-" else value


def load_math_verify() -> Any:
    """Import math-verify, before the sandbox closes."""
    import math_verify

    return math_verify


def _exact(answer: str, line: Mapping[str, Any]) -> bool:
    return normalize(answer) == normalize(line["answer"])


def _number(answer: str, line: Mapping[str, Any]) -> bool:
    given, wanted = parse_number(answer), parse_number(line["answer"])
    if given is None or wanted is None:
        return False
    return abs(given - wanted) <= Fraction(str(line.get("tolerance", 0)))


def _plain_algebra(text: str) -> Any:
    """Return what plain algebra such as 2*x^2 says, or None where it is not that."""
    try:
        return parse_expression(text.replace("^", "**"), SympyAlgebra(set(re.findall(r"\b[A-Za-z]\b", text))))
    except NotAnExpression:
        return None


def _latex(text: str) -> list[Any]:
    """Return what math-verify reads in LaTeX. Its reader of plain algebra is not used: that one evaluates text."""
    math_verify = load_math_verify()
    stripped = text.strip().strip("$").strip()
    parsed: list[Any] = math_verify.parse(
        f"${stripped}$", extraction_config=[math_verify.LatexExtractionConfig()], parsing_timeout=None
    )
    return parsed


def _math(answer: str, line: Mapping[str, Any]) -> bool:
    if normalize(answer) == normalize(line["answer"]):
        return True
    import sympy

    plain = [_plain_algebra(text) for text in (line["answer"], answer)]
    if all(value is not None for value in plain):
        wanted, given = [plain[0]], [plain[1]]
    else:  # both through LaTeX, because its symbols are others than those of plain algebra
        texts = [
            text if value is None else sympy.latex(value)
            for text, value in zip((line["answer"], answer), plain, strict=True)
        ]
        wanted, given = _latex(texts[0]), _latex(texts[1])
    return bool(load_math_verify().verify(wanted, given, timeout_seconds=None))


def _regex(answer: str, line: Mapping[str, Any]) -> bool:
    return re.fullmatch(line["answer"], answer.strip()) is not None


def _choice(answer: str, line: Mapping[str, Any]) -> bool:
    choices = [normalize(choice) for choice in line["choices"]]
    right = _choice_index(line["answer"], choices)
    return right is not None and _choice_index(answer, choices) == right


def _choice_index(text: str, choices: list[str]) -> int | None:
    """Return which choice a text names: by its text, or by its letter as in "B", "(b)" or "B. because"."""
    if normalize(text) in choices:
        return choices.index(normalize(text))
    match = _CHOICE_LETTER.match(text.strip())
    if match is None:
        return None
    index = ord(match[1].upper()) - ord("A")
    follows = normalize(text.strip()[match.end() :])
    is_named = index < len(choices) and (not follows or follows == choices[index] or match.group()[-1] in ".:)")
    return index if is_named else None


VERIFIERS: Final[Mapping[str, Verifier]] = {
    "exact": _exact,
    "number": _number,
    "math": _math,
    "regex": _regex,
    "choice": _choice,
}
