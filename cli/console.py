"""Everything that is printed: results on stdout, progress and messages on stderr."""

import gc
import itertools
import json
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from remap.errors import Interrupted, RemapError, RemapWarning
from remap.io.human_size import duration as duration
from remap.io.names import plain
from remap.progress import CELLS
from remap_cli.width import rule_of, width_of_stdout

if TYPE_CHECKING:
    from rich.progress import Progress

out = Console(highlight=False, emoji=False, width=width_of_stdout())
err = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

HELD = "\ue000"  # a blank in the cell of a table at which no line ends; a character that no text has
# The label of a line of a message, and a command in it.
_LABEL, _COMMAND = re.compile(r" *(?:\w+: +)?"), re.compile(r"(?:^|(?<=: ))(?:remap|touch|pip|torchrun) .*")
# Without a terminal: seconds between two lines of a wait, and the shortest wait that gets a closing line.
LINE_EVERY_S, CLOSING_LINE_S = 30.0, 2.0


def error(problem: Exception) -> None:
    """Print one message; nothing of it is read as markup. To have been stopped is not an error."""
    first, _, rest = with_rank(str(problem)).partition("\n")
    head = "" if isinstance(problem, Interrupted) else "error: "
    text = escape(_wrapped(_plain(f"{head}{first}" + (f"\n{rest}" if rest else "")), err))
    err.print(text.replace(head, f"[bold red]{head}[/]", 1) if head else text, soft_wrap=True)


def with_rank(text: str) -> str:
    """Return a message with the number of the process, unless it is the first one."""
    rank = os.environ.get("RANK", "0")
    return text if rank == "0" else f"[process {rank}] {text}"


