"""What a member shows of itself: plain data for `swarm-node stats`, metrics and tests. Changes nothing."""

from typing import TYPE_CHECKING, Any

from protocol.counters import Counters, Means
from protocol.messages import PROTOCOL_VERSION
from protocol.refusals import Reason

if TYPE_CHECKING:
    from protocol.member import Member

__all__ = ["SCHEMA_VERSION", "status_of"]

SCHEMA_VERSION = 1  # grows when a key changes its meaning or goes away
_BUSY_QUEUE_SHARE = 0.9


def status_of(member: "Member") -> dict[str, Any]:
    """Return everything that is known, with numbers, strings, lists and dicts only. Times are seconds."""
    local, now_s = member.local, member.local.clock()
    counters, traffic = local.counters, local.transport.traffic
    return {
        "schema_version": SCHEMA_VERSION,
        "protocol_version": list(PROTOCOL_VERSION),
        "node_id": local.node_id,
        "swarm_id": local.config.swarm_id,
        "transport": local.transport.name,
        "addresses": list(local.transport.addresses),
        "state": _join_state(member),
        "given_peers": dict(member.neighbours.given),
        "num_peers": len(member.neighbours.ids),
        "num_outbound": len(member.neighbours.outbound()),
        "num_inbound": len(member.neighbours.inbound()),
        "peers": [
            {
                "node_id": link.node_id,
                "direction": link.direction,
                "rtt_ms": None if link.rtt_ms is None else round(link.rtt_ms, 2),
                "since_s": round(now_s - link.since_s, 3),
                "heard_s": round(now_s - link.heard_at_s, 3),
                "role": link.record.role,
                "model": link.record.model,
                "software": link.record.software,
                "reputation": round(local.reputation.score(link.node_id, now_s), 3),
                "source": link.source,
            }
            for link in member.neighbours.ids.values()
        ],
        "num_known_nodes": len(member.directory),
        "num_banned": len(local.reputation.banned(now_s)),
        "num_record_holders": member.upkeep.num_holders,
        "bytes_in": traffic.bytes_in,
        "bytes_out": traffic.bytes_out,
        "requests_in": traffic.num_requests_in,
        "requests_out": traffic.num_requests_out,
        "requests_failed": counters.requests_failed,
        "transport_restarts": traffic.num_restarts,
        "transport_details": local.transport.details(),
        **_counted(counters),
        "authors_sampled": len(set(counters.authors_sampled)),
        "announcements_duplicate": local.refusals[Reason.DUPLICATE],
        "refusals": local.refusals.as_dict(),
        "num_rejected": local.refusals.num_rejected,
        "num_ignored": local.refusals.num_ignored,
        "pool_groups": len(member.pool),
        "pool_reserve": member.pulling.reserve,
        "pool_bytes": member.pool.num_bytes,
        "pool_expired": member.pool.num_expired,
        "live_batches": len(member.announcements),
        "store_bytes": member.store.num_bytes,
        "frames_under_way": member.pulling.num_under_way,
        "rescore_queue": len(member.pulling.queue),
        "staleness": _summary(counters.age_of_sampled_s),
        "latency": _summary(counters.latency_s),
        "reward_of_admitted": counters.reward_of_admitted.mean,
        "clock_offset_s": member.clocks.median_s,
        "warnings": _warnings(member),
    }


def _counted(counters: Counters) -> dict[str, int]:
    names = (
        "batches_published",
        "groups_published",
        "announcements_seen",
        "announcements_sent",
        "batches_heard",
        "batches_admitted",
        "batches_relayed",
        "groups_admitted",
        "groups_sampled",
        "groups_missing",
        "frames_pulled",
        "frames_failed",
        "frames_served",
        "pulls_from_neighbours",
        "pulls_from_strangers",
        "repairs_asked",
        "repairs_answered",
    )
    return {name: getattr(counters, name) for name in names}


def _summary(values: Means) -> dict[str, float | None]:
    """Of the last values, in seconds."""
    return {
        "mean_s": values.mean,
        "p50_s": values.quantile(0.5),
        "p99_s": values.quantile(0.99),
        "max_s": values.largest,
    }


def _join_state(member: "Member") -> str:
    """joined: has neighbours; joining: knows addresses to try; alone: knows none, and waits to be found."""
    if member.neighbours.ids:
        return "joined"
    return "joining" if member.neighbours.given or len(member.directory) else "alone"


def _warnings(member: "Member") -> list[str]:
    lines = []
    local, neighbours = member.local, member.neighbours
    if not neighbours.ids:
        known = len(neighbours.given) + len(member.directory)
        if known:
            lines.append(f"no peers: none of {known} known addresses answers; learning alone, and trying again")
        else:
            lines.append("no peers: none is known; others join through one of this node's addresses")
    elif len(neighbours.outbound()) < min(local.config.min_outbound, len(member.directory)):
        lines.append(f"few peers: {len(neighbours.outbound())} chosen, {local.config.min_outbound} wanted")
    for address, outcome in neighbours.given.items():
        if outcome.startswith(("refused", "not taken", "not an address")):
            lines.append(f"peer {address}: {outcome}")
    if member.clocks.warning is not None:
        lines.append(member.clocks.warning)
    if len(member.pulling.queue) > _BUSY_QUEUE_SHARE * local.config.max_rescore_queue:
        lines.append("re-scoring is slower than groups arrive: the node takes fewer of them")
    return lines
