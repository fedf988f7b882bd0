import pytest

from protocol.saved_state import SavedStateError, read_state, write_state


def test_what_was_written_is_read_and_the_file_is_private(tmp_path):
    path = tmp_path / "swarm.state"
    assert read_state(path, "main") is None
    write_state(path, "main", {"sequence": 7, "seen": [b"x"]})
    write_state(path, "main", {"sequence": 8, "seen": [b"x", b"y"]})
    state = read_state(path, "main")
    assert state is not None
    assert (state["sequence"], state["seen"]) == (8, [b"x", b"y"])
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["swarm.state"]


def test_a_damaged_file_is_named_with_the_fix(tmp_path):
    path = tmp_path / "swarm.state"
    write_state(path, "main", {"sequence": 7})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SavedStateError, match=r"swarm\.state is damaged .*: move it away to begin without it"):
        read_state(path, "main")


def test_another_swarms_file_is_refused(tmp_path):
    path = tmp_path / "swarm.state"
    write_state(path, "main", {})
    with pytest.raises(SavedStateError, match="is of swarm 'main', not 'other': move it away, or set --swarm-id"):
        read_state(path, "other")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(
        SavedStateError, match=r"cannot write .*: No such file or directory; free space or mend the folder"
    ):
        write_state(tmp_path / "missing" / "swarm.state", "main", {})
