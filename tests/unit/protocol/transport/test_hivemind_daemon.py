import asyncio
from types import SimpleNamespace
from uuid import UUID

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # hivemind's own


def test_an_answer_to_a_call_that_was_cancelled_a_moment_ago_ends_nothing():
    """hivemind's own reader is given a call whose future is cancelled, and then one that waits."""
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
    from hivemind.p2p.p2p_daemon_bindings.utils import write_pbmsg
    from hivemind.proto import p2pd_pb2

    from protocol.transport.hivemind_daemon import PendingCalls

    class Written(bytearray):
        def write(self, data):
            self.extend(data)

        async def drain(self):
            pass

    async def main():
        client, written, reader = SimpleNamespace(_handler_tasks={}), Written(), asyncio.StreamReader()
        cancelled, waits = (asyncio.get_running_loop().create_future() for _ in range(2))
        client._pending_calls = PendingCalls()
        for number, future in enumerate((cancelled, waits)):
            call_id = bytes([number]) * 16
            client._pending_calls[UUID(bytes=call_id)] = future
            answer = p2pd_pb2.CallUnaryResponse(response=b"answer")
            await write_pbmsg(written, p2pd_pb2.PersistentConnectionResponse(callId=call_id, callUnaryResponse=answer))
        cancelled.cancel()
        reader.feed_data(bytes(written))
        reader.feed_eof()
        await ControlClient._read_from_persistent_conn(client, reader)
        assert waits.result() == b"answer"

    asyncio.run(main())
