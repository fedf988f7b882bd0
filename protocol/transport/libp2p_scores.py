"""What GossipSub thinks of a peer: the parameters and thresholds, and a memory that outlives a connection.

    first deliveries   a message that this node had not had, and accepted      up to +20
    invalid messages   rejected by the node's own admission                    -20 each, halved in half a minute
    behaviour          floods of control messages, broken promises             -1 each over 6

Below `GOSSIP` a peer is told of no messages, below `PUBLISH` its messages are not read, below `GRAYLIST` nothing of it
is. A mesh holds no peer below zero.

py-libp2p forgets a score with the connection, so that a peer could wash itself by connecting anew (go-libp2p retains
it): here a bad score stays until it has faded. Nodes of one address are not penalised: a laboratory is behind one.
"""

from libp2p.peer.id import ID
from libp2p.pubsub.score import PeerScorer, ScoreParams, TopicScoreParams

__all__ = ["GOSSIP", "GRAYLIST", "PUBLISH", "Scorer"]

GOSSIP, PUBLISH, GRAYLIST = -10.0, -50.0, -80.0
MAX_RETAINED = 4096  # bad scores of peers that are not connected
_FADED = -0.5


def _params() -> ScoreParams:
    return ScoreParams(
        p2_first_message_deliveries=TopicScoreParams(weight=1.0, cap=20.0, decay=0.95),
        p4_invalid_messages=TopicScoreParams(weight=20.0, cap=50.0, decay=0.98),
        p5_behavior_penalty_weight=1.0,
        p5_behavior_penalty_threshold=6.0,
        p5_behavior_penalty_decay=0.98,
        gossip_threshold=GOSSIP,
        publish_threshold=PUBLISH,
        graylist_threshold=GRAYLIST,
        accept_px_threshold=float("inf"),  # whom to connect to is not GossipSub's to say
    )


class Scorer(PeerScorer):  # type: ignore[misc]  # libp2p has no types that mypy can follow
    """The scores of one topic."""

    def __init__(self, topic: str) -> None:
        super().__init__(_params())
        self._topic = topic
        self._gone: dict[ID, None] = {}  # peers with a bad score that are not connected, the oldest first

    def of(self, peer: ID) -> float:
        """Return a peer's score."""
        return float(self.score(peer, [self._topic]))

    def allow_publish(self, peer: ID, topics: list[str]) -> bool:
        """Whether a peer's messages are read, and messages are sent to it: by all that counts (upstream: not all)."""
        return self.of(peer) >= PUBLISH

    def allow_gossip(self, peer: ID, topics: list[str]) -> bool:
        """Whether a peer is told which messages there are."""
        return self.of(peer) >= GOSSIP

    def is_graylisted(self, peer: ID, topics: list[str]) -> bool:
        """Whether nothing of a peer is read."""
        return self.of(peer) < GRAYLIST

    def penalize(self, peer: ID, num: float = 1.0) -> None:
        """Hold bad behaviour against a peer."""
        self.penalize_behavior(peer, num)

    def on_join_mesh(self, peer: ID, topic: str) -> None:
        """A connected peer is not gone."""
        self._gone.pop(peer, None)
        super().on_join_mesh(peer, topic)

    def remove_peer(self, peer: ID) -> None:
        """Forget a peer that has gone, unless its score is bad."""
        if self.of(peer) >= 0:
            self._gone.pop(peer, None)
            super().remove_peer(peer)
            return
        self._gone[peer] = None
        if len(self._gone) > MAX_RETAINED:
            oldest = next(iter(self._gone))
            del self._gone[oldest]
            super().remove_peer(oldest)

    def on_heartbeat(self, dt_seconds: float = 1.0) -> None:
        """Let everything fade, and forget what has faded."""
        super().on_heartbeat(dt_seconds)
        for peer in [peer for peer in self._gone if self.of(peer) > _FADED]:
            self.remove_gone(peer)

    def remove_gone(self, peer: ID) -> None:
        """Forget a peer that is not connected."""
        self._gone.pop(peer, None)
        super().remove_peer(peer)
