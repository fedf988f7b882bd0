"""Lists of numbers and strings, as Python or JSON writes them, from hostile text, without `eval`."""

import re
from typing import Final

__all__ = ["Literal", "NotALiteral", "parse_list"]

Literal = int | float | str | list["Literal"]

_TOKEN = re.compile(
    r"""\s*(?:(?P<open>[\[(])|(?P<close>[\])])|(?P<comma>,)"""
    r"""|(?P<number>[-+]?[0-9]+(?:\.[0-9]+)?)|(?P<string>'[^'\\\n]*'|"[^"\\\n]*"))"""
)
_PAIRS: Final = {"[": "]", "(": ")"}
_MAX_DEPTH: Final = 4
_MAX_NUMBER_CHARS: Final = 64


class NotALiteral(ValueError):
    """The text is not a list of numbers and strings."""


def parse_list(text: str) -> list[Literal]:
    """Return the (nested) list or tuple that `text` spells, or raise NotALiteral. Linear in its length."""
    stack: list[tuple[str, list[Literal]]] = []
    position, text = 0, text.rstrip()
    expect_value = True
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or (not stack and position > 0):
            raise NotALiteral(f"unexpected {text[position : position + 10]!r}")
        position = match.end()
        kind, token = match.lastgroup, match.group().strip()
        if kind == "open":
            if not expect_value or len(stack) == _MAX_DEPTH:
                raise NotALiteral("brackets that do not fit")
            stack.append((_PAIRS[token], []))
        elif not stack:
            raise NotALiteral("not a list")
        elif kind == "close":
            closing, items = stack.pop()
            if token != closing:
                raise NotALiteral("brackets that do not match")
            if not stack:
                if position != len(text):
                    raise NotALiteral("text after the list")
                return items
            stack[-1][1].append(items)
            expect_value = False
        elif kind == "comma":
            if expect_value:
                raise NotALiteral("a comma without a value")
            expect_value = True
        else:
            if not expect_value:
                raise NotALiteral("two values without a comma")
            stack[-1][1].append(token[1:-1] if kind == "string" else _number(token))
            expect_value = False
    raise NotALiteral("a list that is not closed")


def _number(token: str) -> int | float:
    if len(token) > _MAX_NUMBER_CHARS:
        raise NotALiteral("a number of very many digits")
    return float(token) if "." in token else int(token)
