import random
from dataclasses import replace

import pytest
from _swarm import identity_of

from protocol import greeting
from protocol.config import SwarmConfig
from protocol.greeting import check_hello
from protocol.identity import Identity
from protocol.local import Local
from protocol.messages import NodeRecord
from protocol.refusals import Reason, Refusal
from protocol.reputation import Reputation
from protocol.requests import Hello
from protocol.signing import sign_node_record
from protocol.transport.memory import MemoryNetwork, MemoryTransport

NOW_S = 1_800_000_000.0


@pytest.fixture
def local() -> Local:
    identity, rng = identity_of(0), random.Random(0)
    transport = MemoryTransport(MemoryNetwork(rng), identity.node_id, lambda *_: True)
    reputation = Reputation(half_life_s=600, min_score=-10, ban_s=300, min_useful=4, probation_s=0)
    return Local(identity, transport, SwarmConfig(), lambda: NOW_S, rng, reputation, identity.node_id)


def record_of(identity: Identity, model: str = "tiny", swarm_id: str = "main") -> NodeRecord:
    return sign_node_record(
        identity,
        swarm_id,
        transport="memory",
        addresses=["/memory/p2p/x"],
        created_at_ms=int(NOW_S * 1000),
        role="trainer",
        software="test",
        model=model,
        tasks=[],
        rollouts_per_minute=0,
    )


def hello_of(record: NodeRecord) -> Hello:
    return Hello("main", int(NOW_S * 1000), True, record)


def test_a_record_that_is_known_byte_for_byte_is_not_verified_again(local, monkeypatch):
    verified: list[NodeRecord] = []
    monkeypatch.setattr(greeting, "verify_node_record", lambda swarm_id, record: verified.append(record))
    peer = identity_of(1)
    old, new = record_of(peer), record_of(peer, model="other")
    assert check_hello(hello_of(old), peer.node_id, local, old) is old
    assert verified == []
    assert check_hello(hello_of(new), peer.node_id, local, old) is new
    assert check_hello(hello_of(old), peer.node_id, local, None) is old
    assert verified == [new, old]


@pytest.mark.parametrize("is_known", [False, True])
def test_a_forged_record_is_refused_whatever_is_known(local, is_known):
    peer = identity_of(1)
    true, foreign = record_of(peer), record_of(peer, swarm_id="other")
    altered = replace(true, encoded=foreign.encoded[:64] + true.encoded[64:])
    with pytest.raises(Refusal) as raised:
        check_hello(hello_of(altered), peer.node_id, local, true if is_known else None)
    assert raised.value.reason is Reason.BAD_SIGNATURE


def test_a_record_of_another_node_is_refused(local):
    peer = identity_of(1)
    record = record_of(peer)
    with pytest.raises(Refusal) as raised:
        check_hello(hello_of(record), identity_of(2).node_id, local, record)
    assert raised.value.reason is Reason.WRONG_IDENTITY
