"""The ``remap`` command. Heavy imports happen inside the commands, so that help and listings are instant."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from remap import __version__
from remap_cli import options as opt
from remap_cli import view

app = typer.Typer(
    name="remap",
    help="Distil a large vision transformer into a small one tuned by a parameter-efficient method.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Look at, copy and check recipes.", no_args_is_help=True)
app.add_typer(recipes, name="recipes", rich_help_panel=opt.LOOK)


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2, Ctrl-C is 130, a bug is a traceback."""
    from remap.errors import RemapError

    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except RemapError as error:
        view.error(error)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        view.note("interrupted; finished runs and checkpoints are as they were")
        _leave(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(0)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM outside the training loop (which saves first) leaves as Ctrl-C does, with its own exit code."""
    from remap.errors import Interrupted

    raise Interrupted("terminated; finished runs and checkpoints are as they were", exit_code=128 + number)


def _leave(code: int) -> None:
    """Exit without waiting for other ranks that may be stuck in a collective call."""
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ and code:
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
    processes: opt.Processes = None,
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
    processes: opt.Processes = None,
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
    from remap_cli import train

    asked = [name for name, value in words.items() if value is not None] + (["set"] if settings else [])
    if resume is not None:
        train.go_on(resume, [*asked, *(["recipe"] if recipe_word else []), *(["output"] if output else [])], json)
        return
    train.from_words(words, recipe_word, settings or [], output, dry_run, json, with_teacher=with_teacher)


# The other commands add themselves to ``app``.
from remap_cli import look, use  # noqa: E402, F401
