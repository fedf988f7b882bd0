"""Who is there, as far as this node knows: signed node records with where they were heard from. Pure data.

Records come from greetings, from neighbours that were asked (peer exchange), from the DHT (`shards`) and from disk.
A record is a hint where to find a node and nothing more. Whoever told of many nodes must not thereby choose this
node's neighbours. So every node has a *root*: how the first word of it came here, by what a person typed, from disk,
from the DHT, or by itself when it connected; and whom a peer tells of has the root of that peer. Names that somebody
makes up have one root, however many they are and however many of them tell of the others. When a neighbour is chosen,
the root that gave fewest is drawn first, then the *source* that told of it, then a node; and one source can fill no
more than a quarter of the table.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from protocol.messages import NodeRecord

__all__ = ["GIVEN", "MAX_TOLD_AGE_S", "NEARBY", "REMEMBERED", "Directory", "KnownNode"]

MAX_TOLD_AGE_S = 1200.0  # an older record is told to nobody, and believed of nobody
GIVEN = "given"  # a source: addresses that a person typed
NEARBY = "nearby"  # a source: what the transport found on the local network
REMEMBERED = "remembered"  # a source: this node's own disk
_DHT = "dht"  # a root, of all sources that are shards
_CAME = "came"  # a root: nodes that have connected to this one
MAX_FAILURES = 4  # in a row, after which a node is forgotten
RETRY_S = 10.0  # after one failure; doubled with every further one
_MAX_SOURCE_SHARE = 0.25
_MAX_SOURCES = 4  # of one node that are remembered


@dataclass(slots=True)
class KnownNode:
    """One node, and what became of trying to reach it."""

    record: NodeRecord
    root: str  # GIVEN, NEARBY, REMEMBERED, _DHT, _CAME, or a peer that was not known itself
    sources: list[str]  # GIVEN, NEARBY, REMEMBERED, "dht/<salt>", or node ids of who told of it; the first told first
    heard_at_s: float  # unix seconds: when a record of it came last
    reached_at_s: float | None = None  # when it answered last
    num_failures: int = 0  # in a row
    retry_at_s: float = 0.0

    @property
    def source(self) -> str:
        """Who told of it first, on whose account it is kept."""
        return self.sources[0]


class Directory:
    """Known nodes by node id, without this node itself. Times are unix seconds."""

    def __init__(self, *, max_nodes: int, own_id: str, rng: random.Random) -> None:
        self._max_nodes, self._own_id, self._rng = max_nodes, own_id, rng
        self._nodes: dict[str, KnownNode] = {}
        self._num_by_source = Counter[str]()

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._nodes

    def get(self, node_id: str) -> KnownNode | None:
        """Return what is known of a node."""
        return self._nodes.get(node_id)

    def nodes(self) -> list[KnownNode]:
        """Every known node."""
        return list(self._nodes.values())

    def add(self, record: NodeRecord, source: str, now_s: float) -> bool:
        """Take a record whose signature is good. Returns whether it is of a node that was not known."""
        if record.node_id == self._own_id:
            return False
        known = self._nodes.get(record.node_id)
        if known is not None:
            if record.created_at_ms > known.record.created_at_ms:
                known.record, known.heard_at_s = record, now_s
            if source not in known.sources and len(known.sources) < _MAX_SOURCES:
                known.sources.append(source)
            return False
        if self._num_by_source[source] >= max(1, self._max_nodes * _MAX_SOURCE_SHARE):
            self._forget_one(lambda node: node.source == source)
        elif len(self._nodes) >= self._max_nodes:
            self._forget_one(lambda node: True)
        self._nodes[record.node_id] = KnownNode(record, self._root(record.node_id, source), [source], now_s)
        self._num_by_source[source] += 1
        return True

    def root_of(self, node_id: str) -> str:
        """Return how the first word of a node came here; nothing where it is not known."""
        known = self._nodes.get(node_id)
        return known.root if known is not None else ""

    def num_known_widely(self, max_per_source: int) -> int:
        """Count nodes, but no more for each source that told of them first: how much is known, whoever floods."""
        return sum(min(num, max_per_source) for num in self._num_by_source.values())

    def reached(self, node_id: str, now_s: float) -> None:
        """Note that a node has answered."""
        known = self._nodes.get(node_id)
        if known is not None:
            known.reached_at_s, known.num_failures, known.retry_at_s = now_s, 0, 0.0

    def failed(self, node_id: str, now_s: float) -> None:
        """Note that a node could not be reached: it is tried again later, and in the end forgotten."""
        known = self._nodes.get(node_id)
        if known is None:
            return
        known.num_failures += 1
        known.retry_at_s = now_s + RETRY_S * 2 ** (known.num_failures - 1)
        if known.num_failures >= MAX_FAILURES and known.source != REMEMBERED:
            self.forget(node_id)

    def later(self, node_id: str, until_s: float) -> None:
        """Leave a node alone for a while: it is there, and has no place for this one."""
        known = self._nodes.get(node_id)
        if known is not None:
            known.retry_at_s = until_s

    def forget(self, node_id: str) -> None:
        """Drop a node."""
        known = self._nodes.pop(node_id, None)
        if known is not None:
            self._num_by_source[known.source] -= 1
            if not self._num_by_source[known.source]:
                del self._num_by_source[known.source]

    def choose(
        self, now_s: float, *, exclude: Collection[str], chosen: Mapping[str, str]
    ) -> tuple[KnownNode, str] | None:
        """Draw a node to connect to, with its source. `chosen` are the neighbours that there are, each with its own."""
        by_root: dict[str, dict[str, list[KnownNode]]] = {}
        for node_id, known in self._nodes.items():
            if node_id not in exclude and known.retry_at_s <= now_s and known.record.addresses:
                by_source = by_root.setdefault(known.root, {})
                for source in known.sources:
                    by_source.setdefault(source, []).append(known)
        if not by_root:
            return None
        by_source = by_root[self._draw_fewest(by_root, Counter(map(self.root_of, chosen)))]
        source = self._draw_fewest(by_source, Counter(chosen.values()))
        return self._rng.choice(by_source[source]), source

    def _draw_fewest(self, names: Collection[str], used: Counter[str]) -> str:
        fewest = min(used[name] for name in names)
        return self._rng.choice(sorted(name for name in names if used[name] == fewest))

    def _root(self, node_id: str, source: str) -> str:
        if source == node_id:
            return _CAME
        return self.root_of(source) or source.split("/")[0]

    def tell(self, num_nodes: int, now_s: float, *, exclude: str, near: Collection[str]) -> list[NodeRecord]:
        """Draw records for a peer that asks who is there: of nodes that were reached, or whose record is fresh.

        Half of them are of `near` ones, the node's neighbours: a few that it has tried say more than many that others
        have told of, who may have filled the table with themselves.
        """
        horizon_ms = (now_s - MAX_TOLD_AGE_S) * 1000
        worth = [
            known.record
            for node_id, known in self._nodes.items()
            if node_id != exclude and known.record.created_at_ms >= horizon_ms and not known.num_failures
        ]
        self._rng.shuffle(worth)
        tried = [record for record in worth if record.node_id in near][: -(-num_nodes // 2)]
        told = {record.node_id for record in tried}
        return tried + [record for record in worth if record.node_id not in told][: num_nodes - len(tried)]

    def worth_remembering(self, num_nodes: int) -> list[NodeRecord]:
        """The records to keep on disk: of nodes that were reached last, then those heard of last."""
        ranked = sorted(self._nodes.values(), key=lambda k: (k.reached_at_s or 0.0, k.heard_at_s), reverse=True)
        return [known.record for known in ranked[:num_nodes]]

    def expire(self, now_s: float, *, keep: Iterable[str]) -> None:
        """Forget nodes that nobody has heard of for long; neighbours and what is on disk stay."""
        kept = set(keep)
        for node_id, known in list(self._nodes.items()):
            last_s = max(known.heard_at_s, known.reached_at_s or 0.0)
            if now_s - last_s > MAX_TOLD_AGE_S and node_id not in kept and known.source != REMEMBERED:
                self.forget(node_id)

    def _forget_one(self, may_go: Callable[[KnownNode], bool]) -> None:
        """Make room: a node that was never reached, and among those any."""
        candidates = [(known.reached_at_s or 0.0, node_id) for node_id, known in self._nodes.items() if may_go(known)]
        oldest_s = min(candidates)[0]
        self.forget(self._rng.choice([node_id for reached_s, node_id in candidates if reached_s == oldest_s]))
