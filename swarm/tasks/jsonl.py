"""Questions from a JSONL file: one object a line, checked before the run begins.

    {"question": "2 + 2?", "answer": "4", "verifier": "number"}

`verifier` is one of `verifiers.VERIFIERS`; `tolerance` goes with number, `choices` with choice. `id` and
`metadata` may stand beside them and are not read. The source is identified by the digest of the content.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from swarm.errors import InvalidTaskRef, TaskError
from swarm.tasks.base import MAX_SOURCE_NAME_BYTES, SourceSpec, TaskSource
from swarm.tasks.verifiers import VERIFIERS, load_math_verify, parse_number

__all__ = ["JsonlSource"]

_REQUIRED: Final = ("question", "answer", "verifier")
_OPTIONAL: Final = {"tolerance": "number", "choices": "choice"}  # field -> the verifier it belongs to
_IGNORED: Final = ("id", "metadata")


class _BadLine(ValueError):
    """What is wrong with a line, and the fix; the file and the number of the line are added outside."""


class JsonlSource(TaskSource):
    """One file of questions. Every seed has the same items; references carry seed 0."""

    def __init__(self, path: Path) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TaskError(f"cannot read task file {str(path)!r}: {error.strerror}; check the path") from error
        self._path = path.resolve()
        self.name = f"jsonl/{path.stem}"
        if len(self.name.encode()) > MAX_SOURCE_NAME_BYTES:
            raise TaskError(f"the name of task file {str(path)!r} is too long; rename it to fewer than 120 bytes")
        self.digest = hashlib.blake2b(content, digest_size=16, person=b"jsonl tasks").hexdigest()
        self._lines = _read_lines(path, content)
        self.num_items = len(self._lines)
        if any(line["verifier"] == "math" for line in self._lines):
            load_math_verify()

    @property
    def spec(self) -> SourceSpec:
        """What another process needs to build the same source."""
        return SourceSpec(kind="jsonl", target=str(self._path), config_json="", digest=self.digest)

    def question(self, seed: int, index: int) -> str:
        """Return the question of a line."""
        return str(self._line(seed, index)["question"])

    def score(self, seed: int, index: int, answer: str) -> float:
        """Return 1 or 0 by the line's verifier."""
        line = self._line(seed, index)
        return 1.0 if VERIFIERS[line["verifier"]](answer, line) else 0.0

    def _line(self, seed: int, index: int) -> Mapping[str, Any]:
        if seed != 0 or not 0 <= index < len(self._lines):
            raise InvalidTaskRef(f"{self.name} has no item {index} of seed {seed}")
        return self._lines[index]


def _read_lines(path: Path, content: bytes) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            lines.append(_checked(raw))
        except _BadLine as error:
            raise TaskError(f"{path}, line {number}: {error}") from error
    if not lines:
        raise TaskError(f"task file {str(path)!r} holds no questions; add one JSON object a line")
    return lines


def _checked(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _BadLine("not UTF-8; save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        )
        raise _BadLine(f"not JSON: {reason}; write one JSON object on the line") from error
    if not isinstance(line, dict):
        raise _BadLine('not an object; write {"question": …, "answer": …, "verifier": …}')
    if isinstance(line.get("answer"), int | float) and not isinstance(line["answer"], bool):
        line["answer"] = str(line["answer"])
    for field in _REQUIRED:
        if not isinstance(line.get(field), str) or not line[field].strip():
            raise _BadLine(f"field {field!r} is missing or not a text; add it")
    if line["verifier"] not in VERIFIERS:
        raise _BadLine(f"there is no verifier {line['verifier']!r}; use one of {', '.join(VERIFIERS)}")
    for field in line:
        if field in _OPTIONAL and line["verifier"] != _OPTIONAL[field]:
            raise _BadLine(f"field {field!r} belongs to verifier {_OPTIONAL[field]!r}; remove it")
        if field not in (*_REQUIRED, *_OPTIONAL, *_IGNORED):
            near = difflib.get_close_matches(field, [*_REQUIRED, *_OPTIONAL], n=1)
            raise _BadLine(
                f"unknown field {field!r}; " + (f"did you mean {near[0]!r}?" if near else "put it under 'metadata'")
            )
    _check_verifier(line)
    return line


def _check_verifier(line: Mapping[str, Any]) -> None:
    """Check what the line's own verifier needs."""
    verifier, answer = line["verifier"], line["answer"]
    if verifier == "number":
        tolerance = line.get("tolerance", 0)
        if not isinstance(tolerance, int | float) or isinstance(tolerance, bool) or not 0 <= tolerance < float("inf"):
            raise _BadLine("tolerance must be a number of at least 0; correct it")
        if parse_number(answer) is None:
            raise _BadLine(f"answer {answer[:40]!r} is not a number; correct it or use verifier 'exact'")
    elif verifier == "regex":
        try:
            re.compile(answer)
        except re.error as error:
            raise _BadLine(f"answer is not a regular expression: {error}; correct it") from error
    elif verifier == "choice":
        choices = line.get("choices")
        is_list = (
            isinstance(choices, list) and 2 <= len(choices) <= 26 and all(isinstance(item, str) for item in choices)
        )
        if not is_list:
            raise _BadLine("verifier 'choice' needs choices, a list of 2 to 26 texts; add it")
        if not VERIFIERS["choice"](answer, line):
            raise _BadLine(f"answer {answer[:40]!r} is none of the choices; write one of them or its letter")
