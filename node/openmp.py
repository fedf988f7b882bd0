"""How threads of one operation wait for each other. Must run before torch is imported.

OpenMP threads spin at barriers, hundreds of which make up a decode step. On a machine that does other work
as well, a spinning thread burns the time that the one it waits for needs, and a step takes several times
as long. A busy machine therefore gets threads that sleep, an idle one threads that spin briefly.
"""

import os
from collections.abc import MutableMapping

__all__ = ["choose_waiting"]

_BUSY_SHARE = 0.5  # load per CPU, from others, from which on threads sleep
_BRIEF_SPIN = "1000"  # iterations, a few microseconds


def choose_waiting(environment: MutableMapping[str, str] = os.environ, load_per_cpu: float | None = None) -> None:
    """Set OMP_WAIT_POLICY or GOMP_SPINCOUNT, unless the user has set either."""
    if "OMP_WAIT_POLICY" in environment or "GOMP_SPINCOUNT" in environment:
        return
    if load_per_cpu is None:
        load_per_cpu = os.getloadavg()[0] / (os.cpu_count() or 1) if hasattr(os, "getloadavg") else 0.0
    if load_per_cpu > _BUSY_SHARE:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environment["GOMP_SPINCOUNT"] = _BRIEF_SPIN
