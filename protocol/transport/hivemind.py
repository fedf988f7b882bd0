"""hivemind's libp2p daemon and DHT in the node's own event loop: TCP and QUIC, relays, NAT traversal.

    hivemind_settings     what a user sets                hivemind_daemon   p2pd itself
    hivemind_dht, hivemind_records   the DHT, and what it believes
    supervised            the contract, as far as it does not depend on p2pd
    here                  what does

Of DHT calls there are hivemind's `DHTProtocol` rpc_ping, rpc_store and rpc_find, over its unary calls.

hivemind is imported by `start`, in a thread, and as little of it as a node needs (`hivemind_import`): no other
transport may load it.
"""

import asyncio
import re
import sys
from collections import Counter
from dataclasses import replace

from protocol.clock import Clock, system_clock
from protocol.identity import Identity
from protocol.transport.base import RecordValidator, Traffic, TransportError
from protocol.transport.dispatch import MAX_REQUESTS, MAX_REQUESTS_PER_ASKER
from protocol.transport.hivemind_import import import_dht
from protocol.transport.hivemind_settings import HivemindSettings
from protocol.transport.peer_streams import PeerStreams
from protocol.transport.session import Session
from protocol.transport.supervised import STREAM_PROTOCOL, SupervisedTransport, open_stream

__all__ = ["STREAM_PROTOCOL", "HivemindSettings", "HivemindTransport"]


class HivemindTransport(SupervisedTransport):
    """One node's transport over p2pd."""

    name = "hivemind"
    what = "p2pd"

    def __init__(
        self,
        identity: Identity,
        validator: RecordValidator,
        settings: HivemindSettings | None = None,
        *,
        clock: Clock = system_clock,
        max_requests: int = MAX_REQUESTS,
        max_requests_per_asker: int = MAX_REQUESTS_PER_ASKER,
    ) -> None:
        self._settings = settings or HivemindSettings()
        super().__init__(
            identity,
            validator,
            self._settings.listen,
            clock,
            max_requests=max_requests,
            max_requests_per_asker=max_requests_per_asker,
        )

    @property
    def traffic(self) -> Traffic:
        """Counters since the start."""
        traffic = super().traffic
        if self._supervisor is None:
            return traffic
        return replace(
            traffic,
            bytes_in=traffic.bytes_in + self._filter.bytes_in,
            bytes_out=traffic.bytes_out + self._filter.bytes_out,
        )

    @property
    def dht_refusals(self) -> Counter[str]:
        """What peers said to the DHT that was not believed, by reason."""
        return self._filter.refusals if self._supervisor is not None else Counter()

    async def _prepare(self) -> None:
        if "libp2p" in sys.modules:
            raise TransportError("hivemind and libp2p cannot share a process: choose one transport")
        await asyncio.to_thread(import_dht)
        from protocol.transport.hivemind_dht import DhtFilter
        from protocol.transport.hivemind_records import BoundedStorage, OwnedRecordValidator

        self._record_validator = OwnedRecordValidator(self._validator, self._clock)
        self._storage = BoundedStorage(self._clock)
        self._filter = DhtFilter(self._record_validator, self._storage, self._is_refused)

    async def _open_session(self) -> Session:
        from protocol.transport.hivemind_daemon import start_daemon
        from protocol.transport.hivemind_dht import Dht

        daemon = await start_daemon(self._identity, self._settings, self._listen, self._filter)
        try:
            if not self._settings.announce:
                self._check_listening(await daemon.visible_addresses())
            dht = await Dht.start(daemon, self._node_id, self._record_validator, self._storage, self._clock)
        except BaseException:
            await daemon.end()
            raise
        streams = PeerStreams(self._dispatcher, self._tally, lambda node_id: open_stream(daemon, node_id))
        session = Session(daemon, dht, streams, self._fail_with)
        try:
            await daemon.add_stream_handler(
                STREAM_PROTOCOL, lambda peer, reader, writer: self._take_stream(session, peer, reader, writer)
            )
        except BaseException:
            await session.end()
            raise
        return session

    def _check_listening(self, addresses: tuple[str, ...]) -> None:
        """p2pd says nothing of an address that it could not have, as long as it has another."""
        for wanted in self._listen:
            port = re.sub(r"^/ip./[^/]+", "", wanted)
            if not any(port in address for address in addresses):
                raise TransportError(f"p2pd cannot listen on {wanted}: choose another address with --listen")
