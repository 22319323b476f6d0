"""The ``remap`` command. Heavy imports happen inside the commands, so that help and listings are instant."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap import __version__
from remap_cli import launch, streams, view
from remap_cli import options as opt

if TYPE_CHECKING:
    from remap.errors import Interrupted, RemapError

# Seconds after which it is looked whether a signal was heard.
HEARD = 0.25
# The signal that asked this command to stop, 0 for none, and the handler that was in place then.
_asked: int = 0
_handler: Any = None

app = typer.Typer(
    name="remap",
    help="Distil a large vision transformer into a small one tuned by a parameter-efficient method.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, Ctrl-C is 130, a bug is a traceback."""
    global _asked
    from remap.errors import RemapError

    try:
        _asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stopped)
        streams.watch()
        launch.begin()
        app()
    except SystemExit as leaving:  # how Typer ends, well or not
        _be_deaf()
        _leave(128 + _asked if _asked else leaving.code)
    except Exception as error:
        _be_deaf()  # all that is left is to say why
        if launch.told_of_failure():  # what comes of that is no news
            _leave(launch.LOST)
        problem = _signal_behind(error) or (error if isinstance(error, RemapError) else _lost_process(error))
        if _asked and (problem is None or problem.exit_code != 128 + _asked):  # what comes of a signal is no news
            problem = _interrupted(_asked)
        if problem is not None:
            if not launch.explained_by_parent(problem.exit_code):
                view.error(problem)
            _leave(problem.exit_code)
        if "RANK" not in os.environ:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
        _leave(1)


def _stopped(number: int, frame: FrameType | None) -> None:
    """Ctrl-C and SIGTERM outside the training loop, which saves first. Typer would end on Ctrl-C without a word."""
    global _asked, _handler
    _asked, _handler = number, signal.getsignal(number)
    signal.signal(signal.SIGALRM, _insist)
    signal.setitimer(signal.ITIMER_REAL, HEARD)
    raise _interrupted(number)


def _interrupted(number: int) -> "Interrupted":
    from remap.errors import Interrupted

    word = "interrupted" if number == signal.SIGINT else "terminated"
    return Interrupted(f"{word}; there was nothing to save, and what was saved before is kept", exit_code=128 + number)


def _insist(number: int, frame: FrameType | None) -> None:
    """Ask again where what ``_stopped`` raised was swallowed, as by imports that try what a machine has."""
    handler = signal.getsignal(_asked)
    if _signal_behind(sys.exception()) is not None:  # it is on its way
        signal.setitimer(signal.ITIMER_REAL, HEARD)
    elif handler is _stopped or handler is not _handler:
        handler(_asked, frame)
    # else a run has noted it, and leaves after this batch


def _be_deaf() -> None:
    for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _lost_process(error: Exception) -> "RemapError | None":
    """What a broken connection to another process means; None for any other error."""
    if "remap.distributed.launch" not in sys.modules:
        return None
    from remap.distributed.launch import lost_process

    return lost_process(error)


def _signal_behind(error: BaseException | None) -> "Interrupted | None":
    """A library may catch what a signal raised, and what is reported then is what came of it."""
    from remap.errors import Interrupted

    while error is not None and not isinstance(error, Interrupted):
        error = error.__cause__ or error.__context__
    return error


def _leave(code: str | int | None) -> None:
    """Exit without waiting for other ranks that may be stuck in a collective call, or for reads of a slow disk."""
    from remap.errors import RemapError

    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as leaving:
        code = code or leaving.code
    except RemapError as error:
        view.error(error)
        code = code or error.exit_code
    if isinstance(code, int) and (code > 128 or ("RANK" in os.environ and code)):  # above 128: who sent a signal waits
        os._exit(code)
    sys.exit(code)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"remap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


@app.command(rich_help_panel=opt.TRAIN)
def distill(
    teacher: opt.Teacher = None,
    student: opt.Student = None,
    init: opt.Init = None,
    force_init: opt.ForceInit = False,
    method: opt.Method = None,
    losses: opt.Losses = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    unlabeled: opt.Unlabeled = None,
    weights: opt.Weights = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    lr: opt.LearningRate = None,
    seed: opt.Seed = None,
    recipe: opt.RecipeWord = None,
    settings: opt.Settings = None,
    output: opt.Output = None,
    resume: opt.Resume = None,
    skip_bad: opt.SkipBad = False,
    devices: opt.Devices = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
) -> None:
    """Distil a teacher into a tuned student. Without words: the embedded pair on the embedded digits.

    [dim]remap distill --teacher vit_large --student vit_small --method vpt_deep --data FOLDER[/dim]
    """
    words = opt.words(locals())
    _train(words, recipe, settings, output, resume, dry_run, json, with_teacher=True)


@app.command(rich_help_panel=opt.TRAIN)
def tune(
    student: opt.Student = None,
    method: opt.Method = None,
    losses: opt.Losses = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    weights: opt.Weights = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    lr: opt.LearningRate = None,
    seed: opt.Seed = None,
    recipe: opt.RecipeWord = None,
    settings: opt.Settings = None,
    output: opt.Output = None,
    resume: opt.Resume = None,
    skip_bad: opt.SkipBad = False,
    devices: opt.Devices = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
) -> None:
    """Tune a student without a teacher: the same loop, labels only."""
    words = opt.words(locals())
    _train(words, recipe, settings, output, resume, dry_run, json, with_teacher=False)


def _train(
    words: dict,
    recipe_word: str | None,
    settings: list[str] | None,
    output: Path | None,
    resume: Path | None,
    dry_run: bool,
    json: bool,
    *,
    with_teacher: bool,
) -> None:
    devices = words[opt.DEVICES]
    launch.processes(launch.recorded(resume) if devices is None and resume is not None else devices)
    from remap_cli import train

    asked = [name for name, value in words.items() if value is not None and name != opt.DEVICES]
    asked += [*(["set"] if settings else []), *(["recipe"] if recipe_word else []), *(["output"] if output else [])]
    if resume is not None:
        train.go_on(resume, asked, json, devices)
        return
    train.from_words(words, recipe_word, settings or [], output, dry_run, json, with_teacher=with_teacher)


# The other commands add themselves to ``app``.
from remap_cli import cache, look, recipes, repeat, shrink, use  # noqa: E402, F401
