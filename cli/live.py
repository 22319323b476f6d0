"""What a terminal shows while a command works: bars, the figures of the newest step, the cells of a comparison."""

import math
import textwrap
from collections.abc import Iterator, Mapping

from rich import progress
from rich.console import RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from remap.data import METRIC
from remap.io.human_size import duration, size
from remap.progress import CELLS

WIDEST_BAR, NARROWEST_BAR = 30, 8
# Lines of the terminal that bars and figures may take; the rest is for the cells of a comparison.
LINES_BELOW = 9
_SHOWN = {"left": duration, "memory": size, "best": "{:.1%}".format}
_SHOWN |= dict.fromkeys(METRIC.values(), "{:.1%}".format)


def figures(values: Mapping[str, float], separator: str, space: str = " ") -> str:
    """Return named figures in words: "loss 1.2, left 3.0 min"."""
    pairs = ((name, _SHOWN.get(name, "{:.4g}".format)(value)) for name, value in values.items())
    return separator.join(f"{name}{space}{text.replace(' ', space)}" for name, text in pairs)


class Bars(progress.Progress):
    """One line a wait; below it the figures of its newest step, or the grid of a comparison."""

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            yield self._line(task)
            values = task.fields["values"]
            if values and task.description == CELLS:
                yield grid(values, self.console.height - LINES_BELOW)
            elif values:
                # rich also breaks at no-break spaces, and would cut a figure in two.
                lines = textwrap.wrap(figures(values, "   ", "\u00a0"), self.console.width)
                yield Text("\n".join(lines), style="dim", no_wrap=True)

    def _line(self, task: progress.Task) -> Table:
        """Name, bar, how many are done, and the time: each in full, or else a shorter bar and name."""
        elapsed = duration(task.elapsed or 0.0)
        known = task.total is not None
        done = f"{int(task.completed)}/{int(task.total or 0)}" if known else ""
        # The figures of training say what is left of all of it.
        left = None if task.fields["values"] else task.time_remaining
        time = elapsed if left is None or not known else f"{duration(left)} left"
        room = self.console.width - len(done) - len(time) - 3
        bar = max(NARROWEST_BAR, min(WIDEST_BAR, room - len(task.description))) if known else 0
        line = Table.grid(padding=(0, 1, 0, 0), pad_edge=False)
        line.add_column(no_wrap=True, overflow="ellipsis", width=min(len(task.description), room - bar))
        for width in (bar, len(done), len(time)):
            line.add_column(no_wrap=True, width=width)
        drawn = ProgressBar(total=task.total, completed=task.completed, width=bar) if known else ""
        line.add_row(escape(task.description), drawn, done, f"[dim]{time}[/]")
        return line


def grid(accuracies: Mapping[str, float], most_rows: int) -> Table:
    """Return the cells of a comparison: a row for each method, a column for what it learns from.

    Args:
        accuracies: By METHOD-OBJECTIVE-sSEED; NaN for a cell that waits, infinity for one that runs. Of cells one after
            the other the first that waits runs.
        most_rows: Where there are more, those around a cell that runs are shown.
    """
    cells: dict[str, dict[str, list[float]]] = {}
    waiting = [name for name, value in accuracies.items() if math.isnan(value)]
    running = {name.rpartition("-s")[0] for name, value in accuracies.items() if math.isinf(value)}
    running = running or {name.rpartition("-s")[0] for name in waiting[:1]}
    for name, value in accuracies.items():
        method, objective = name.rpartition("-s")[0].rsplit("-", 1)
        cells.setdefault(method, {}).setdefault(objective, []).append(value)
    objectives = list(dict.fromkeys(objective for row in cells.values() for objective in row))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title in ("", *({"alone": "labels only", "teacher": "with teacher"}.get(one, one) for one in objectives)):
        table.add_column(escape(title), no_wrap=True, overflow="ellipsis", justify="right" if title else "left")
    methods = list(cells)
    at = next((i for i, method in enumerate(methods) if any(now.startswith(f"{method}-") for now in running)), 0)
    first = max(0, min(at - most_rows // 2, len(methods) - most_rows))
    for method in methods[first : first + max(1, most_rows)]:
        texts = (_cell(cells[method].get(one), f"{method}-{one}" in running) for one in objectives)
        table.add_row(escape(method), *texts)
    return table


def _cell(values: list[float] | None, runs: bool) -> str:
    """Return the mean accuracy in percent of the seeds that are done, and how many those are of how many."""
    done = [value for value in values or () if math.isfinite(value)]
    if not values or not done:
        return "" if values is None else "[bold]...[/]" if runs else "[dim]·[/]"
    count = "" if len(done) == len(values) else f" ({len(done)}/{len(values)})"
    return f"{100 * sum(done) / len(done):.1f}{count}"
