"""Nodes of libp2p's DHT in one process, on the loop's clock: some end, some lie, some cannot be reached."""

import asyncio

from protocol.identity import node_id_of
from protocol.transport.base import PeerUnreachable
from protocol.transport.libp2p_dht import Dht
from protocol.transport.libp2p_dht_messages import FIND, MEET, STORE
from protocol.transport.peer_id import peer_bytes_of
from protocol.transport.records import RecordRules

__all__ = ["ADDRESS", "NOW", "NOWHERE", "Network", "node"]

NOW = 1_900_000_000.0
ADDRESS = ("/ip4/192.0.2.1/tcp/7000",)
NOWHERE = ("/ip4/192.0.2.2/tcp/7000",)  # nobody answers there, and nobody says so


def node(number):
    return node_id_of(number.to_bytes(32, "big"))


class Network:
    """Nodes by id, and what they are to each other."""

    def __init__(self, ids=(), is_good=lambda *_: True, now=lambda: NOW):
        self.is_good, self.offsets, self.now = is_good, {}, now
        self.lies = {}  # by node id: what it answers to a name, as bytes or a function of asker and payload
        self.dead = set()
        self.num_asked = 0
        self.nodes = {}
        for node_id in map(node, range(ids)) if isinstance(ids, int) else ids:
            self.add(node_id)

    def add(self, own):
        def clock():
            return self.now() + self.offsets.get(own, 0.0)

        async def ask(peer, name, payload, max_bytes):
            self.num_asked += 1
            if peer in self.dead or peer not in self.nodes:
                raise PeerUnreachable("gone")
            dht, lie = self.nodes[peer], self.lies.get(peer, {}).get(name)
            if lie is not None:
                return lie(own, payload) if callable(lie) else lie
            handler = {MEET: dht.handle_meet, FIND: dht.handle_find, STORE: dht.handle_store}[name]
            answer = await handler(own, payload)
            assert len(answer) <= max_bytes
            return answer

        async def reach(peer, addresses):
            if addresses == NOWHERE:
                await asyncio.sleep(3600)
            assert addresses == ADDRESS
            await self.nodes[own].meet(peer_bytes_of(peer))

        rules = RecordRules(self.is_good, clock)
        self.nodes[own] = Dht(own, rules, clock, ask, reach, lambda: ADDRESS, lambda *_: None)
        return self.nodes[own]

    async def meet_all(self):
        first, *others = self.nodes
        for other in others:
            await self.nodes[other].meet(peer_bytes_of(first))
            await self.nodes[other].fill_routing_table()
