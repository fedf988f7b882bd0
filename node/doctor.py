"""Looks whether a node can run on this machine, and how well.

Each check is one line: ok, a warning (it runs, but not as well as it could), or a failure (it does not run),
with the fix.
"""

import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from node.config import RunConfig
from swarm.cores import num_cpus
from swarm.errors import UserError

__all__ = ["Check", "examine", "run_checks"]

Status = Literal["ok", "warn", "fail"]
_GIB = 2**30
_MIN_MEMORY_BYTES = 2 * _GIB
_MIN_DISK_BYTES = _GIB
_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """What one look found."""

    name: str
    status: Status
    detail: str


def examine(config: RunConfig, *, as_json: bool) -> int:
    """Run all checks and print them. Returns 0 if none failed, else 1."""
    checks = list(run_checks(config))
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        print(json.dumps({"can_run": not failed, "checks": [asdict(check) for check in checks]}))
    else:
        table = Table.grid(padding=(0, 2))
        for check in checks:
            table.add_row(f"[{_STYLES[check.status]}]{check.status}[/]", check.name, escape(check.detail))
        console = Console()
        console.print(table)
        verdict = f"cannot run here: {', '.join(failed)}" if failed else "a node can run here"
        console.print(verdict, style="bold")
    return 1 if failed else 0


def run_checks(config: RunConfig) -> Iterator[Check]:
    """Yield one check after another; each needs only those before it to have passed."""
    yield _python()
    torch_check = _guarded("torch", _torch)
    yield torch_check
    if torch_check.status == "fail":
        return
    yield _guarded("device", lambda: _device(config))
    yield _guarded("engine", lambda: _engine(config))
    yield _guarded("bf16", _bf16)
    yield _threads(config)
    yield _memory()
    yield _disk(Path.cwd())
    yield _guarded("model", lambda: _model(config))
    yield _guarded("speed", _speed)
    yield _guarded("sandbox", _sandbox)
    yield _guarded("scorer", lambda: _scorer(config))


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """The boundary where a check that breaks becomes a failed check, with its reason."""
    try:
        return look()
    except UserError as error:
        return Check(name, "fail", str(error))
    except Exception as error:
        return Check(name, "fail", f"{type(error).__name__}: {error}")


def _python() -> Check:
    is_supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check(
        "python", "ok" if is_supported else "warn", detail + ("" if is_supported else "; 3.11 to 3.13 is tested")
    )


def _torch() -> Check:
    import torch
    import transformers

    backend = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    built_for = backend if torch.version.cuda or torch.version.hip else "CPU"
    return Check("torch", "ok", f"{torch.__version__} for {built_for}, transformers {transformers.__version__}")


def _device(config: RunConfig) -> Check:
    import torch

    from swarm.policy import resolve_device

    device = resolve_device(config.model.device)
    if device.type != "cuda":
        return Check("device", "ok", str(device))
    free, total = torch.cuda.mem_get_info(device)
    return Check(
        "device", "ok", f"{torch.cuda.get_device_name(device)}, {free / _GIB:.0f} of {total / _GIB:.0f} GiB free"
    )


def _engine(config: RunConfig) -> Check:
    from swarm.engine.choice import choose_for
    from swarm.policy import resolve_device

    choice = choose_for(config.engine, resolve_device(config.model.device))
    return Check("engine", "ok", f"{choice.backend}: {choice.reason}")


def _bf16() -> Check:
    import torch

    size = 512
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, dtype=dtype)
        seconds[dtype] = _best_of(3, partial(torch.matmul, matrix, matrix))
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio >= 1.2:
        return Check("bf16", "ok", f"{ratio:.1f} times as fast as fp32 on this CPU")
    return Check("bf16", "ok", f"{ratio:.1f} times as fast as fp32 on this CPU: fp32 is the better choice here")


def _threads(config: RunConfig) -> Check:
    import torch

    most, num_threads = num_cpus(), config.num_threads or torch.get_num_threads()
    if num_threads > most:
        return Check("threads", "warn", f"{num_threads} threads on {most} CPUs: set num_threads={most}")
    return Check("threads", "ok", f"{num_threads} on {most} CPUs, load {os.getloadavg()[0]:.1f}")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    if memory.available < _MIN_MEMORY_BYTES:
        return Check("memory", "warn", f"{detail}; {_MIN_MEMORY_BYTES / _GIB:.0f} GiB are wanted: stop other programs")
    return Check("memory", "ok", detail)


def _disk(folder: Path) -> Check:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            begin = time.perf_counter()
            file.write(b"x" * 16384)
            file.flush()
            os.fsync(file.fileno())
            sync_ms = (time.perf_counter() - begin) * 1e3
    except OSError as error:
        return Check("disk", "fail", f"cannot write to {folder}: {error.strerror}; use another folder")
    free = shutil.disk_usage(folder).free
    detail = f"{free / _GIB:.1f} GiB free in {folder}, a sync takes {sync_ms:.1f} ms"
    return Check("disk", "ok" if free >= _MIN_DISK_BYTES else "warn", detail)


def _model(config: RunConfig) -> Check:
    from swarm.policy import load_policy

    begin = time.perf_counter()
    policy = load_policy(config.model)
    num_params = sum(parameter.numel() for parameter in policy.model.parameters())
    dtype = str(next(policy.model.parameters()).dtype).removeprefix("torch.")
    seconds = time.perf_counter() - begin
    return Check(
        "model", "ok", f"{policy.name}: {num_params / 1e6:.1f} M parameters, {dtype}, loaded in {seconds:.1f} s"
    )


def _speed() -> Check:
    import torch

    matrix = torch.ones(1024, 1024)
    flops = 2 * 1024**3 / _best_of(3, lambda: matrix @ matrix)
    block = torch.ones(16 * 2**20)
    bytes_per_s = block.numel() * 4 / _best_of(3, block.sum)
    return Check("speed", "ok", f"{flops / 1e9:,.0f} GFLOP/s in fp32, memory read at {bytes_per_s / 1e9:.0f} GB/s")


def _best_of(times: int, function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _scorer(config: RunConfig) -> Check:
    """Let the real pool score a right answer and a wrong one of the run's own tasks, and an answer that loops."""
    from swarm.scoring import ScoringPool
    from swarm.tasks import build_task_set

    tasks = build_task_set(config.tasks, config.seed).heldout(8)
    with ScoringPool(config.tasks, config.scoring) as pool:
        begin = time.perf_counter()
        scores = pool.score([(task.ref, "no answer to this question") for task in tasks])
        seconds = time.perf_counter() - begin
    passed = [score for score in scores if score.reward >= 1.0]
    broken = [score.outcome for score in scores if score.outcome not in ("scored", "no_answer")]
    if passed or broken:
        return Check("scorer", "fail", f"wrong answers were not simply wrong: {len(passed)} passed, {broken}")
    return Check("scorer", "ok", f"{len(scores)} answers in {seconds * 1e3:.0f} ms, in a child process")


def _sandbox() -> Check:
    """Name the walls around scoring processes, and those that this system lacks."""
    from swarm.scoring.sandbox import sandbox_layers

    layers = sandbox_layers()
    missing = [layer for layer in ("rlimits", "landlock", "seccomp", "audit") if layer not in layers]
    detail = ", ".join(layers) + (f"; not on this system: {', '.join(missing)}" if missing else "")
    return Check("sandbox", "warn" if missing else "ok", detail)