def line(text: str) -> None:
    """Print text on stdout."""
    out.print(_wrapped(_plain(text), out), markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a remark on stderr."""
    err.print(f"[dim]{escape(_wrapped(_plain(text), err))}[/]", soft_wrap=True)


def table(
    title: str, columns: list[str], rows: list[list[Any] | str], right: tuple[int, ...] = (), wrap: tuple[int, ...] = ()
) -> None:
    """Print a table; a row that is a string heads a group, and the title may be wider than the table.

    Columns in ``right`` are aligned right, those in ``wrap`` give way first when the terminal is narrow.
    """
    lines = [[plain(str(cell), keep=HELD) for cell in ([row] if isinstance(row, str) else row)] for row in rows]
    widths = _widths([columns, *lines], out.width - 2 * len(columns), wrap)
    out.print(f"[bold]{escape(_wrapped(_plain(title), out))}[/]", soft_wrap=True)
    if widths is None:  # not even the longest words fit side by side
        for row, cells in zip(rows, lines, strict=True):
            names = [""] if isinstance(row, str) else columns
            pairs = zip(names, cells, strict=True)
            line("\n".join(f"{name}: {cell}".removeprefix(": ") for name, cell in pairs).replace(HELD, " ") + "\n")
        return
    # Not rich's table, which takes as long for a hundred rows as Python takes to start.
    printed = [*_cells(list(map(_plain, columns)), widths, right, "bold")]
    printed.append((rule_of(sum(widths) + 2 * len(widths) - 2), ""))
    for row, cells in zip(rows, lines, strict=True):
        printed += _cells(cells, widths, right, "bold cyan" if isinstance(row, str) else "")
    # Not markup: "[fc1," at the end of a line and "fc2]" on the next one would be read as a tag, and vanish.
    text = Text()
    for one, style in printed:
        text.append("\n ").append(one.replace(HELD, " "), style)
    out.print(text.append("\n"), soft_wrap=True)


def _cells(cells: list[str], widths: list[int], right: tuple[int, ...], style: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of a row with their style: cells side by side, broken between words."""
    for parts in itertools.zip_longest(*map(_broken, cells, widths), fillvalue=""):
        blanks = [" " * (width - cell_len(part)) for part, width in zip(parts, widths, strict=False)]
        padded = [b + part if n in right else part + b for n, (part, b) in enumerate(zip(parts, blanks, strict=True))]
        yield "  ".join(padded).rstrip(), style


def _broken(cell: str, width: int) -> list[str]:
    lines = [""]
    for word in [cell] if cell_len(cell) <= width else cell.split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        lines[-1:] = [longer] if cell_len(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines


def _widths(rows: list[list[str]], room: int, wrap: tuple[int, ...]) -> list[int] | None:
    """Return the width of each column, where a row too many lets the widest give way, those in ``wrap`` first.

    None where the longest words do not fit.
    """
    columns = [[row[index] for row in rows if index < len(row)] for index in range(len(rows[0]))]
    widths = [max(map(cell_len, column)) for column in columns]
    least = [max(cell_len(word) for cell in column for word in (cell.split() or [""])) for column in columns]
    for giving in (wrap, range(len(columns))):
        while sum(widths) > room and (wide := [index for index in giving if widths[index] > least[index]]):
            widths[max(wide, key=lambda index: widths[index])] -= 1
    return widths if sum(widths) <= room else None


def grouped(rows: list[tuple[str, list[Any]]]) -> list[list[Any] | str]:
    """Return rows as ``table`` takes them, with the name of each group once, in front of its rows."""
    groups = itertools.groupby(rows, key=lambda row: row[0])
    return [row for group, members in groups for row in (group, *(cells for _, cells in members))]


def confirm(question: str) -> None:
    """Ask on stderr, and end the command where the answer is not yes, or where stdin is not a terminal."""
    import typer

    if not sys.stdin.isatty():
        raise RemapError("this asks for confirmation, and stdin is not a terminal", do="confirm with --yes")
    typer.confirm(question, abort=True, err=True)


def emit(value: Any) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def count(number: int) -> str:
    """Return 38,400 as it is and 21,665,664 as 21.7 M."""
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.1f} M"


def _wrapped(text: str, console: Console) -> str:
    """Break lines between words to the width of a terminal; commands and paths stay in one piece, to be copied.

    In files and pipes a line stays one. What follows a label ("  do:  ") is indented like its first line.
    """
    if not console.is_terminal:
        return text
    wrapped = []
    for one in text.split("\n"):
        indent = " " * len(_LABEL.match(one)[0])  # type: ignore[index]
        held = _COMMAND.sub(lambda found: found[0].replace(" ", "\0"), one)
        wrapped += textwrap.wrap(
            held, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(wrapped).replace("\0", " ")


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
        gc.enable()  # listings do without, and use no reporter
        self._quiet = quiet
        self._bars: Progress | None = None
        if err.is_terminal and not quiet:
            from remap_cli.live import Bars  # not needed for help and listings

            self._bars = Bars(console=err, transient=True, refresh_per_second=4)

    def __enter__(self) -> "Reporter":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def say(self, text: str) -> None:
        if not self._quiet:
            err.print(escape(_wrapped(_plain(text), err)), soft_wrap=True)

    @contextmanager
    def wait(self, what: str, total: int | None = None) -> Iterator["_Wait"]:
        wait = _Wait(self, self._bars, what, total)
        try:
            yield wait
        finally:
            wait.remove_bar()
        wait.say_duration()


class _Wait:
    """A bar, or without a terminal a line at most every ``LINE_EVERY_S`` seconds and one at the end of a long wait."""

    def __init__(self, reporter: Reporter, bars: "Progress | None", what: str, total: int | None) -> None:
        self._say, self._bars, self._what, self._total, self._done = reporter.say, bars, what, total, 0
        self._started = self._last = time.perf_counter()
        self._values: dict[str, float] = {}
        self._task = bars.add_task(_plain(what), total=total, values={}) if bars is not None else None

    def advance(self, amount: int = 1, **values: float) -> None:
        self._values |= values
        self._done += amount
        now = time.perf_counter()
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, values=self._values)
        elif now - self._last >= LINE_EVERY_S and self._what != CELLS:  # epochs say their own end
            from remap_cli.live import figures

            self._last = now
            done = f"{self._done}/{self._total}" if self._total is not None else f"{self._done}"
            shown = figures(self._values, ", ")
            self._say(", ".join(filter(None, [f"{self._what}: {done} in {duration(now - self._started)}", shown])))

    def remove_bar(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)

    def say_duration(self) -> None:
        seconds = time.perf_counter() - self._started
        if self._bars is None and seconds > CLOSING_LINE_S and not self._values:  # training says its end itself
            self._say(f"{self._what}: {duration(seconds)}")
