"""Everything that is printed: results on stdout, progress and messages on stderr."""

import itertools
import json
import os
import stat
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from remap.errors import Interrupted, RemapWarning
from remap.io.human_size import duration as duration
from remap.io.human_size import size
from remap.io.names import plain

if TYPE_CHECKING:
    from rich.progress import Progress

# Of a file, and of a pipe without a terminal anywhere: what the cells of all tables need.
FULL_WIDTH = 160


def _width() -> int | None:
    """Return the width of stdout where rich does not know it: of a pipe, as to ``less``, that of its terminal."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return None  # rich looks
    with suppress(OSError, ValueError, AttributeError):
        if stat.S_ISFIFO(os.fstat(1).st_mode):
            return os.get_terminal_size(2).columns
    return FULL_WIDTH


out = Console(highlight=False, emoji=False, width=_width())
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

# Without a terminal: seconds between two lines of a wait, and the shortest wait that gets a closing line.
LINE_EVERY_S, CLOSING_LINE_S = 30.0, 2.0


def error(problem: Exception) -> None:
    """Print one message; nothing of it is read as markup. To have been stopped is not an error."""
    first, _, rest = with_rank(str(problem)).partition("\n")
    head = "" if isinstance(problem, Interrupted) else "[bold red]error:[/] "
    err.print(f"{head}{escape(_plain(first))}" + (f"\n{escape(_plain(rest))}" if rest else ""))


def with_rank(text: str) -> str:
    """Return a message with the number of the process, unless it is the first one."""
    rank = os.environ.get("RANK", "0")
    return text if rank == "0" else f"[process {rank}] {text}"


def line(text: str) -> None:
    """Print text on stdout as it is."""
    out.print(_plain(text), markup=False, soft_wrap=True)  # nothing is cut off, and a path is one line


def note(text: str) -> None:
    """Print a remark on stderr."""
    err.print(f"[dim]{escape(_plain(text))}[/]")


def table(
    title: str, columns: list[str], rows: list[list[Any] | str], right: tuple[int, ...] = (), wrap: tuple[int, ...] = ()
) -> None:
    """Print a table; a row that is a string heads a group, and the title may be wider than the table.

    Columns in ``right`` are aligned right, those in ``wrap`` give way when the terminal is narrow.
    """
    result = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index in right else "left"
        result.add_column(escape(_plain(column)), justify=justify, no_wrap=index not in wrap, overflow="fold")
    for row in rows:
        if isinstance(row, str):
            result.add_row(f"[bold cyan]{escape(_plain(row))}[/]")
        else:
            result.add_row(*(escape(plain(str(cell))) for cell in row))  # one line each
    out.print(f"[bold]{escape(_plain(title))}[/]")
    out.print(result)


def grouped(rows: list[tuple[str, list[Any]]]) -> list[list[Any] | str]:
    """Return rows as ``table`` takes them, with the name of each group once, in front of its rows."""
    groups = itertools.groupby(rows, key=lambda row: row[0])
    return [row for group, members in groups for row in (group, *(cells for _, cells in members))]


def emit(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def count(number: int) -> str:
    """Return 38,400 as it is and 21,665,664 as 21.7 M."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.1f} M"


def _plain(text: str) -> str:
    """Escape control characters: names of files and classes must not reach the terminal as commands."""
    return plain(text, keep="\n")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of remap as a remark, and others as Python does; for ``warnings.showwarning``."""
    if issubclass(category, RemapWarning):
        note(str(message))
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


class Reporter:
    """progress.Progress on stderr: bars on a terminal, otherwise lines during long waits."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Progress | None = None
        if err.is_terminal and not quiet:
            self._bars = _bars()

    def __enter__(self) -> "Reporter":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        if not self._quiet:
            # On a terminal words are wrapped; elsewhere a line stays one.
            err.print(escape(_plain(text)), soft_wrap=not err.is_terminal)

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator["_Wait"]:
        wait = _Wait(self, self._bars, what, total)
        try:
            yield wait
        finally:
            wait.remove_bar()
        wait.say_duration()


def _bars() -> "Progress":
    """Return the bars of a terminal, with the figures of the newest step below them."""
    from rich import progress  # not needed for help and listings
    from rich.console import RenderableType
    from rich.table import Column
    from rich.text import Text

    class Bars(progress.Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                if task.fields["values"]:
                    # rich also breaks at no-break spaces, and would cut a figure in two.
                    lines = textwrap.wrap(task.fields["values"], self.console.width)
                    yield Text("\n".join(lines), style="dim", no_wrap=True)

    return Bars(
        progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        progress.BarColumn(bar_width=max(8, min(30, err.width - 52))),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=err,
        transient=True,
    )


class _Wait:
    """A bar, or without a terminal a line at most every ``LINE_EVERY_S`` seconds and one at the end of a long wait.

    A wait with figures is training, which says its end itself.
    """

    def __init__(self, reporter: Reporter, bars: "Progress | None", what: str, total: int | None) -> None:
        self._say, self._bars, self._what, self._total, self._done = reporter.say, bars, what, total, 0
        self._started = self._last = time.perf_counter()
        self._values: dict[str, float] = {}
        self._task = bars.add_task(escape(_plain(what)), total=total, values="") if bars is not None else None

    def advance(self, amount: int = 1, **values: float) -> None:
        self._values |= values
        self._done += amount
        now = time.perf_counter()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, values=self._text("   ", "\u00a0"))
        elif now - self._last >= LINE_EVERY_S:
            self._last = now
            done = f"{self._done}/{self._total}" if self._total is not None else f"{self._done}"
            self._say(f"{self._what}: {done} in {duration(now - self._started)}{self._text(', ')}")

    def remove_bar(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)

    def say_duration(self) -> None:
        seconds = time.perf_counter() - self._started
        if self._bars is None and seconds > CLOSING_LINE_S and not self._values:
            self._say(f"{self._what}: {duration(seconds)}")

    def _text(self, separator: str, space: str = " ") -> str:
        shown = {"left": duration, "memory": size}
        pairs = ((name, shown.get(name, "{:.4g}".format)(value)) for name, value in self._values.items())
        return "".join(f"{separator}{name}{space}{text.replace(' ', space)}" for name, text in pairs).lstrip(" ")
