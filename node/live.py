"""The display in a terminal: a panel that is redrawn a few times a second."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from node.display import Display, Progress, RunInfo, duration, from_others, partial_rollouts
from node.drafts_shown import drafts

__all__ = ["LiveDisplay", "sparkline"]

_REFRESH_PER_S = 4
_BLOCKS = "▁▂▃▄▅▆▇█"
_CHART_WIDTH = 48
_PHASES = {
    "start": "loading the model and the tasks",
    "replay": "bringing back the last good state",
    "evaluation": "evaluating on held-out questions",
    "rollout": "writing completions",
    "scoring": "scoring answers",
    "update": "updating the policy",
    "drafter": "teaching the drafter",
    "load_policy": "giving the engine the new policy",
    "record": "recording",
}


def sparkline(values: Sequence[float], width: int, top: float = 1.0) -> str:
    """Draw values between 0 and `top`, averaged into at most `width` columns."""
    columns = min(width, len(values))
    edges = [index * len(values) // columns for index in range(columns + 1)] if columns else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int(max(0.0, mean) / top * len(_BLOCKS)))] for mean in means)


class LiveDisplay(Display):
    """A panel with the state of the run; notes scroll by above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._begin = clock()
        self._info = RunInfo("", "", "", 0, "")
        self._progress = Progress(0)
        self._phase = "start"
        self._folder = ""  # shown once it is written to
        self._row: Mapping[str, Any] | None = None
        self._averages: list[float] = []
        self._heldout: list[tuple[int, float]] = []
        self._live: Live | None = None

    def begin(self, info: RunInfo) -> None:
        """Open the panel."""
        self._info = info
        self._progress = Progress(info.rounds)
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=_REFRESH_PER_S, transient=False
        )
        self._live.start()

    def loaded(self) -> None:
        """Show where the run is written."""
        self._folder = self._info.folder

    def note(self, text: str) -> None:
        """Print a line above the panel."""
        self._console.print(text, highlight=False, markup=False)

    def phase(self, phase: str) -> None:
        """Show what is being done."""
        self._phase = phase

    def evaluated_before(self, pass_at_1: float) -> None:
        """Show where the policy began."""
        self._heldout.append((0, pass_at_1))

    def resumed(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the rounds before."""
        for row in rows:
            self._take(row)
        self.note(f"going on after round {rows[-1]['round']}")

    def round(self, row: Mapping[str, Any]) -> None:
        """Show the round at the next redraw."""
        self._take(row)
        self._progress.add(row)

    def end(self) -> None:
        """Leave the panel as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._averages.append(row["reward_moving_average"])
        if "pass_at_1_heldout_before" in row and not self._heldout:
            self._heldout.append((0, row["pass_at_1_heldout_before"]))
        if "pass_at_1_heldout" in row:
            self._heldout.append((row["round"], row["pass_at_1_heldout"]))

    def render(self) -> Panel:
        """Draw the panel."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", justify="right")
        table.add_column()
        row = self._row
        done = int(row["round"]) if row is not None else 0
        table.add_row("round", self._round_line(done))
        if row is not None:
            reward = f"{row['reward_mean']:.3f}   average {row['reward_moving_average']:.3f}   "
            table.add_row("reward", Text(reward) + Text(sparkline(self._averages, _CHART_WIDTH), style="green"))
            if others := from_others(row).removeprefix("  from others "):
                theirs = row["reward_external_mean"]
                table.add_row("from others", others + (f"   their reward {theirs:.3f}" if theirs is not None else ""))
        if self._heldout:
            table.add_row("held-out pass@1", self._heldout_line())
        if row is not None:
            if partial := partial_rollouts(row).strip():
                table.add_row("rollouts", partial)
            if drafted := drafts(row).removeprefix("  drafts "):
                table.add_row("drafts", drafted)
            table.add_row(
                "speed", f"{row['tokens_per_s']:,.0f} tokens/s   {1 / max(row['round_s'], 1e-9):.1f} rounds/s"
            )
            table.add_row(
                "seconds",
                f"rollout {row['rollout_s']:.3f}   scoring {row['scoring_s']:.3f}   update {row['update_s']:.3f}   "
                f"round {row['round_s']:.3f}",
            )
            table.add_row("memory", f"{row['peak_rss_bytes'] / 2**20:,.0f} MiB at most")
        table.add_row("now", Text(_PHASES.get(self._phase, self._phase), style="dim"))
        title = f"swarm-node {self._info.command} · {self._info.model} on {self._info.tasks}"
        subtitle = Text(self._folder) if self._folder else None
        return Panel(Group(table), title=Text(title), title_align="left", subtitle=subtitle, expand=False)

    def _round_line(self, done: int) -> Table:
        line = Table.grid(padding=(0, 2))
        elapsed = duration(self._clock() - self._begin)
        eta = duration(self._progress.eta_s(done)) if done else "…"
        bar = ProgressBar(total=max(1, self._info.rounds), completed=done, width=24)
        line.add_row(f"{done} of {self._info.rounds}", bar, f"elapsed {elapsed}", f"left {eta}")
        return line

    def _heldout_line(self) -> Text:
        text = Text()
        for index, (round_index, value) in enumerate(self._shown_heldout()):
            text.append(" → " if index else "")
            text.append(f"{value:.3f}", style="bold")
            text.append(" before" if round_index == 0 else f" after {round_index}", style="dim")
        return text

    def _shown_heldout(self) -> list[tuple[int, float]]:
        """Return the first and the last two evaluations."""
        return self._heldout if len(self._heldout) <= 3 else [self._heldout[0], *self._heldout[-2:]]
