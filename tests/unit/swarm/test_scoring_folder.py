import os
import signal
import subprocess
import sys
import tempfile

import pytest

from swarm.scoring.folder import WorkFolder


@pytest.fixture(autouse=True)
def own_tempdir(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def names(tmp_path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()}


def test_a_folder_is_there_until_it_is_closed(tmp_path):
    folder = WorkFolder()
    assert names(tmp_path) == {folder.path.name}
    folder.close()
    assert names(tmp_path) == set()


def test_a_folder_of_a_killed_process_goes_and_one_of_a_live_process_stays(tmp_path):
    code = "from swarm.scoring.folder import WorkFolder; f = WorkFolder(); print(f.path.name, flush=True); input()"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    start = [sys.executable, "-c", code]
    with subprocess.Popen(start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        theirs = process.stdout.readline().strip()
        mine = WorkFolder()
        assert names(tmp_path) == {theirs, mine.path.name}
        process.send_signal(signal.SIGKILL)
    other = WorkFolder()
    assert names(tmp_path) == {mine.path.name, other.path.name}


def test_what_only_looks_like_one_is_left_alone(tmp_path):
    (tmp_path / "swarm-scoring-notes").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "swarm-scoring-link").symlink_to(tmp_path / "elsewhere")
    WorkFolder().close()
    assert names(tmp_path) == {"swarm-scoring-notes", "elsewhere", "swarm-scoring-link"}
