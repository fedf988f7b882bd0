"""Asking a neighbour for batches that this node has not heard of (`repair`): how late joiners and bridges catch up."""

from collections.abc import Sequence

from protocol.bloom import repair_request
from protocol.limits import MAX_REPAIR_RESPONSE_BYTES, SALT_BYTES
from protocol.local import Local
from protocol.neighbours import Neighbours
from protocol.refusals import Reason, Refusal
from protocol.requests import Offer, decode_repair_response, encode_repair_request
from protocol.transport.base import RequestRefused, TransportError

__all__ = ["ask_repair"]


async def ask_repair(
    local: Local, neighbours: Neighbours, node_id: str, known: Sequence[bytes], num_offers: int
) -> tuple[Offer, ...] | None:
    """Return what a neighbour offers beside the batches of these roots; None where it failed, which is counted."""
    request = repair_request(local.rng.randbytes(SALT_BYTES), known, num_offers)
    try:
        data = await local.transport.request(
            node_id,
            "repair",
            encode_repair_request(request),
            max_response_bytes=MAX_REPAIR_RESPONSE_BYTES,
            timeout_s=local.config.request_timeout_s,
        )
        offers = decode_repair_response(data).offers
        if len(offers) > num_offers:
            raise Refusal(Reason.UNASKED, "more batches than asked for")
    except Refusal as refusal:
        local.refuse(refusal.reason, blame=node_id)
        return None
    except RequestRefused:
        local.counters.requests_failed += 1
        return None
    except TransportError:
        local.counters.requests_failed += 1
        neighbours.failed(node_id)
        return None
    return offers
