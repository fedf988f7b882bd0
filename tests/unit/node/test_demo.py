import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from node.demo import _exchanged, _fitting, _table


def row(number):
    return {
        "round": number, "reward_moving_average": 0.5, "num_external": 4, "num_local": 4, "reward_external_mean": 0.5,
        "num_external_missing": 0, "num_admitted": 5, "bytes_in": 12_000, "bytes_out": 13_000, "num_peers": 3,
        "pass_at_1_heldout": 0.848,
    }  # fmt: skip


NODES = [
    SimpleNamespace(name="node-1", rows=[row(number) for number in range(1, 1001)], status=None),
    SimpleNamespace(name="node-2", rows=[], status=None),
]


def lines_of(make, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(make(console))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_tables_are_whole_in_terminals_of_any_width(width):
    live = lines_of(lambda console: _table(NODES, 1000, console), width)
    columns = {name: [cell] for name, cell in _exchanged(NODES[0]).items()}
    dispensable = ("in / group used", "of batches", "out", "admitted", "published")
    end = lines_of(lambda console: _fitting(columns, dispensable, "what they exchanged", console), width)
    for lines, names in ((live, ("node-1", "1000", "0.500 ", "0.848")), (end, ("used", "4,000", "missing"))):
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        assert "…" not in text
        assert all(name in text for name in names), text
    assert "loading" in "\n".join(live)
    assert ("in / out" in "\n".join(live)) == (width >= 120)
