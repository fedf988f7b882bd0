"""The roofline of benchmarks/engine.py, against sums done by hand."""

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks" / "engine.py"
_SPEC = importlib.util.spec_from_file_location("benchmark_engine", _PATH)
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)

SHAPE = bench.Shape(
    num_matmul_parameters=1000,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=5,
    vocab_size=10,
    bytes_per_value=2,
)


def test_step_counts_weights_once_and_the_cache_of_every_request():
    assert SHAPE.step_bytes(3, 7) == (1000 + 2 * 2 * 2 * 5 * 7) * 2 + 4 * 10 * 3
    assert SHAPE.step_flops(3, 7) == 2 * 1000 * 3 + 4 * 2 * 4 * 5 * 7


def test_limits_follow_requests_as_they_finish():
    workload = bench.Workload(prompts=((1, 2, 3), (4, 5, 6)), lengths=(2, 3))
    # Two decode steps: both requests over 4 tokens each, then the longer one over 5.
    steps = [(2, 8), (1, 5)]
    found = bench.limits(SHAPE, workload, gb_per_s=1.0, gflop_per_s=1.0)
    assert found["bytes"] == (1320 * 2 + 80) + (1200 * 2 + 40)
    assert found["flops"] == (4000 + 1280) + (2000 + 800)
    assert found["bytes"] == sum(SHAPE.step_bytes(*step) for step in steps)
    # The first step is bound by FLOPs (5280 against 2720), the second as well (2800 against 2440).
    assert found["seconds"] == pytest.approx((5280 + 2800) / 1e9)
    slow_memory = bench.limits(SHAPE, workload, gb_per_s=0.5, gflop_per_s=1.0)
    assert slow_memory["seconds"] == pytest.approx((2 * 2720 + 2 * 2440) / 1e9)


def test_work_of_another_length_is_refused():
    bench.check_lengths([4, 8], (4, 8))
    with pytest.raises(RuntimeError, match="completions of"):
        bench.check_lengths([4, 7], (4, 8))


def test_every_bar_of_the_issue_is_reported_even_unmeasured():
    bars = bench.make_bars({})
    assert [bar.target for bar in bars] == [5.0, 5.0, 1.5, 1.5, *[1.5] * 11, 3.0, 4.0, 0.8, 0.8, 0.8, 0.8]
    assert not any(bar.holds for bar in bars)
    figures = {"tiny": {"mixed_32": {"times_as_fast_as": {bench.GENERATE: 6.0}}}}
    assert [bar.value for bar in bench.make_bars(figures)].count(6.0) == 1
