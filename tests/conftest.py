"""What all tests share."""

import os
import sys
import threading

import pytest

PROCESS_CONFIG = "COVERAGE_PROCESS_CONFIG"  # makes a process measure itself


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item):
    """Measure the coverage neither of a test that is marked `no_cover`, nor of a process that it starts.

    Coverage makes Python two to three times slower, and half of it makes up the start of a node. What long tests
    run again and again is measured where it is run once. In a worker of xdist pytest-cov measures twice, and the
    marker alone stops one of the two.
    """
    if item.get_closest_marker("no_cover") is None:
        return (yield)
    tracers, process_config = (sys.gettrace(), threading.gettrace()), os.environ.pop(PROCESS_CONFIG, None)
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracers[0])
        threading.settrace(tracers[1])
        if process_config is not None:
            os.environ[PROCESS_CONFIG] = process_config
