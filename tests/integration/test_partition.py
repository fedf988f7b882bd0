"""Six real nodes, each in a network namespace of its own: their network is cut in half for a minute, and heals."""

import pytest
from _namespaces import NamespaceError, Namespaces
from _nodes import partition

HEALED_WITHIN_S = 30.0


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_six_nodes_have_nearly_everything_half_a_minute_after_a_partition_heals():
    try:
        with Namespaces(1):
            pass
    except NamespaceError as error:
        pytest.skip(f"no network namespaces here: {error}")
    found = partition(6, within_s=HEALED_WITHIN_S)
    print(f"\n{found}")
    assert max(found["shares_parted"]) < 0.7, "it was no partition"
    assert found["healed_s"] is not None, "99 % of all groups were not everywhere in time"
