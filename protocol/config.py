"""What a node chooses for itself in a swarm. Frozen, unknown keys refused, units in names.

What all nodes must agree on is in `limits`; where a node listens, and on which transport, is the process's.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from protocol.fields import is_label
from protocol.limits import FRESHNESS_S, MAX_OFFERS, MAX_PEERS, MAX_SWARM_ID_BYTES

__all__ = ["SwarmConfig"]


class SwarmConfig(BaseModel):
    """One node's part in a swarm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    swarm_id: str = Field("main", min_length=1, description="which swarm; nodes of different swarms ignore each other")
    peers: tuple[str, ...] = Field((), description="addresses of any live peers to join through; empty: start a swarm")

    # What is sampled.
    reserve_groups: int = Field(
        5, ge=0, description="unused informative groups kept ready, more where rounds are quick; traffic follows use"
    )
    max_author_share: float = Field(
        0.25, gt=0, le=1, description="of a batch from one author, while four or more authors contribute"
    )
    max_newcomer_share: float = Field(
        0.25, gt=0, le=1, description="of a batch from all authors without a record, while four or more have one"
    )
    min_useful_groups: int = Field(
        6, ge=1, description="useful groups, halved every half-life, that make a record of an author"
    )
    probation_s: float = Field(600, ge=0, description="over which an author must have been useful for a record")
    freshness_s: float = Field(FRESHNESS_S, gt=0, le=FRESHNESS_S, description="older batches are not used")
    max_batches_per_author: int = Field(
        32, ge=1, le=1024, description="newest live batches of one author that are remembered; older ones are stale"
    )

    # Links.
    num_outbound: int = Field(6, ge=1, le=64, description="neighbours that this node chooses")
    max_inbound: int = Field(16, ge=0, le=256, description="neighbours that choose this node")
    min_outbound: int = Field(3, ge=1, description="below this it looks for more at once")
    rotation_s: float = Field(300, gt=0, description="how often one chosen neighbour is exchanged for another")
    ping_s: float = Field(20, gt=0, description="silence after which a chosen neighbour is asked whether it is there")
    max_known_nodes: int = Field(1024, ge=16, description="node records kept in memory")
    max_remembered_peers: int = Field(64, ge=0, description="node records kept on disk")

    # Gossip.
    announce_fanout: int = Field(4, ge=1, description="neighbours that are told of an own batch")
    relay_fanout: int = Field(2, ge=0, description="neighbours that are told of an admitted batch of another author")
    repair_s: float = Field(5, gt=0, description="how often a node that lacks groups asks a neighbour for batches")
    max_repair_s: float = Field(15, gt=0, description="the same, while that brings nothing new")
    max_offers: int = Field(128, ge=1, le=MAX_OFFERS, description="announcements in one message")
    max_peers_told: int = Field(8, ge=1, le=MAX_PEERS, description="node records in one answer")
    max_live_batches: int = Field(2048, ge=16, description="announcements kept in memory")
    max_store_bytes: int = Field(64 * 2**20, ge=2**20, description="frames kept for others, own and admitted")
    max_pull_bytes: int = Field(2**20, ge=2**10, description="frames asked for in one request")
    num_pulls: int = Field(4, ge=1, le=64, description="pulls under way at one time")
    pull_timeout_s: float = Field(10, gt=0, description="for one pull; a slower holder is left for another")
    request_timeout_s: float = Field(5, gt=0, description="for every other request")
    max_served_bytes_per_s: float = Field(4 * 2**20, gt=0, description="frames given to one peer, on average")

    # Admission.
    max_rescore_queue: int = Field(256, ge=1, description="pulled groups that wait for re-scoring")
    num_rescore_workers: int = Field(1, ge=1, le=16, description="groups that are re-scored at one time")
    max_rescore_share: float = Field(
        0.25, gt=0, le=1, description="of the places in that queue that one author may hold"
    )
    max_announcements_per_s: float = Field(
        4, gt=0, description="new announcements taken from one neighbour, on average"
    )
    max_newcomers_per_s: float = Field(
        20, gt=0, description="signatures of authors without a record that are checked, on average"
    )
    max_hellos_per_s: float = Field(5, gt=0, description="greetings of strangers that are checked, on average")

    # Reputation.
    half_life_s: float = Field(600, gt=0, description="in which what a node has learnt about a peer is halved")
    min_reputation: float = Field(-10, lt=0, description="below it a peer is disconnected and refused")
    ban_s: float = Field(600, gt=0, description="for how long")

    # Directory.
    refresh_s: float = Field(
        100, gt=0, le=120, description="how often the node's own record is renewed, in one of its two places"
    )
    save_s: float = Field(30, gt=0, description="how often peers, reputation and pool are saved")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.swarm_id.encode()) > MAX_SWARM_ID_BYTES:
            raise ValueError(f"swarm_id has at most {MAX_SWARM_ID_BYTES} bytes")
        if not is_label(self.swarm_id):
            raise ValueError("swarm_id has control characters, as a tab or a line break: leave them out")
        if self.min_outbound > self.num_outbound:
            raise ValueError("min_outbound is at most num_outbound")
        return self
