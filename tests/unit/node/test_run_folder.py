import os
import subprocess
import sys

import pytest

from node.config import RunConfig
from node.run_folder import RunFolder, RunFolderError, newest_run, refuse_other_run, write_atomically


def changed(**sections) -> RunConfig:
    return RunConfig.model_validate(RunConfig().model_dump() | sections)


def test_only_one_process_may_use_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from node.run_folder import *\n"
        "try:\n    RunFolder(Path(sys.argv[1])).__enter__()\n"
        "except RunFolderError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with RunFolder(tmp_path / "run") as folder:
        folder.metrics.touch()
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "another swarm-node is using the run folder" in said
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


def test_a_folder_in_which_nothing_came_to_be_is_not_left_behind(tmp_path):
    with RunFolder(tmp_path / "runs" / "new"):
        pass
    assert not (tmp_path / "runs").exists()
    with RunFolder(tmp_path / "runs" / "kept") as folder, RunFolder(tmp_path / "runs" / "new"):
        folder.metrics.touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]
    with RunFolder(tmp_path / "runs" / "new") as folder:
        for path in (folder.identity, folder.swarm, folder.listen):
            path.touch()  # it had joined, and its model could not be loaded
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["kept"]
    with RunFolder(tmp_path / "runs" / "begun") as folder:
        folder.identity.touch()
        folder.config.touch()
    assert folder.identity.exists()
    (tmp_path / "mine").mkdir()
    with RunFolder(tmp_path / "mine") as folder:
        folder.identity.touch()
    assert folder.identity.exists()


def test_a_run_occupies_a_folder_but_settings_and_identity_do_not(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.touch()
    folder.identity.touch()
    folder.refuse_occupied()
    folder.metrics.touch()
    with pytest.raises(RunFolderError, match=r"already holds a run; go on with it: --run-dir .* --resume, or"):
        folder.refuse_occupied()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"cannot write to the run folder .*Not a directory; choose another"):
        RunFolder(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"seed": 7}, "was run with seed = 0, not 7"),
        ({"model": {"name": "other"}}, "was run with model.name = tiny, not other"),
        ({"tasks": {"sources": [{"name": "products"}]}}, "was run with tasks.sources = , not products"),
        ({"trainer": {"beta1": 0.5}}, "was run with trainer.beta1 = 0.9, not 0.5"),
    ],
)
def test_another_run_is_refused_by_the_setting_that_differs(tmp_path, sections, message):
    with pytest.raises(RunFolderError, match=message):
        refuse_other_run(tmp_path, RunConfig(), changed(**sections))


def test_length_watching_and_memory_may_change(tmp_path):
    wanted = changed(
        rounds=7,
        evaluation={"num_items": 3},
        checkpoint={"interval_s": 1},
        engine={"max_slots": 2},
        trainer={"max_tokens_per_microbatch": 64},
    )
    refuse_other_run(tmp_path, RunConfig(), wanted)


def test_the_newest_run_is_the_one_written_to_last(tmp_path):
    with pytest.raises(RunFolderError, match="there is no run in"):
        newest_run(tmp_path)
    for age, name in enumerate(["b", "c", "a"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").touch()
        os.utime(tmp_path / name / "metrics.jsonl", (1e9 - age, 1e9 - age))
    (tmp_path / "empty").mkdir()
    assert newest_run(tmp_path).path == tmp_path / "b"


def test_writing_atomically_keeps_the_old_file_where_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    (tmp_path / ".file.partial").mkdir()
    with pytest.raises((RunFolderError, IsADirectoryError)):
        write_atomically(path, "new")
    assert path.read_text() == "old"
