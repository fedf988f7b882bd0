"""The rounds of a node in virtual time."""

import asyncio
import itertools
import random

from node.exchange import SiloExchange
from node.experiment.pacing import PacedExchange
from protocol.transport import virtual_time


def begins(seed, num_rounds=6, *, round_s=10.0, jitter=0.05):
    """Return when each round of a node began, whose work takes no time."""

    async def run():
        paced = PacedExchange(SiloExchange(), round_s=round_s, jitter=jitter, rng=random.Random(seed))
        found = []
        for _ in range(num_rounds):
            assert await paced.sample(4) == []
            found.append(asyncio.get_running_loop().time())
            assert await paced.fill(2) == [], "more of one round is there at once"
            assert asyncio.get_running_loop().time() == found[-1]
        return found

    return virtual_time.run(run())


def test_a_round_begins_when_its_time_has_come():
    found = begins(1)
    assert 0 <= found[0] < 10
    apart = [after - before for before, after in itertools.pairwise(found)]
    assert all(9.5 <= one <= 10.5 for one in apart)
    assert len(set(apart)) == len(apart), "rounds of different nodes drift"
    assert begins(1) == found


def test_nodes_begin_anywhere_in_a_round():
    firsts = [begins(seed, 1)[0] for seed in range(40)]
    assert min(firsts) < 2
    assert max(firsts) > 8


def test_a_node_that_is_late_begins_at_once():
    async def run():
        paced = PacedExchange(SiloExchange(), round_s=1.0, jitter=0.0, rng=random.Random(0))
        await paced.sample(0)
        await asyncio.sleep(5.0)
        now = asyncio.get_running_loop().time()
        await paced.sample(0)
        return asyncio.get_running_loop().time() - now

    assert virtual_time.run(run()) == 0.0
