import collections
import json
from dataclasses import replace

import pytest

from swarm.config import TasksConfig, TaskSourceConfig
from swarm.errors import InvalidTaskRef, TaskError, UnknownSource
from swarm.tasks import build_source, build_task_set

PRODUCTS = TaskSourceConfig(name="products", config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1})
CHAIN_SUM = TaskSourceConfig(name="chain_sum", weight=3.0)


def task_set(*sources, seed=7, fraction=0.1):
    return build_task_set(TasksConfig(sources=sources, heldout_fraction=fraction), seed)


def test_a_round_is_a_function_of_config_seed_and_round():
    tasks = task_set(PRODUCTS, CHAIN_SUM)
    again = task_set(PRODUCTS, CHAIN_SUM)
    rounds = [tasks.train_batch(index, 8) for index in range(3)]
    assert [again.train_batch(index, 8) for index in (2, 0, 1)] == [rounds[2], rounds[0], rounds[1]]
    assert rounds[0] != rounds[1]
    assert task_set(PRODUCTS, CHAIN_SUM, seed=8).train_batch(0, 8) != rounds[0]


def test_sources_are_drawn_by_weight():
    tasks = task_set(PRODUCTS, CHAIN_SUM)
    counts = collections.Counter(task.ref.source for index in range(250) for task in tasks.train_batch(index, 8))
    # 2,000 draws with probability 0.75: the standard deviation is 19.
    assert abs(counts["reasoning_gym/chain_sum"] - 1500) < 100


def test_train_and_heldout_questions_never_meet_even_where_seeds_repeat_questions():
    tasks = task_set(PRODUCTS)
    heldout = {task.question for task in tasks.heldout(256)}
    trained = {task.question for index in range(200) for task in tasks.train_batch(index, 8)}
    assert len(heldout) + len(trained) == 100  # every one-digit product, on one side or the other
    assert not heldout & trained
    assert 2 <= len(heldout) <= 25


def test_heldout_questions_are_distinct_and_the_same_for_every_seed():
    tasks = task_set(PRODUCTS, CHAIN_SUM)
    heldout = tasks.heldout(64)
    assert len({task.question for task in heldout}) == len(heldout)
    assert heldout == task_set(PRODUCTS, CHAIN_SUM, seed=99).heldout(64)
    assert {task.ref.source for task in heldout} == {"reasoning_gym/products", "reasoning_gym/chain_sum"}
    assert all(tasks.is_heldout(task.question) for task in heldout)
    assert tasks.heldout(0) == []


def test_nothing_held_out_and_everything_held_out_are_errors_that_name_the_fix(tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"question": "2 + 2?", "answer": "4", "verifier": "exact"}\n')
    source = TaskSourceConfig(name=str(path))
    with pytest.raises(TaskError, match=r"raise tasks\.heldout_fraction"):
        task_set(source, fraction=1e-9).heldout(4)
    with pytest.raises(TaskError, match=r"lower tasks\.heldout_fraction"):
        task_set(source, fraction=1 - 1e-9).train_batch(0, 1)
    with pytest.raises(TaskError, match=r"lower tasks\.heldout_fraction"):
        task_set(PRODUCTS, fraction=1 - 1e-9).train_batch(0, 1)


def test_a_file_is_passed_over_before_a_line_repeats(tmp_path):
    path = tmp_path / "words.jsonl"
    lines = [{"question": f"word {number}?", "answer": "x", "verifier": "exact"} for number in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    tasks = task_set(TaskSourceConfig(name=str(path)), fraction=0.2)
    num_train = 40 - len(tasks.heldout(40))
    drawn = [task.ref.index for index in range(2 * num_train) for task in tasks.train_batch(index, 1)]
    first, second = drawn[:num_train], drawn[num_train:]
    assert len(set(first)) == num_train
    assert sorted(first) == sorted(second)
    assert first != second


def test_rounds_that_ask_differently_many_begin_alike_and_never_share_a_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps({"question": f"q{number}", "answer": "a", "verifier": "exact"}) for number in range(100)]
    path.write_text("\n".join(lines))
    for tasks in (task_set(PRODUCTS), task_set(TaskSourceConfig(name=str(path)))):
        most = [tasks.train_batch(index, 8) for index in range(9)]
        asked = [tasks.train_batch(index, 4 + index % 5, stride=8) for index in range(9)]
        assert asked == [batch[: 4 + index % 5] for index, batch in enumerate(most)]
    lines_asked = [task.ref for batch in asked for task in batch]
    assert len(set(lines_asked)) == len(lines_asked) > 40
    with pytest.raises(ValueError, match="5 questions are more than the 4"):
        tasks.train_batch(0, 5, stride=4)


def test_references_resolve_to_the_same_question_and_strangers_do_not():
    tasks = task_set(PRODUCTS, CHAIN_SUM)
    task = tasks.train_batch(3, 1)[0]
    assert task_set(CHAIN_SUM, PRODUCTS, seed=1).resolve(task.ref) == task
    for ref in (replace(task.ref, source="jsonl/none"), replace(task.ref, digest="0" * 32)):
        with pytest.raises(UnknownSource):
            tasks.resolve(ref)
    for ref in (replace(task.ref, index=2**64 - 1), replace(task.ref, index=-1), replace(task.ref, seed=2**64)):
        with pytest.raises(InvalidTaskRef):
            tasks.resolve(ref)


def test_other_settings_are_another_source_and_spelled_out_defaults_are_not():
    digests = [
        task_set(TaskSourceConfig(name="chain_sum", config=config)).sources[0].digest
        for config in ({}, {"min_terms": 2}, {"min_terms": 3})
    ]
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 32 for digest in digests)


def test_a_source_is_rebuilt_from_its_spec_or_not_at_all():
    source = task_set(PRODUCTS).sources[0]
    assert build_source(source.spec).task(1, 2) == source.task(1, 2)
    with pytest.raises(TaskError, match="restart the node"):
        build_source(replace(source.spec, digest="0" * 32))


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([], "there are no tasks"),
        ([PRODUCTS, PRODUCTS], "listed twice"),
        ([TaskSourceConfig(name="produkts")], "did you mean products"),
        ([TaskSourceConfig(name="qqqqqq")], "name a reasoning-gym task"),
        ([TaskSourceConfig(name="codeio")], "refused: it executes programs"),
        ([TaskSourceConfig(name="composite")], "list each of them"),
        ([TaskSourceConfig(name="products", config={"size": 3})], "has no setting 'size'; it has"),
        ([TaskSourceConfig(name="products", config={"min_terms": 9})], "change its config"),
        ([TaskSourceConfig(name="products", config={"min_terms": "two"})], "change its config"),
        ([TaskSourceConfig(name="x.jsonl", config={"a": 1})], "takes no config"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_line_that_names_the_fix(sources, complaint):
    with pytest.raises(TaskError, match=complaint) as caught:
        task_set(*sources)
    assert "\n" not in str(caught.value)
