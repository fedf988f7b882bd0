"""Run every benchmark in turn, keep each one's report in `benchmarks/results/`, and print all bars at the end.

    python benchmarks/run_all.py [NAME...]

A benchmark that crashes or ends without a report makes the exit status 1, after the others have run. A bar
that does not hold is shown and is not a failure: it is a measurement.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import REPOSITORY, last_json_line

__all__ = ["names", "run"]

_NOT_BENCHMARKS = {"harness", "run_all"}
_REPORT_KEYS = {"hardware", "figures", "bars"}


def names(folder: Path) -> list[str]:
    """Return the benchmarks in a folder: every public script that is not part of the harness."""
    found = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    return sorted(found - _NOT_BENCHMARKS)


def run(script: Path, results: Path) -> dict[str, Any]:
    """Run one benchmark, showing what it prints, and return its report. Raises ValueError if it left none."""
    lines = []
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        raise ValueError(f"exit status {process.returncode}")
    found = last_json_line("".join(lines))
    if set(found) != _REPORT_KEYS:
        raise ValueError(f"the last line has the keys {sorted(found)}, not {sorted(_REPORT_KEYS)}")
    results.mkdir(parents=True, exist_ok=True)
    (results / f"{script.stem}.json").write_text(lines[-1])
    return found


def main(arguments: list[str]) -> int:
    """Run what was asked for and return the exit status."""
    folder = REPOSITORY / "benchmarks"
    known = names(folder)
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        print(f"error: no benchmark is named {', '.join(unknown)}: choose from {', '.join(known)}", file=sys.stderr)
        return 2
    summary, crashed = [], []
    for name in arguments or known:
        print(f"== {name}", flush=True)
        try:
            found = run(folder / f"{name}.py", folder / "results")
        except ValueError as error:
            crashed.append(f"{name}: {error}")
            continue
        for bar in found["bars"]:
            mark = "holds" if bar["holds"] else "DOES NOT HOLD" if bar["value"] is not None else "not measured"
            summary.append(f"{name}: {bar['name']}: {bar['value']} (target {bar['target']}): {mark}")
    print("== bars", *summary, sep="\n")
    for line in crashed:
        print(f"CRASHED {line}", file=sys.stderr)
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
