"""Arithmetic and algebra from hostile text, without evaluating it as code.

A recursive-descent parser over numbers, names, + - * / ** and calls of one argument, with a bounded depth.
What the parts *are* is an algebra's affair: exact fractions for number games, sympy for integrals and
polynomials. It stands in for sympy's `parse_expr`, which hands the text to Python's `eval`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection
from fractions import Fraction
from typing import Any, Final, Generic, TypeVar

__all__ = ["Algebra", "Fractions", "NotAnExpression", "SympyAlgebra", "parse_expression"]

Value = TypeVar("Value")

_TOKEN = re.compile(r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))|(?P<name>[A-Za-z_]\w*)|(?P<op>\*\*|[-+*/()]))")
_MAX_DEPTH: Final = 64
_MAX_NUMBER_CHARS: Final = 64
_MAX_EXPONENT: Final = 1000
_MAX_POWER_BITS: Final = 20_000


class NotAnExpression(ValueError):
    """The text is not an expression, or a larger one than anybody means."""


class Algebra(ABC, Generic[Value]):
    """What the numbers, names and operators of an expression mean."""

    @abstractmethod
    def number(self, text: str) -> Value:
        """Return the value of a literal."""

    @abstractmethod
    def name(self, text: str) -> Value:
        """Return the value of a name, or raise NotAnExpression."""

    @abstractmethod
    def call(self, function: str, argument: Value) -> Value:
        """Return function(argument), or raise NotAnExpression."""

    @abstractmethod
    def power(self, base: Value, exponent: Value) -> Value:
        """Return base ** exponent, or raise NotAnExpression where it would be huge."""

    @abstractmethod
    def divide(self, left: Value, right: Value) -> Value:
        """Return left / right, or raise NotAnExpression."""


class Fractions(Algebra[Fraction]):
    """Exact rational arithmetic with the four operations."""

    def number(self, text: str) -> Fraction:
        """Return the literal, exactly."""
        return Fraction(text)

    def name(self, text: str) -> Fraction:
        """Refuse: there are no names in a number game."""
        raise NotAnExpression(f"a name: {text}")

    def call(self, function: str, argument: Fraction) -> Fraction:
        """Refuse: there are no functions in a number game."""
        raise NotAnExpression(f"a call: {function}")

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        """Refuse: powers would let any number be made of few digits."""
        raise NotAnExpression("a power")

    def divide(self, left: Fraction, right: Fraction) -> Fraction:
        """Return the exact quotient."""
        if right == 0:
            raise NotAnExpression("division by zero")
        return left / right


class SympyAlgebra(Algebra[Any]):
    """Sympy expressions over the given symbols, the usual functions, pi and E."""

    FUNCTIONS: Final = frozenset(
        "sin cos tan cot sec csc asin acos atan sinh cosh tanh asinh acosh atanh exp log ln sqrt Abs".split()
    )

    def __init__(self, symbols: Collection[str]) -> None:
        import sympy

        self._sympy = sympy
        self._names = {name: sympy.Symbol(name) for name in symbols}
        self._names.setdefault("pi", sympy.pi)
        self._names.setdefault("E", sympy.E)

    def number(self, text: str) -> Any:
        """Return an Integer, or a Float as `parse_expr` would."""
        return self._sympy.Float(text) if "." in text else self._sympy.Integer(int(text))

    def name(self, text: str) -> Any:
        """Return a symbol or constant."""
        if text not in self._names:
            raise NotAnExpression(f"an unknown name: {text}")
        return self._names[text]

    def call(self, function: str, argument: Any) -> Any:
        """Apply one of FUNCTIONS."""
        if function not in self.FUNCTIONS:
            raise NotAnExpression(f"an unknown function: {function}")
        return getattr(self._sympy, function)(argument)

    def power(self, base: Any, exponent: Any) -> Any:
        """Return the power, unless it would be a number of thousands of digits."""
        if exponent.is_number:
            size = abs(exponent.evalf(10))
            if not size.is_comparable or size > _MAX_EXPONENT:
                raise NotAnExpression("a large exponent")
            if base.is_Rational and size * max(base.p.bit_length(), base.q.bit_length()) > _MAX_POWER_BITS:
                raise NotAnExpression("a large power")
        return base**exponent

    def divide(self, left: Any, right: Any) -> Any:
        """Return the quotient."""
        if right == 0:
            raise NotAnExpression("division by zero")
        return left / right


class _Parser(Generic[Value]):
    """One pass over the tokens of one expression."""

    def __init__(self, text: str, algebra: Algebra[Value]) -> None:
        self._tokens = _tokens(text)
        self._position = 0
        self._depth = 0
        self._algebra = algebra

    def parse(self) -> Value:
        """Return the value of the whole text."""
        value = self._sum()
        if self._position != len(self._tokens):
            raise NotAnExpression(f"unexpected {self._tokens[self._position][1]!r}")
        return value

    def _take(self, *operators: str) -> str | None:
        """Consume and return the next token if it is one of these operators."""
        if self._position < len(self._tokens):
            kind, text = self._tokens[self._position]
            if kind == "op" and text in operators:
                self._position += 1
                return text
        return None

    def _sum(self) -> Value:
        value: Any = self._product()
        while operator := self._take("+", "-"):
            right: Any = self._product()
            value = value + right if operator == "+" else value - right
        return value  # type: ignore[no-any-return]

    def _product(self) -> Value:
        value: Any = self._signed()
        while operator := self._take("*", "/"):
            right: Any = self._signed()
            value = value * right if operator == "*" else self._algebra.divide(value, right)
        return value  # type: ignore[no-any-return]

    def _signed(self) -> Value:
        negative = False
        while operator := self._take("+", "-"):
            negative ^= operator == "-"
        value: Any = self._power()
        return -value if negative else value  # type: ignore[no-any-return]

    def _power(self) -> Value:
        base = self._atom()
        if self._take("**"):
            self._enter()
            base = self._algebra.power(base, self._signed())
            self._depth -= 1
        return base

    def _atom(self) -> Value:
        if self._take("("):
            return self._parenthesis()
        if self._position == len(self._tokens):
            raise NotAnExpression("it ends too early")
        kind, text = self._tokens[self._position]
        self._position += 1
        if kind == "number":
            if len(text) > _MAX_NUMBER_CHARS:
                raise NotAnExpression("a number of very many digits")
            return self._algebra.number(text)
        if kind == "name":
            return self._algebra.call(text, self._parenthesis()) if self._take("(") else self._algebra.name(text)
        raise NotAnExpression(f"unexpected {text!r}")

    def _parenthesis(self) -> Value:
        self._enter()
        value = self._sum()
        self._depth -= 1
        if not self._take(")"):
            raise NotAnExpression("a parenthesis that is not closed")
        return value

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise NotAnExpression("too many nested parts")


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise NotAnExpression(f"unexpected {text[position : position + 10]!r}")
        tokens.append((match.lastgroup, match.group(match.lastgroup)))
        position = match.end()
    return tokens


def parse_expression(text: str, algebra: Algebra[Value]) -> Value:
    """Return the value of `text`, or raise NotAnExpression."""
    return _Parser(text, algebra).parse()
