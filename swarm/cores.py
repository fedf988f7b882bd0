"""How many processors this process may use, and how many of them are left beside what computes."""

import os

import psutil

__all__ = ["num_cpus", "num_spare_cores"]


def num_cpus() -> int:
    """Return the processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_spare_cores(num_threads: int) -> int:
    """Return the cores that stay idle beside so many busy threads: a second processor of a busy core is none."""
    return max(0, min(num_cpus(), psutil.cpu_count(logical=False) or 1) - num_threads)
