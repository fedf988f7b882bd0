import asyncio
import threading

from node.recorder import Recorder
from node.run_folder import RunFolder
from swarm.config import CheckpointConfig
from swarm.types import TrainingBatch


class Unmoved:
    """A trainer that has nothing to restore."""


def test_a_round_is_recorded_only_when_the_sync_of_the_one_before_has_ended(tmp_path):
    may_sync, sync_began = threading.Event(), threading.Event()

    async def append_two_rounds() -> None:
        recorder = Recorder(RunFolder(tmp_path), CheckpointConfig())
        recorder.restore(Unmoved(), lambda: False)
        sync = recorder._journal.sync

        def slow_sync() -> None:
            sync_began.set()
            assert may_sync.wait(60)
            sync()

        recorder._journal.sync = slow_sync
        await recorder.append(1, TrainingBatch(()), {"round": 1})
        await asyncio.to_thread(sync_began.wait, 60)
        second = asyncio.ensure_future(recorder.append(2, TrainingBatch(()), {"round": 2}))
        for _ in range(100):  # turns of the loop: nothing but the sync keeps the second round back
            await asyncio.sleep(0)
        assert recorder.last_round == 1
        may_sync.set()
        await second
        assert recorder.last_round == 2
        await recorder.close()

    asyncio.run(append_two_rounds())


def test_what_a_sync_failed_with_is_raised_at_the_next_round(tmp_path):
    async def append_two_rounds() -> str:
        recorder = Recorder(RunFolder(tmp_path), CheckpointConfig())
        recorder.restore(Unmoved(), lambda: False)

        def failing_sync() -> None:
            raise OSError("the disk is gone")

        recorder._journal.sync = failing_sync
        await recorder.append(1, TrainingBatch(()), {"round": 1})
        try:
            await recorder.append(2, TrainingBatch(()), {"round": 2})
        except OSError as error:
            return f"{error} after round {recorder.last_round}"
        finally:
            await recorder.close()
        return "nothing"

    assert asyncio.run(append_two_rounds()) == "the disk is gone after round 1"
