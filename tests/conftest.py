"""What all tests share."""

import pytest


@pytest.fixture(autouse=True)
def processes_are_measured_as_their_test_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start no process with coverage in a test that is marked `no_cover`.

    Coverage makes Python two to three times slower, and half of it makes up the start of a node. What long tests
    run again and again is measured where it is run once.
    """
    if request.node.get_closest_marker("no_cover"):
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
