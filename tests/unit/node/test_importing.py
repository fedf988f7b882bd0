import gc
import sys
from types import SimpleNamespace

import pytest

from node.cli import run
from node.importing import importing
from swarm.errors import UserError


@pytest.fixture(autouse=True)
def unfrozen():
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_nothing_is_collected_within_and_what_came_is_left_out_afterwards():
    before = gc.get_stats()
    with importing():
        came = [[number] for number in range(10_000)]
        assert gc.get_stats() == before
    assert gc.isenabled()
    assert gc.get_freeze_count() > len(came)
    assert not any(each is came for each in gc.get_objects())


def test_a_block_within_a_block_leaves_the_end_to_the_outer_one():
    with importing():
        with importing():
            pass
        assert not gc.isenabled()
        assert gc.get_freeze_count() == 0
    assert gc.isenabled()


def test_what_cannot_be_imported_leaves_the_collector_at_work():
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_node_imports_its_parts_so(monkeypatch, tmp_path):
    def build_parts(*_):
        found.append((gc.isenabled(), gc.get_freeze_count()))
        raise UserError("enough")

    found = []
    monkeypatch.setitem(sys.modules, "node.parts", SimpleNamespace(build_parts=build_parts))
    monkeypatch.chdir(tmp_path)
    assert run(["silo"]) == 2
    [(is_enabled, num_frozen)] = found
    assert is_enabled
    assert num_frozen > 0
