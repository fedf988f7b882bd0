"""What the benchmarks of the swarm count: bytes of a batch as a peer decodes them, latencies, full rounds."""

import sys
from argparse import Namespace

import pytest
from _nodes import _gather_once, num_texts, quantile, real_groups
from exchange import GROUPS_PER_BATCH, batch_bytes, gather_bars, measure_bytes
from harness import REPOSITORY
from swarm_learns import full_rounds, summed_reward

from protocol.wire import decode_frame, encode_frame

CHARACTERS = 600


def test_the_text_is_of_the_length_that_figures_are_given_for_and_no_frame_is_another():
    groups = real_groups(3, 0, 2 * num_texts())
    assert {len(completion.text) for group in groups for completion in group.completions} == {CHARACTERS}
    assert {len(group.completions) for group in groups} == {8}
    frames = [encode_frame(group) for group in groups]
    assert len(set(frames)) == len(frames)
    assert [decode_frame(frame) for frame in frames] == groups


def test_texts_are_a_models_own_and_not_one_text_again():
    texts = [completion.text for group in real_groups(0, 0, num_texts()) for completion in group.completions]
    assert len(set(texts)) == len(texts) >= 8 * GROUPS_PER_BATCH


def test_a_batch_costs_its_frames_and_everything_around_them():
    found = batch_bytes(0)
    frames = [encode_frame(group) for group in real_groups(0, 0, GROUPS_PER_BATCH)]
    assert found["frames"] == sum(map(len, frames))
    # Each pull asks by a root of 32 bytes, and is given the digests of all frames, 16 bytes each.
    assert found["pulled_at_once"] > found["frames"] + 32 + 16 * len(frames)
    assert found["pulled_one_by_one"] > found["frames"] + len(frames) * (32 + 16 * len(frames))
    assert found["announced"] > 64 + 32 + 32  # signature, author, root


def test_the_figure_is_the_dearer_way():
    found = measure_bytes()
    assert found["characters_per_completion"] == CHARACTERS
    assert found["frame_bytes_per_completion"] < found["bytes_per_completion_pulled_at_once"]
    assert found["bytes_per_completion_pulled_at_once"] < found["bytes_per_completion"]


class Answers:
    """Two nodes, of which the second admits a share of what the first publishes."""

    def __init__(self, num_missing: int) -> None:
        self.num_missing = num_missing

    def all_do(self, name, limit_s, /, *, first, num, **arguments):
        counted = {"publish_s": 0.1, "bytes_in": 1000, "requests_failed": 0, "refusals": {}}
        all_numbers = range(first, first + num)
        came = list(all_numbers)[self.num_missing :]
        return [
            {"start_s": 100.0, "admitted": [[1, number, 100.75] for number in all_numbers], **counted},
            {"start_s": 100.25, "admitted": [[0, number, 100.5] for number in came], **counted},
        ]


def test_latency_runs_from_the_authors_own_start():
    found = _gather_once(Answers(0), 0, 10, Namespace(nodes=2, limit_s=1.0))
    assert found["delivered"] == 1
    assert (found["latency_p50_s"], found["latency_p95_s"], found["latency_max_s"]) == (0.5, 0.5, 0.5)


def test_what_never_came_is_no_short_latency():
    args = Namespace(nodes=2, limit_s=1.0)
    found = _gather_once(Answers(2), 0, 10, args)
    assert found["delivered"] == 0.9
    assert found["latency_p95_s"] is None
    rows = {"28_kb": [{"latency_p95_s": 0.1}, found], "256_kb": [{"latency_p95_s": 0.1}, {"latency_p95_s": 0.3}]}
    assert [(bar.value, bar.holds) for bar in gather_bars(rows)] == [(None, False), (0.3, True)]


def test_quantiles_are_values_that_were_measured():
    assert [quantile([3.0, 1.0, 2.0], share) for share in (0.0, 0.5, 0.95, 1.0)] == [1.0, 2.0, 3.0, 3.0]


def test_a_round_is_full_with_all_external_groups_and_every_round_counts():
    rows = [{"num_external": num, "reward_mean": 0.25} for num in (0, 3, 4, 4)]
    assert full_rounds(rows, 4) == 0.5
    assert full_rounds(rows, 4, after=2) == 1.0
    assert summed_reward(rows) == 1.0


@pytest.mark.parametrize("script", sorted((REPOSITORY / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_no_benchmark_hides_a_module_that_others_import(script):
    """A script's folder is the first place where it looks for modules."""
    assert script.stem not in sys.stdlib_module_names
    assert not (REPOSITORY / script.stem).exists()
