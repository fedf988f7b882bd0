import asyncio
import json
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from node.control import Monitor, NoStatus, newest_status, read_status, socket_path
from node.run_folder import RunFolderError


@pytest.fixture
def runtime_dir(monkeypatch):
    """A folder whose path is short."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def begun(folder):
    """A run folder in which a run has begun."""
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    return folder


def test_a_running_node_answers_and_a_stopped_one_is_as_it_was(tmp_path):
    run = begun(tmp_path / "run")
    rounds = iter(range(100))

    async def main():
        async with Monitor(run, lambda: {"running": True, "round": next(rounds)}):
            path = socket_path(run)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            return [await asyncio.to_thread(read_status, run, where) for where in (None, None, path)]

    found = asyncio.run(main())
    assert all(status["running"] for status in found)
    assert [status["round"] for status in found] == sorted({status["round"] for status in found})
    assert not socket_path(run).exists()
    last = read_status(run)
    assert not last["running"]
    assert last["round"] > found[-1]["round"]
    assert newest_status(tmp_path) == run


def test_a_killed_node_leaves_a_socket_that_is_in_nobodys_way(tmp_path):
    run = begun(tmp_path / "run")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_path(run)))
        dead.listen()
    with pytest.raises(NoStatus, match="none has left a status"):
        read_status(run)
    (run / "status.json").write_text(json.dumps({"running": True, "round": 7}))
    assert read_status(run) == {"running": False, "round": 7}

    async def main():
        async with Monitor(run, lambda: {"running": True, "round": 8}):
            return await asyncio.to_thread(read_status, run)

    assert asyncio.run(main())["round"] == 8


def test_a_path_that_is_too_long_for_a_socket_has_another_in_a_private_folder(tmp_path, runtime_dir):
    run = begun(tmp_path / ("x" * 60) / ("y" * 60))
    other = begun(tmp_path / ("x" * 60) / ("z" * 60))
    path = socket_path(run)
    assert len(os.fsencode(path)) <= 100
    assert path != socket_path(other)

    async def main():
        async with Monitor(run, lambda: {"running": True}):
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            return await asyncio.to_thread(read_status, run)

    assert asyncio.run(main())["running"]


def test_a_folder_of_sockets_that_others_can_enter_is_refused(tmp_path, runtime_dir):
    (runtime_dir / "swarm-node").mkdir(mode=0o755)
    run = begun(tmp_path / ("x" * 60) / ("y" * 60))

    async def main():
        async with Monitor(run, dict):
            pass

    with pytest.raises(RunFolderError, match=r"cannot make the control socket .* is not a folder of this user's own"):
        asyncio.run(main())


def test_what_asks_wrongly_or_slowly_or_leaves_harms_nobody(tmp_path):
    run = begun(tmp_path / "run")

    async def main():
        async with Monitor(run, lambda: {"running": True}):
            for sent in (b"", b"\n", b"x" * 10_000, b"x" * 10_000 + b"\n", b"stat"):
                reader, writer = await asyncio.open_unix_connection(str(socket_path(run)))
                writer.write(sent)
                writer.close()
            reader, writer = await asyncio.open_unix_connection(str(socket_path(run)))
            writer.write(b"secrets\n")
            answer = json.loads(await reader.readline())
            writer.close()
            return answer, await asyncio.to_thread(read_status, run)

    answer, status = asyncio.run(main())
    assert answer == {"error": "ask for: status"}
    assert status == {"running": True}


def test_a_node_that_could_not_start_leaves_no_snapshot(tmp_path):
    async def main():
        async with Monitor(tmp_path, dict):
            pass

    asyncio.run(main())
    assert list(tmp_path.iterdir()) == []


def test_no_node_anywhere_is_one_line(tmp_path):
    for look in (
        lambda: newest_status(tmp_path),
        lambda: read_status(tmp_path),
        lambda: read_status(None, tmp_path / "control.sock"),
    ):
        with pytest.raises(NoStatus) as caught:
            look()
        assert "--run-dir" in str(caught.value)
