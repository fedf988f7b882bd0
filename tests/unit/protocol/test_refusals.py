"""Reasons have names that cross the wire; counters are exact."""

import re

from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import MAX_REFUSAL_CODE_CHARS, MAX_REFUSAL_DETAIL_CHARS
from protocol.refusals import Reason, Refusal, RefusalCounter


def test_every_reason_is_a_code_that_a_transport_carries():
    for reason in Reason:
        assert re.fullmatch(f"[a-z_]{{1,{MAX_REFUSAL_CODE_CHARS}}}", reason.value)
        assert Reason(reason.value) is reason
        assert reason == reason.value == str(reason)


def test_only_what_no_honest_node_sends_is_held_against_a_peer():
    assert {reason for reason in Reason if reason.penalised} == {
        Reason.OVERSIZE,
        Reason.BAD_SCHEMA,
        Reason.BAD_COMPRESSION,
        Reason.BAD_SIGNATURE,
        Reason.WRONG_DIGEST,
        Reason.WRONG_IDENTITY,
        Reason.UNASKED,
        Reason.CONFLICT,
        Reason.INVALID_TASK,
    }


def test_a_refusal_says_why_and_does_not_repeat_all_that_a_peer_sent():
    refusal = Refusal(Reason.BAD_SCHEMA, "x" * 10_000)
    assert (refusal.reason, len(refusal.detail)) == (Reason.BAD_SCHEMA, MAX_REFUSAL_DETAIL_CHARS)
    assert str(Refusal(Reason.STALE)) == "stale"
    assert str(Refusal(Reason.STALE, "too old")) == "stale: too old"


@given(st.lists(st.sampled_from(Reason)))
def test_counts_are_exact_and_survive_being_saved(reasons):
    counter = RefusalCounter()
    for reason in reasons:
        counter.count(reason)
    assert counter.as_dict() == {r.value: reasons.count(r) for r in Reason if r in reasons}
    assert counter.num_rejected == sum(r.penalised for r in reasons)
    assert counter.num_rejected + counter.num_ignored == len(reasons)
    again = RefusalCounter(counter.as_dict())
    again.count(Reason.STALE, 3)
    assert again[Reason.STALE] == reasons.count(Reason.STALE) + 3
