import random
from pathlib import Path

import pytest

from swarm.errors import CheckpointError
from swarm.journal import Journal, JournalRecord
from swarm.types import TrainingBatch, TrainingGroup


def record(round_index: int, num_groups: int = 2) -> JournalRecord:
    rng = random.Random(round_index)
    group = TrainingGroup(
        prompt_ids=(1, 2, 2**32 - 1),
        completion_ids=((5, 6), (), (7,)),
        advantages=(rng.gauss(0, 1), 0.1, -1.5),
        behavior_logprobs=((-0.5, -0.25), (), None),
    )
    return JournalRecord(round_index, TrainingBatch((group,) * num_groups), {"round": round_index, "loss": None})


def written(folder: Path, rounds: range) -> Journal:
    journal = Journal(folder)
    journal.start_after(rounds.start - 1)
    for index in rounds:
        journal.append(record(index))
    return journal


def test_records_come_back_exactly(tmp_path):
    journal = written(tmp_path, range(1, 4))
    journal.sync()
    assert Journal(tmp_path).read_after(0) == [record(1), record(2), record(3)]
    assert Journal(tmp_path).read_after(2) == [record(3)]
    assert Journal(tmp_path).read_after(3) == []


def test_floats_that_fp32_cannot_hold_are_kept(tmp_path):
    group = TrainingGroup((1,), ((2,),), (1 / 3,), ((-1e-300,),))
    journal = Journal(tmp_path)
    journal.start_after(0)
    journal.append(JournalRecord(1, TrainingBatch((group,)), {}))
    [read] = Journal(tmp_path).read_after(0)
    assert read.batch.groups == (group,)


def test_every_cut_of_the_tail_leaves_the_rounds_before(tmp_path):
    written(tmp_path / "whole", range(1, 4)).close()
    [segment] = (tmp_path / "whole").iterdir()
    data = segment.read_bytes()
    two = len(written_bytes(tmp_path / "two", range(1, 3)))
    for cut in {two + 1, two + 7, two + 8, len(data) - 1}:
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / segment.name).write_bytes(data[:cut])
        journal = Journal(folder)
        assert journal.read_after(0) == [record(1), record(2)]
        journal.start_after(2)
        journal.append(record(3))
        assert Journal(folder).read_after(0) == [record(1), record(2), record(3)]


def written_bytes(folder: Path, rounds: range) -> bytes:
    written(folder, rounds).close()
    [segment] = folder.iterdir()
    return segment.read_bytes()


def test_a_flipped_bit_ends_the_journal_before_it(tmp_path):
    data = bytearray(written_bytes(tmp_path, range(1, 4)))
    one = len(written_bytes(tmp_path / "one", range(1, 2)))
    data[one + 20] ^= 1
    (tmp_path / "00000001.journal").write_bytes(data)
    assert Journal(tmp_path).read_after(0) == [record(1)]


def test_rounds_after_a_gap_are_not_read(tmp_path):
    journal = written(tmp_path, range(1, 3))
    journal.rotate()
    journal.append(record(3))
    journal.rotate()
    journal.append(record(4))
    (tmp_path / "00000003.journal").unlink()
    assert [item.round_index for item in journal.read_after(0)] == [1, 2]
    assert [item.round_index for item in journal.read_after(3)] == [4]


def test_going_on_after_an_earlier_round_drops_later_ones(tmp_path):
    journal = written(tmp_path, range(1, 4))
    journal.rotate()
    journal.append(record(4))
    journal.start_after(2)
    assert Journal(tmp_path).read_after(0) == [record(1), record(2)]
    assert journal.last_round == 2


def test_segments_go_when_no_kept_checkpoint_needs_them(tmp_path):
    journal = written(tmp_path, range(1, 3))
    for index in (3, 4):
        journal.rotate()
        journal.append(record(index))
    journal.drop_through(1)
    assert [item.round_index for item in journal.read_after(0)] == [1, 2, 3, 4]
    journal.drop_through(3)
    assert journal.read_after(0) == []
    assert [item.round_index for item in journal.read_after(3)] == [4]


def test_a_round_out_of_order_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="round 5 does not follow round 2"):
        written(tmp_path, range(1, 3)).append(record(5))


def test_a_full_disk_leaves_the_last_good_round(tmp_path, small_disk):
    journal = Journal(small_disk)
    journal.start_after(0)
    big = record(1, num_groups=1000).batch

    def fill() -> None:
        for index in range(1, 100):
            journal.append(JournalRecord(index, big, {}))

    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        fill()
    last = journal.last_round
    assert last >= 1
    assert len(Journal(small_disk).read_after(0)) == last
