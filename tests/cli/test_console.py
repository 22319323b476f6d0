"""What is printed: names as they are, progress now and then, and a clean end by signal."""

import io
import os
import signal
import stat
import subprocess
import sys

import pytest
from rich.console import Console

from remap.errors import Interrupted, RemapError
from remap_cli import console

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


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_screen_fits_its_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, and no figure is cut in two."""
    text = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=text, width=width, force_terminal=True, color_system=None))
    figures = {"loss": 5.128, "ce": 1.719, "attention": 0.616, "lr": 0.05, "images/s": 312.0, "left": 300.0}
    with console.Reporter() as progress, progress.wait("labels only: epoch 12/100", 620) as step:
        step.advance(31, **figures, memory=1.2e9)
        progress.say("word " * 60)
        shown = console.err.render_lines(progress._bars.get_renderable())
    lines = ["".join(part.text for part in line).rstrip() for line in shown]
    assert "epoch 12/100" in lines[0] and "31/620" in lines[0]
    below = " ".join(lines[1:])
    for figure in ("loss\u00a05.128", "images/s\u00a0312", "left\u00a05.0\u00a0min", "memory\u00a01.2\u00a0GB"):
        assert figure in below
    assert max(map(len, lines)) <= width
    said = [line for line in text.getvalue().splitlines() if "word" in line]
    assert all(len(line) <= width + 20 and "wor d" not in line for line in said) and len(said) >= 300 // width


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
    assert errors == f"{word}; there was nothing to save, and what was saved before is kept\n"


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
    [("72", True, 90, 72), ("", True, 90, 90), ("", True, None, 160), ("", False, 90, 160)],
    ids=["COLUMNS", "a pipe of a terminal", "a pipe alone", "a file"],
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
    assert Console(width=console._width()).width == width
