"""The time, as a node believes it to be: injected, so that a simulation can let hours pass in seconds.

Waiting is asyncio's: `asyncio.sleep` on the node's event loop, whose time is virtual in a simulation.
"""

import time
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Clock", "system_clock"]

Clock: TypeAlias = Callable[[], float]  # unix seconds

system_clock: Clock = time.time
