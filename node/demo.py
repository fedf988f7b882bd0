"""`swarm-node demo`: a swarm on this machine, from real processes. One bootstrap, and nodes that learn together.

The processes are what a person would start by hand, with `--json`, so that their rounds can be read.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from node.display import duration
from node.live import sparkline
from node.options import new_run_dir
from node.processes import NodeProcess, end_all
from node.stats import size
from swarm.errors import UserError

__all__ = ["DemoFailed", "run_demo"]

_LISTEN: Final = "/ip4/127.0.0.1/tcp/0"
_START_WITHIN_S: Final = 120.0
_POLL_S: Final = 0.25
_STATUS_INTERVAL_S: Final = 2.0
_LINE_INTERVAL_S: Final = 10.0
_CHART_WIDTH: Final = 32
_WIDEST: Final = 1000  # columns of a terminal that a table is measured for


class DemoFailed(UserError):
    """A process of the demonstration has ended before its time."""


def run_demo(num_nodes: int, rounds: int, run_dir: Path | None, out: TextIO) -> int:
    """Run the demonstration to its end, or to Ctrl-C. No process outlives it. Returns the exit status."""
    folder = (run_dir if run_dir is not None else new_run_dir("demo")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise DemoFailed(f"{folder} is not empty: name another folder with --run-dir")
    console = Console(file=out)
    processes: list[NodeProcess] = []
    # SIGINT as well: a shell starts what it puts in the background with Ctrl-C switched off.
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    began_s = time.monotonic()
    try:
        console.print("starting a bootstrap; loading takes some seconds", highlight=False)
        bootstrap = NodeProcess("bootstrap", folder, "bootstrap", "--listen", _LISTEN)
        processes.append(bootstrap)
        address = _first_address(bootstrap)
        console.print(f"starting {num_nodes} nodes: swarm-node join --model tiny --peers {address}", highlight=False)
        common = ("--model", "tiny", "--rounds", str(rounds), "--peers", address, "--listen", _LISTEN)
        nodes = [
            NodeProcess(f"node-{number}", folder, "join", *common, "--seed", str(number))
            for number in range(1, num_nodes + 1)
        ]
        processes += nodes
        _follow(processes, nodes, rounds, console)
    except KeyboardInterrupt:
        console.print("stopping all of them", highlight=False)
        return 130
    finally:
        _end_all(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    _conclude(nodes, folder, time.monotonic() - began_s, console)
    return 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_all(processes: Sequence[NodeProcess]) -> None:
    """Stop every process and wait for its end; another Ctrl-C meanwhile changes nothing."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_all(processes)
    finally:
        signal.signal(signal.SIGINT, before)


def _first_address(bootstrap: NodeProcess) -> str:
    """Wait until the bootstrap listens; return where."""
    deadline_s = time.monotonic() + _START_WITHIN_S
    while bootstrap.address is None:
        _refuse_ended([bootstrap])
        if time.monotonic() > deadline_s:
            raise DemoFailed(f"the bootstrap does not start: {bootstrap.last_words()}; see {bootstrap.log}")
        time.sleep(_POLL_S)
    return bootstrap.address


def _refuse_ended(processes: Sequence[NodeProcess]) -> None:
    for process in processes:
        if process.status_code not in (None, 0):
            raise DemoFailed(f"{process.name} has ended: {process.last_words()}; see {process.log}")


def _follow(processes: Sequence[NodeProcess], nodes: Sequence[NodeProcess], rounds: int, console: Console) -> None:
    """Show the nodes until all are done."""
    asked_s = said_s = time.monotonic()
    shows_table = console.is_terminal and not console.is_dumb_terminal
    with Live(_table(nodes, rounds, console), console=console, auto_refresh=False, transient=True) as live:
        while any(node.status_code is None for node in nodes):
            _refuse_ended(processes)
            now_s = time.monotonic()
            if now_s - asked_s >= _STATUS_INTERVAL_S:
                asked_s = now_s
                for node in nodes:
                    if node.status_code is None:
                        node.ask()
            if shows_table:
                live.update(_table(nodes, rounds, console), refresh=True)
            elif now_s - said_s >= _LINE_INTERVAL_S:
                said_s = now_s
                console.print("   ".join(map(_line, nodes)), highlight=False, soft_wrap=True)
            time.sleep(_POLL_S)
        live.update("")
    _refuse_ended(processes)
    console.print(_table(nodes, rounds, console))


def _line(node: NodeProcess) -> str:
    if not node.rows:
        return f"{node.name} loads"
    row = node.rows[-1]
    return f"{node.name} round {row['round']} reward {row['reward_moving_average']:.3f} peers {row['num_peers']}"


