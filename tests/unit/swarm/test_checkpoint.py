import shutil

import pytest
import torch

from swarm.checkpoint import Checkpoint, Checkpoints
from swarm.errors import CheckpointError


def checkpoint(round_index: int, size: int = 100) -> Checkpoint:
    generator = torch.Generator().manual_seed(round_index)
    tensors = {
        "weight": torch.randn(size, generator=generator),
        "moment": torch.randn(size, generator=generator).bfloat16(),
        "step": torch.tensor(round_index),
        "empty": torch.zeros(0),
    }
    return Checkpoint(round_index, tensors, {"step": round_index, "rate": 1e-5})


def assert_equal(found: Checkpoint | None, expected: Checkpoint) -> None:
    assert found is not None
    assert (found.round_index, found.meta) == (expected.round_index, expected.meta)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor)
        assert found.tensors[name].dtype == tensor.dtype


def test_the_newest_comes_back_bit_for_bit_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest() == (None, [])
    assert checkpoints.oldest_needed() == 0
    checkpoints.write(checkpoint(3))
    assert checkpoints.oldest_needed() == 0  # were it damaged, the run would begin anew
    for index in (9, 100):
        checkpoints.write(checkpoint(index))
    assert checkpoints.rounds() == [9, 100]
    assert checkpoints.oldest_needed() == 9
    found, damaged = checkpoints.newest()
    assert_equal(found, checkpoint(100))
    assert damaged == []


@pytest.mark.parametrize("name", ["state.safetensors", "meta.msgpack"])
@pytest.mark.parametrize("harm", ["truncate", "empty", "flip", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, harm):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(checkpoint(1))
    checkpoints.write(checkpoint(2))
    path = tmp_path / "round-00000002" / name
    data = bytearray(path.read_bytes())
    if harm == "delete":
        path.unlink()
    elif harm == "flip":
        data[-3] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if harm == "truncate" else b"")
    found, damaged = checkpoints.newest()
    assert_equal(found, checkpoint(1))
    assert len(damaged) == 1
    assert "round-00000002 is damaged" in damaged[0]
    assert "\n" not in damaged[0]


def test_what_a_killed_process_left_half_written_is_not_seen_and_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.write(checkpoint(1))
    partial = tmp_path / ".round-00000002.partial"
    shutil.copytree(tmp_path / "round-00000001", partial)
    assert checkpoints.rounds() == [1]
    checkpoints.remove_partial()
    assert not partial.exists()


def test_a_full_disk_leaves_the_checkpoints_that_exist(small_disk):
    checkpoints = Checkpoints(small_disk, keep=2)
    checkpoints.write(checkpoint(1))
    with pytest.raises(CheckpointError, match=r"No space left on device.*; round 1 and the journal after it are safe"):
        checkpoints.write(checkpoint(2, size=2**20))
    assert_equal(checkpoints.newest()[0], checkpoint(1))
    assert list(small_disk.glob(".*")) == []
    checkpoints.write(checkpoint(3))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write a checkpoint to .*: Not a directory; the journal is safe"):
        Checkpoints(tmp_path / "file", keep=2).write(checkpoint(1))
