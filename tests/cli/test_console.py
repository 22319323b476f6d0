"""What is printed: names as they are, progress now and then, and a clean end by signal."""

import gc
import io
import math
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console
from rich.table import Table

from remap.errors import Interrupted, RemapError
from remap.progress import CELLS
from remap_cli import console
from remap_cli.live import grid
from remap_cli.width import width_of_stdout

WAITS = """
import time
from remap_cli.app import app
from remap_cli.main import main

@app.command("wait")
def wait() -> None:
    print("ready", flush=True)
    time.sleep(60)

main()
"""


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What goes to stdout and stderr, neither a terminal."""
    text = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(console, name, Console(file=text, width=120, emoji=False, highlight=False))
    return text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one number is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr("remap_cli.console.time.perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["photos[new]", "x[/y]", "[bold]", ":cat:", "back\\"])
def test_names_are_no_markup(printed: io.StringIO, name: str) -> None:
    console.table(f"{name}: title", [f"{name} column"], [f"{name} group", [f"{name} cell"]])
    console.line(f"{name} line")
    for place in ("column", "group", "cell", "line"):
        assert f"{name} {place}" in printed.getvalue()
    assert f"{name}: title" in printed.getvalue()


def test_a_title_may_be_wider_than_its_table(printed: io.StringIO) -> None:
    title = "a title of several words above a narrow table"
    console.table(title, ["c"], [["1"]])
    assert title in printed.getvalue().splitlines()


def test_control_characters_are_shown_not_sent(printed: io.StringIO) -> None:
    console.table("a\x1b[2Jb", ["c\x07"], ["d\x1b", ["e\r"]])
    console.line("f\x1b")
    assert not set(printed.getvalue()) & {"\x1b", "\x07", "\r"}


def test_a_long_wait_says_a_line_every_half_minute(printed: io.StringIO, clock: list[float]) -> None:
    with console.Reporter() as progress, progress.wait("epoch 1", 100) as step:
        for _ in range(100):
            clock[0] += 1.0
            step.advance(loss=0.5, memory=1.5e9, left=90.0)
    with console.Reporter() as progress, progress.wait("reading"):
        clock[0] += 3.0
    assert printed.getvalue().splitlines() == [
        "epoch 1: 30/100 in 30.0 s, loss 0.5, memory 1.5 GB, left 90.0 s",
        "epoch 1: 60/100 in 60.0 s, loss 0.5, memory 1.5 GB, left 90.0 s",
        "epoch 1: 90/100 in 90.0 s, loss 0.5, memory 1.5 GB, left 90.0 s",
        "reading: 3.0 s",
    ]


WIDTHS = pytest.mark.parametrize("width", [60, 80, 120, 200])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """What goes to stdout and stderr on a terminal of a width."""

    def make(width: int) -> io.StringIO:
        text = io.StringIO()
        for name in ("out", "err"):
            one = Console(file=text, width=width, height=30, force_terminal=True, color_system=None, emoji=False)
            monkeypatch.setattr(console, name, one)
        return text

    return make


def _drawn(progress: console.Reporter) -> list[str]:
    lines = console.err.render_lines(progress._bars.get_renderable())
    return ["".join(part.text for part in line).rstrip() for line in lines]


def _require_fit(lines: list[str], width: int, words: str) -> None:
    """No line is wider than the terminal, and every word of the text is in one piece."""
    assert max(map(len, lines)) <= width
    shown = {word for line in lines for word in line.split()}
    assert set(words.split()) <= shown, set(words.split()) - shown


@WIDTHS
def test_the_screen_fits_its_terminal(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    terminal(width)
    figures = {"loss": 5.128, "ce": 1.719, "attention": 0.616, "accuracy": 0.9321, "best": 0.9411, "lr": 0.05}
    with console.Reporter() as progress, progress.wait("labels only: epoch 12/100", 620) as step:
        step.advance(31, **figures, **{"images/s": 312.0, "left": 300.0}, memory=1.2e9)
        lines = _drawn(progress)
        with progress.wait("labels only: evaluating the network before training", 13), progress.wait("loading PyTorch"):
            more = _drawn(progress)
    _require_fit(
        lines, width, "labels only: epoch 12/100 31/620 accuracy 93.2% best 94.1% images/s 312 left 5.0 min 1.2 GB"
    )
    _require_fit(more, width, "0/13")
    assert any(line.startswith("loading PyTorch") and "?" not in line for line in more)


@WIDTHS
def test_a_comparison_fills_its_grid(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    """A mean over the seeds that are done, and how many they are; dots are to come, three of them run."""
    terminal(width)
    names = [
        f"{m}-{o}-s{seed}" for m in ("lora", "vpt_deep-num_prompts=5") for o in ("teacher", "alone") for seed in (0, 1)
    ]
    done = dict(zip(names, [0.5, 0.75, 0.8], strict=False))
    with console.Reporter() as progress, progress.wait(CELLS, len(names)) as cells:
        cells.advance(3, **({name: math.nan for name in names} | done))
        lines = _drawn(progress)
    _require_fit(lines, width, "cells 3/8")
    rows = [line.split() for line in lines[1:]]
    assert rows[0] == ["with", "teacher", "labels", "only"]
    assert rows[1] == ["lora", "62.5", "80.0", "(1/2)"]
    assert rows[2] == ["vpt_deep-num_prompts=5", "·", "·"]
    assert [line.split() for line in _text_of(grid(dict.fromkeys(names, math.nan), 9))][1] == ["lora", "...", "·"]


def test_a_grid_that_is_too_long_shows_what_runs() -> None:
    values = {f"method{number}-alone-s0": 0.5 if number < 30 else math.nan for number in range(40)}
    shown = _text_of(grid(values, 5))
    assert len(shown) == 6 and "method30" in "".join(shown)


def _text_of(table: Table) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    return text.getvalue().splitlines()


@WIDTHS
def test_messages_are_wrapped_between_words(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    """And commands stay in one piece, so that they can be copied."""
    text, words = terminal(width), "a message of several long words, such as backbones and interpretation, " * 5
    command = "remap distill --resume /a/path/that/is/longer/than/a/narrow/terminal/is/wide/or/nearly/so"
    with console.Reporter() as progress:
        progress.say(words)
        console.note(words)
        console.line(words)
        console.error(RemapError(words, given=words, do=f"{words}resume with: {command}"))
    lines = re.sub(r"\x1b\[\S+?[A-Za-z]", "", text.getvalue()).splitlines()
    assert command in " ".join(lines)
    _require_fit([line for line in lines if "remap distill" not in line], width, words)
    second = next(number for number, line in enumerate(lines) if line.startswith("  given:")) + 1
    assert lines[second].startswith(" " * 11 + lines[second].strip()[0])


@WIDTHS
def test_tables_lose_no_word(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    """The widest columns give way; where the words do not fit side by side, there is a line for each."""
    text = terminal(width)
    columns = ["method", "trained", "labels only", "with teacher", "gain", "seconds", "saved size"]
    row = ["vpt_shallow", "11,530 (1.7%)", "82.2 ± 1.3", "84.2 ± 1.1", "+2.0", "12", "47.5 kB"]
    console.table("a title of several words that is wider than a narrow terminal", columns, ["fine-tuning", row])
    _require_fit(text.getvalue().splitlines(), width, " ".join(["fine-tuning", *row]))
    assert ("method: vpt_shallow" in text.getvalue()) == (width == 60)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_brackets_that_are_broken_over_lines_are_no_markup(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    text, cell = (
        terminal(width),
        "holiday [summer 2024 in a place with a very long name] photo.jpg of [fc1, fc2] or [q, v]",
    )
    console.table("1 image", ["image", "class"], [[cell, "ants 52.7%, bees 47.3%"]], wrap=(0, 1))
    _require_fit(text.getvalue().splitlines(), width, f"{cell} ants 52.7%, bees 47.3%")


def test_what_is_held_together_stays_on_one_line(terminal: Callable[[int], io.StringIO]) -> None:
    text = terminal(40)
    answer = ", ".join(f"{name}{console.HELD}12.3%" for name in ("tabby", "siamese", "sphynx"))
    console.table("1 image", ["image", "class"], [["a/rather/long/name.png", answer]], wrap=(1,))
    for name in ("tabby", "siamese", "sphynx"):
        assert f"{name} 12.3%" in text.getvalue()


def test_a_short_wait_says_nothing_and_a_quiet_reporter_neither(printed: io.StringIO, clock: list[float]) -> None:
    with console.Reporter() as progress, progress.wait("short") as step:
        clock[0] += 1.9
        step.advance()
    with console.Reporter(quiet=True) as progress, progress.wait("long") as step:
        clock[0] += 90.0
        step.advance()
    assert printed.getvalue() == ""


def test_to_have_been_stopped_is_no_error(printed: io.StringIO) -> None:
    console.error(Interrupted("stopped by Ctrl-C; the state is saved", do="go on with: remap tune --resume r"))
    console.error(RemapError("no such image"))
    assert printed.getvalue().splitlines() == [
        "stopped by Ctrl-C; the state is saved",
        "  do:      go on with: remap tune --resume r",
        "error: no such image",
    ]


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_with_a_word_and_its_code(number: signal.Signals, word: str) -> None:
    """Exit code 128 + n, as shells report it (POSIX)."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, "wait"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"{word}; there was nothing to save, and what was saved before stays\n"


