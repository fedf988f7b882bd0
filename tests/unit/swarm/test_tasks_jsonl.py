import json

import pytest

from swarm.errors import InvalidTaskRef, TaskError
from swarm.tasks.jsonl import JsonlSource

GOOD = {"question": "2 + 2?", "answer": "4", "verifier": "number"}


def write(folder, *lines, name="sums.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_items_are_the_lines(tmp_path):
    choice = {"question": "Sky?", "answer": "B", "verifier": "choice", "choices": ["red", "blue"], "id": 7}
    source = JsonlSource(write(tmp_path, GOOD, "", choice))
    assert source.name == "jsonl/sums"
    assert source.num_items == 2
    assert [source.question(0, index) for index in (0, 1)] == ["2 + 2?", "Sky?"]
    assert source.score(0, 0, "4.0") == 1.0
    assert source.score(0, 0, "5") == 0.0
    assert source.score(0, 1, "blue") == 1.0


def test_the_digest_is_of_the_content_and_not_of_the_path(tmp_path):
    (tmp_path / "other").mkdir()
    first = JsonlSource(write(tmp_path, GOOD))
    same = JsonlSource(write(tmp_path / "other", GOOD))
    changed = JsonlSource(write(tmp_path / "other", {**GOOD, "answer": "5"}))
    assert first.digest == same.digest != changed.digest
    assert len(first.digest) == 32
    assert int(first.digest, 16)


@pytest.mark.parametrize(("seed", "index"), [(0, 1), (0, -1), (1, 0), (0, 2**64)])
def test_items_that_do_not_exist(tmp_path, seed, index):
    with pytest.raises(InvalidTaskRef):
        JsonlSource(write(tmp_path, GOOD)).question(seed, index)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        ("[" * 100_000, "not JSON"),
        ({"question": "?", "verifier": "exact"}, "field 'answer' is missing"),
        ({**GOOD, "question": " "}, "field 'question' is missing"),
        ({**GOOD, "verifier": "eval"}, "no verifier 'eval'; use one of exact, number, math, regex, choice"),
        ({**GOOD, "tolerence": 1}, "did you mean 'tolerance'"),
        ({**GOOD, "tolerance": -1}, "tolerance must be"),
        ({**GOOD, "answer": "four"}, "not a number"),
        ({**GOOD, "verifier": "exact", "tolerance": 1}, "belongs to verifier 'number'"),
        ({**GOOD, "verifier": "regex", "answer": "("}, "not a regular expression"),
        ({**GOOD, "verifier": "choice"}, "needs choices"),
        ({**GOOD, "verifier": "choice", "choices": ["a", "b"], "answer": "z"}, "none of the choices"),
    ],
)
def test_a_malformed_line_is_named_with_its_number_and_the_fix(tmp_path, line, complaint):
    path = write(tmp_path, GOOD, line, GOOD)
    with pytest.raises(TaskError) as caught:
        JsonlSource(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: ")
    assert complaint in message
    assert "\n" not in message


def test_a_file_that_cannot_be_used(tmp_path):
    with pytest.raises(TaskError, match="cannot read task file"):
        JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(TaskError, match="holds no questions"):
        JsonlSource(write(tmp_path, "", ""))
    with pytest.raises(TaskError, match="rename it"):
        JsonlSource(write(tmp_path, GOOD, name="x" * 130 + ".jsonl"))
