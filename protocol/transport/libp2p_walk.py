"""Walking towards a place in the DHT: whom to ask next, and when to stop. Pure.

Nodes that this node has met come first; those that it has only heard of are tried beside them, so that naming nodes
that do not exist keeps nobody from being asked. Who names MAX_MISLED of them loses its say in the walk.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable

from protocol.transport.libp2p_routing import place_of_node

__all__ = ["Walk"]

NUM_NEAREST_ANSWERED = 8  # a walk ends when so many of the nearest nodes that live have answered
NUM_PARALLEL = 4  # calls of one walk to nodes that were met, and as many to others
MAX_MISLED = 4  # nodes that one has named, and nobody else, and that could not be reached

Addresses = tuple[str, ...]


class Walk:
    """One walk. Feed it what came of each call; ask it for the next ones until there are none."""

    def __init__(
        self,
        own: str,
        target: int,
        met: dict[str, Addresses],
        doubted: Collection[str],
        is_silent: Callable[[str], bool],
    ) -> None:
        """`doubted`: who has misled earlier walks; `is_silent`: who did not answer lately."""
        self._own, self._target, self._doubted, self._is_silent = own, target, doubted, is_silent
        self.known = dict(met)  # all nodes, with addresses
        self._met = set(met)
        self._namers: dict[str, set[str]] = {}  # by node that was only heard of
        self._misled = Counter[str]()
        self._running, self._failed = set[str](), set[str]()
        self.answered = set[str]()

    @property
    def misled_by(self) -> list[str]:
        """Who has named too many nodes that could not be reached."""
        return [namer for namer, num in self._misled.items() if num >= MAX_MISLED]

    def next(self) -> list[str]:
        """Return whom to ask now; they count as being asked."""
        chosen = list[str]()
        for was_met in (True, False):
            num_free = NUM_PARALLEL - sum((node in self._met) == was_met for node in self._running)
            waiting = [node for node in self._wanted() if (node in self._met) == was_met]
            if not was_met:  # whoever has misled least is believed first
                waiting.sort(key=self._least_misled)
            chosen += waiting[: max(0, num_free)]
        self._running.update(chosen)
        return chosen

    def answers(self, node_id: str, named: Iterable[tuple[str, Addresses]]) -> None:
        """Note that a node has answered, and whom it names."""
        self._running.discard(node_id)
        self.answered.add(node_id)
        for other, addresses in named:
            if other != self._own and other != node_id:
                self.known.setdefault(other, addresses)
                if other not in self._met:
                    self._namers.setdefault(other, set()).add(node_id)

    def fails(self, node_id: str) -> None:
        """Note that a node did not answer: where one alone has named it, that one is believed less."""
        self._running.discard(node_id)
        self._failed.add(node_id)
        namers = self._namers.get(node_id, set())
        if len(namers) == 1:
            self._misled.update(namers)

    def _wanted(self) -> list[str]:
        """The nodes worth asking that were not asked, the nearest first: of those met, and of the others."""
        ranked = sorted(
            (node for node in self.known if node not in self._failed),
            key=lambda node: place_of_node(node) ^ self._target,
        )
        sure = [node for node in ranked if node in self.answered or (node in self._met and not self._is_silent(node))]
        nearest = sure[:NUM_NEAREST_ANSWERED]
        rest = [
            node for node in ranked if node not in self.answered and node not in self._met and self._is_credible(node)
        ]
        if len(nearest) == NUM_NEAREST_ANSWERED:
            bound = place_of_node(nearest[-1]) ^ self._target
            rest = [node for node in rest if place_of_node(node) ^ self._target < bound]
        asked = self.answered | self._running
        return [node for node in nearest + rest if node not in asked]

    def _least_misled(self, node_id: str) -> int:
        return min(self._misled[namer] for namer in self._namers[node_id])

    def _is_credible(self, node_id: str) -> bool:
        return not self._is_silent(node_id) and any(
            namer not in self._doubted and self._misled[namer] < MAX_MISLED for namer in self._namers[node_id]
        )