SWALLOWS = """
import os, time
from remap_cli.app import app
from remap_cli.main import main

@app.command("wait")
def wait() -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except BaseException:
        pass
    ANSWER

main()
"""


@pytest.mark.parametrize("answer", ["time.sleep(60)", "pass", "os.path.no_such_name"])
def test_a_signal_that_is_swallowed_ends_the_command(answer: str) -> None:
    """Whatever comes of it: work that would go on, an end, an error."""
    words = [sys.executable, "-c", SWALLOWS.replace("ANSWER", answer), "wait"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 143 and "Traceback" not in errors


READS = """
import time
from concurrent.futures import ThreadPoolExecutor
from remap.errors import Interrupted
from remap_cli.app import app
from remap_cli.main import main

@app.command("read")
def read() -> None:
    ThreadPoolExecutor().submit(time.sleep, 60)
    raise Interrupted("stopped by SIGTERM", exit_code=143, at_once=AT_ONCE)

main()
"""


@pytest.mark.parametrize("at_once", ["True", "False"])
def test_who_was_stopped_waits_for_no_thread(at_once: str) -> None:
    """As one that reads images ahead from a disk that does not answer; Python waits for it at its exit."""
    words = [sys.executable, "-c", READS.replace("AT_ONCE", at_once), "read"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM\n")


BEGINS = """
import signal, time
from remap.distributed import interrupts
from remap.errors import Interrupted
from remap_cli.app import app
from remap_cli.main import main

@app.command("run")
def run() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except BaseException:
        pass
    with interrupts.watch_signals(), interrupts.defer_signals():
        time.sleep(1.5)
        raise Interrupted("the run was told of it" if interrupts._watch.signal else "it was not", exit_code=143)

main()
"""


def test_a_run_that_began_meanwhile_gets_a_signal_that_was_swallowed() -> None:
    """Its own handler came too late; in training a signal is noted, and the state is saved after the step."""
    done = subprocess.run(
        [sys.executable, "-c", BEGINS, "run"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (143, "the run was told of it\n")


BECOMES = """
import signal
from remap.errors import WeightsError
from remap_cli.app import app
from remap_cli.main import main

@app.command("load")
def load() -> None:
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException as error:
        raise WeightsError("no weights") from error

main()
"""


def test_a_signal_that_a_library_turned_into_an_error_is_still_the_reason() -> None:
    done = subprocess.run([sys.executable, "-c", BECOMES, "load"], capture_output=True, text=True, check=False)
    assert done.returncode == 130 and done.stderr.startswith("interrupted;") and "weights" not in done.stderr


@pytest.mark.parametrize(
    ("columns", "is_pipe", "terminal", "width"),
    [
        *(("72", True, 90, 72), ("", True, 90, 90), ("", True, None, 160), ("", False, 90, 160)),
        *(("0", True, 90, 90), ("", True, 0, 160), ("0", False, 90, 160)),
    ],
    ids=["COLUMNS", "a pipe of a terminal", "a pipe alone", "a file", "unknown", "unknown too", "unknown of a file"],
)
def test_a_pipe_is_as_wide_as_its_terminal(
    columns: str, is_pipe: bool, terminal: int | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`remap methods | less` at 90 columns; what rich makes of COLUMNS is its own rule."""

    def size(descriptor: int) -> os.terminal_size:
        if terminal is None:
            raise OSError("not a terminal")
        return os.terminal_size((terminal, 24))

    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(os, "get_terminal_size", size)
    monkeypatch.setattr(stat, "S_ISFIFO", lambda mode: is_pipe)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert Console(width=width_of_stdout()).width == width


def test_what_takes_long_collects_its_garbage() -> None:
    """`remap` switches it off for listings, which end at once."""
    gc.disable()
    try:
        console.Reporter(quiet=True)
        assert gc.isenabled()
    finally:
        gc.enable()


REFUSED = """
import threading
from remap_cli.app import app
from remap_cli.main import main

def refuse(_):
    raise RuntimeError("can't start new thread")

@app.command("read")
def read() -> None:
    threading.Thread.start = refuse
    threading.Thread(target=print).start()

main()
"""


def test_a_library_that_is_refused_a_thread_is_a_mistake_that_can_be_mended() -> None:
    words = [sys.executable, "-c", REFUSED, "read"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(
        "error: the system refuses to start another thread\n  do:      end other programs, raise"
    )
