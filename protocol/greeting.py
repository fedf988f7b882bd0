"""What a hello must say for two nodes to talk: same swarm, same major version, clocks that agree, its own record."""

from protocol.limits import MAX_FUTURE_SKEW_S
from protocol.local import Local
from protocol.messages import NodeRecord
from protocol.refusals import Reason, Refusal
from protocol.requests import Hello
from protocol.signing import verify_node_record

__all__ = ["check_hello"]


def check_hello(hello: Hello, sender: str, local: Local, known: NodeRecord | None) -> NodeRecord:
    """Return the sender's record. Raises Refusal, whose detail names the fix.

    `known` is what the directory has of the sender: the same bytes are not verified twice.
    """
    if hello.swarm_id != local.config.swarm_id:
        raise Refusal(
            Reason.OTHER_SWARM,
            f"this is swarm {local.config.swarm_id!r}, you are of {hello.swarm_id!r}: set --swarm-id",
        )
    ahead_s = hello.now_ms / 1000 - local.clock()
    if abs(ahead_s) > MAX_FUTURE_SKEW_S:
        side = "ahead of" if ahead_s > 0 else "behind"
        raise Refusal(
            Reason.CLOCK_SKEW,
            f"your clock is {abs(ahead_s):.0f} s {side} mine: set it, for example with `timedatectl set-ntp true`",
        )
    if hello.record.node_id != sender:
        raise Refusal(Reason.WRONG_IDENTITY, "the record in this hello is another node's")
    if hello.record.transport != local.transport.name:
        raise Refusal(
            Reason.OTHER_TRANSPORT,
            f"this node's transport is {local.transport.name!r}, yours is {hello.record.transport!r}: use the same",
        )
    if known is None or known.encoded != hello.record.encoded:
        verify_node_record(local.config.swarm_id, hello.record)
    return hello.record
