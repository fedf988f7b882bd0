"""Half an hour of real time with three nodes that learn from each other: memory and file descriptors are flat.

SOAK_MINUTES changes how long; what is remembered for a while is forgotten after ten minutes.
"""

import os
import statistics
import time
from collections import defaultdict

import psutil
import pytest
from _processes import LiveSwarm

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
SETTLED_AFTER = 0.4  # of the time: twelve minutes of thirty
EVERY_S = 10.0
MAX_GROWTH = 0.05  # of memory, from when it has settled to the end, by the line that fits best
MAX_MORE_FDS = 2  # in the median: connections come and go
MIB = 2**20


def sample(nodes):
    """Resident memory and open files of every part of every node."""
    found = defaultdict(lambda: [0, 0])
    for node in nodes:
        for kind, process in node.family():
            try:
                found[node.name, kind][0] += process.memory_info().rss
                found[node.name, kind][1] += process.num_fds()
            except psutil.NoSuchProcess:
                continue  # a scoring process that was replaced
    return found


def growth(values):
    """By how much the best line through the values rises from the first to the last, as a share of their mean."""
    slope, _ = statistics.linear_regression(range(len(values)), values)
    return slope * (len(values) - 1) / statistics.fmean(values)


@pytest.mark.soak
@pytest.mark.timeout(int(60 * MINUTES) + 600)
def test_memory_and_descriptors_are_flat_with_three_nodes(tmp_path):
    settings = ["rounds=1000000", "evaluation.num_items=32", "checkpoint.interval_s=20"]
    arguments = ["--model", "tiny", *(word for setting in settings for word in ("--set", setting))]
    with LiveSwarm(tmp_path) as swarm:
        nodes = swarm.join(["one", "two", "three"], *arguments)
        for node in nodes:
            node.wait(lambda node=node: any(row["num_external"] for row in node.rows()[-20:]), "groups of others")
        began_s, sizes, files = time.monotonic(), defaultdict(list), defaultdict(list)
        while time.monotonic() < began_s + 60 * MINUTES:
            time.sleep(EVERY_S)
            for part, (rss, num_fds) in sample(nodes).items():
                sizes[part].append(rss)
                files[part].append(num_fds)
            assert [node.process.poll() for node in nodes] == [None] * 3
        rounds = [len(node.rows()) for node in nodes]
        shares = [statistics.fmean(row["num_external"] / 4 for row in node.rows()[-200:]) for node in nodes]
        restarts = [node.swarm()["transport_restarts"] for node in nodes]
        assert [node.stop(within_s=120) for node in nodes] == [143] * 3  # beside other work, at the lowest priority

    print(
        f"\n{MINUTES:g} minutes, rounds {rounds}, p2pd was restarted {sum(restarts)} times; "
        f"of the groups wanted {[f'{share:.0%}' for share in shares]} were there"
    )
    grown, more_fds = {}, {}
    for part, values in sorted(sizes.items()):
        first = int(SETTLED_AFTER * len(values))
        settled, later = values[first:], files[part][first:]
        grown[part] = growth(settled)
        half = len(later) // 2
        more_fds[part] = statistics.median(later[half:]) - statistics.median(later[:half])
        print(
            f"{' '.join(part):<14} memory {settled[0] / MIB:6.1f} -> {settled[-1] / MIB:6.1f} MiB, "
            f"growth {grown[part]:+.1%}; open files {min(later)} to {max(later)}"
        )
    assert min(shares) > 0, "they have learned from each other to the end"
    assert max(grown.values()) <= MAX_GROWTH, grown
    assert max(more_fds.values()) <= MAX_MORE_FDS, more_fds
