r"""Where the answer stands in a completion. The one place that decides it, for own and for external text.

Reads hostile text: every rule is linear in the length of the completion, and none of them evaluates it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

__all__ = ["extract_answer"]

_OPEN_TAG: Final = "<answer>"
_CLOSE_TAG: Final = "</answer>"
_BOXED = re.compile(r"\\boxed[ ]?\{|[{}]|\\.", re.DOTALL)
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+\u2212])?"  # a sign, unless it subtracts from what stands before it
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![\w.])(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+(?![\w]))?"
)


def _answer_tag(text: str) -> str | None:
    """Return what stands in the last <answer>…</answer>."""
    end = text.rfind(_CLOSE_TAG)
    start = text.rfind(_OPEN_TAG, 0, end) if end >= 0 else -1
    return text[start + len(_OPEN_TAG) : end].strip() if start >= 0 else None


def _boxed(text: str) -> str | None:
    r"""Return what stands in the last \boxed{…} whose braces balance; escaped braces do not count."""
    open_braces: list[int] = []  # where the content of each open brace starts; -1: not of a \boxed
    best_start, best_end = -1, -1
    for match in _BOXED.finditer(text):
        token = match.group()
        if token == "{":
            open_braces.append(-1)
        elif token == "}":
            start = open_braces.pop() if open_braces else -1
            if start > best_start:
                best_start, best_end = start, match.start()
        elif token.startswith("\\boxed"):
            open_braces.append(match.end())
    return text[best_start:best_end].strip() if best_start >= 0 else None


def _last_number(text: str) -> str | None:
    """Return the last number, without its thousands separators and with an ASCII sign."""
    last = None
    for match in _NUMBER.finditer(text):
        last = match.group()
    return last.replace(",", "").replace("\u2212", "-") if last is not None else None


def _whole_text(text: str) -> str | None:
    """Return the text without surrounding white space."""
    return text.strip() or None


_RULES: Final[Mapping[str, Callable[[str], str | None]]] = {
    "answer_tag": _answer_tag,
    "boxed": _boxed,
    "last_number": _last_number,
    "whole_text": _whole_text,
}


def extract_answer(text: str, rules: Sequence[str]) -> str | None:
    """Return the answer by the first rule that finds one, or None where none does.

    An empty <answer></answer> is an answer: the empty one.
    """
    for rule in rules:
        answer = _RULES[rule](text)
        if answer is not None:
            return answer
    return None
