"""What every benchmark shares: bars, the machine's description and its roofline, peers, the last line.

A benchmark is a script `python benchmarks/NAME.py` that ends with `report(figures, bars)`: one JSON object
as the last line of its output. It measures; whether a bar holds never changes its exit status.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Bar",
    "PeerError",
    "REPOSITORY",
    "best_of_rooflines",
    "best_time_s",
    "hardware",
    "last_json_line",
    "measure_roofline",
    "peer_python",
    "report",
    "run_peer",
]

REPOSITORY = Path(__file__).resolve().parent.parent


class PeerError(Exception):
    """A peer that failed, ran over its time limit, or printed no JSON object."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure that was asked for. `value` is None where it could not be measured here, and the bar does not hold."""

    name: str
    value: float | None
    target: float
    at_least: bool = True  # False: at most

    @property
    def holds(self) -> bool:
        """Whether the figure is on the right side of its target."""
        if self.value is None:
            return False
        return self.value >= self.target if self.at_least else self.value <= self.target


def hardware() -> dict[str, Any]:
    """Describe the machine and the libraries that the figures depend on, and nothing that names the machine."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def best_time_s(work: Callable[[], object], budget_s: float) -> float:
    """Return the shortest time of one call, after a warm-up call, over as many calls as fit the budget."""
    work()
    best = float("inf")
    end = time.perf_counter() + budget_s
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure_roofline(budget_s: float = 2.0) -> dict[str, float]:
    """Measure what this CPU does at best with torch's threads: GFLOP/s of matmuls, GB/s of reads and copies.

    Call it where the benchmark itself runs, so that load by others shows on both sides.
    """
    import torch

    size = 2048
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        out = torch.empty(size, size, dtype=dtype)
        seconds = best_time_s(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), budget_s / 4)
        found[f"matmul_{name}_gflop_per_s"] = round(2 * size**3 / seconds / 1e9, 1)
    source = torch.ones(64 * 2**20)  # 256 MiB: larger than any cache of the last level that is likely here
    target = torch.empty_like(source)
    num_bytes = source.numel() * source.element_size()
    found["memory_read_gb_per_s"] = round(num_bytes / best_time_s(source.sum, budget_s / 4) / 1e9, 1)
    copy_s = best_time_s(lambda: target.copy_(source), budget_s / 4)
    found["memory_copy_gb_per_s"] = round(2 * num_bytes / copy_s / 1e9, 1)
    return found


def best_of_rooflines(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Return the higher of each two rates: a machine that was idle, or is shared, may show half of what it can."""
    return {name: max(before[name], after[name]) for name in before}


def report(figures: Mapping[str, Any], bars: Sequence[Bar]) -> None:
    """Print the benchmark's last line: hardware, figures, and each bar with whether it holds."""
    rows = [{"name": bar.name, "value": bar.value, "target": bar.target, "holds": bar.holds} for bar in bars]
    line = json.dumps({"hardware": hardware(), "figures": dict(figures), "bars": rows}, allow_nan=False)
    print(f"\n{line}", flush=True)  # some task generators print dots without ending the line


def last_json_line(text: str) -> dict[str, Any]:
    """Return the JSON object in the last line of `text` that is not blank. Raises ValueError where there is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("no output")
    found = json.loads(lines[-1])
    if not isinstance(found, dict):
        raise ValueError(f"the last line is not a JSON object: {lines[-1][:80]!r}")
    return found


def peer_python(folder: Path) -> Path | None:
    """Return the interpreter of the virtual environment in `folder`, or None where there is none."""
    python = folder / "bin" / "python"
    return python if python.exists() else None


def run_peer(
    command: Sequence[str | Path],
    *,
    time_limit_s: float,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a peer's script in a fresh process and return the last JSON object that it prints on a line.

    `env` is added to this process's environment, without what would lead the peer into our own virtual
    environment. Raises PeerError with the end of the peer's standard error if it fails or is too slow; its
    whole process group is killed then.
    """
    surroundings = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=surroundings | dict(env or {}),
        start_new_session=True,
    )
    with _killed_at_exit(process):
        try:
            output, errors = process.communicate(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            raise PeerError(f"{Path(command[1]).name}: no result within {time_limit_s:g} s") from None
    if process.returncode != 0:
        raise PeerError(f"{Path(command[1]).name}: exit status {process.returncode}: {errors.strip()[-1500:]}")
    # What a peer's libraries print may follow its report, or stand before it on the same line.
    candidates = [line[line.index("{") :] for line in output.splitlines() if "{" in line]
    try:
        return last_json_line("\n".join(candidates))
    except ValueError as error:
        raise PeerError(f"{Path(command[1]).name}: no JSON object in its output: {output.strip()[-300:]!r}") from error


@contextlib.contextmanager
def _killed_at_exit(process: subprocess.Popen[str]) -> Iterator[None]:
    """Kill whatever is left of the process's group on the way out."""
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    print("measuring this machine", file=sys.stderr)
    report({"roofline": measure_roofline()}, [])