def _table(nodes: Sequence[NodeProcess], rounds: int, console: Console) -> Table:
    columns: dict[str, list[RenderableType]] = {}
    for node in nodes:
        for name, cell in _cells(node, rounds).items():
            columns.setdefault(name, []).append(cell)
    dispensable = ("their reward", "in / out", "", "peers", "from others")
    return _fitting(columns, dispensable, "a swarm on this machine", console)


def _cells(node: NodeProcess, rounds: int) -> dict[str, RenderableType]:
    """Return a node's row of the table, by column."""
    rows, last = node.rows, node.rows[-20:]
    row = rows[-1] if rows else None
    heldout = next((one["pass_at_1_heldout"] for one in reversed(rows) if "pass_at_1_heldout" in one), None)
    num_external = sum(one["num_external"] for one in last)
    num_groups = num_external + sum(one["num_local"] for one in last)
    theirs = [one["reward_external_mean"] for one in last if one["reward_external_mean"] is not None]
    num_in, num_out = (sum(one[name] for one in rows) for name in ("bytes_in", "bytes_out"))
    curve = Text(sparkline([one["reward_moving_average"] for one in rows], 16), style="green")
    return {
        "node": node.name,
        "round": "" if row is None else str(row["round"]),
        "": "" if row is None else ProgressBar(total=rounds, completed=row["round"], width=12),
        "reward": Text("loading", style="dim") if row is None else Text(f"{row['reward_moving_average']:.3f} ") + curve,
        "held-out": "" if heldout is None else f"{heldout:.3f}",
        "from others": f"{num_external / num_groups:.0%}" if num_groups else "",
        "their reward": f"{sum(theirs) / len(theirs):.3f}" if theirs else "",
        "peers": "" if row is None else str(row["num_peers"]),
        "in / out": "" if row is None else f"{size(num_in)} / {size(num_out)}",
    }


def _fitting(
    columns: Mapping[str, Sequence[RenderableType]], dispensable: Sequence[str], title: str, console: Console
) -> Table:
    """Make a table of whole columns; where the terminal is too narrow, dispensable ones go, in their order."""
    for num_left_out in range(len(dispensable) + 1):
        shown = {name: cells for name, cells in columns.items() if name not in dispensable[:num_left_out]}
        table = Table(title=title, title_justify="left")
        for name in shown:
            table.add_column(name, justify="left" if name in ("node", "", "reward") else "right", no_wrap=True)
        for row in zip(*shown.values(), strict=True):
            table.add_row(*row)
        if Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum <= console.width:
            break
    return table


def _conclude(nodes: Sequence[NodeProcess], folder: Path, seconds: float, console: Console) -> None:
    """Say what it came to."""
    from node.plot import plot_swarm

    picture = folder / "reward.png"
    plot_swarm([(node.name, node.rows) for node in nodes], "a swarm of `tiny` on one machine", picture)
    curves = Table.grid(padding=(0, 2))
    for node in nodes:
        curve = sparkline([row["reward_moving_average"] for row in node.rows], _CHART_WIDTH)
        points = [row["pass_at_1_heldout"] for row in node.rows if "pass_at_1_heldout" in row]
        began = node.rows[0].get("pass_at_1_heldout_before")
        before = "" if began is None else f"{began:.3f} → "
        curves.add_row(node.name, Text(curve, style="green"), f"held-out pass@1 {before}{points[-1]:.3f}")
    columns: dict[str, list[RenderableType]] = {}
    for node in nodes:
        for name, cell in _exchanged(node).items():
            columns.setdefault(name, []).append(cell)
    dispensable = ("in / group used", "of batches", "out", "admitted", "published")
    wire = _fitting(columns, dispensable, "what they exchanged", console)
    console.print(Group(Text(f"done in {duration(seconds)}", style="bold"), curves, wire))
    console.print(f"written: {picture}, and the runs beside it", highlight=False, soft_wrap=True)


def _exchanged(node: NodeProcess) -> dict[str, str]:
    """Return a node's row of what it exchanged, by column."""
    used = sum(row["num_external"] for row in node.rows)
    share = used / (used + sum(row["num_local"] for row in node.rows))
    num_in, num_out = (sum(row[name] for row in node.rows) for name in ("bytes_in", "bytes_out"))
    published = (node.status or {}).get("swarm") or {}
    return {
        "node": node.name,
        "published": f"{published.get('groups_published', 0):,}",
        "admitted": f"{sum(row['num_admitted'] for row in node.rows):,}",
        "used": f"{used:,}",
        "missing": f"{sum(row['num_external_missing'] for row in node.rows):,}",
        "of batches": f"{share:.0%}",
        "in": size(num_in),
        "out": size(num_out),
        "in / group used": size(num_in / used) if used else "",
    }
