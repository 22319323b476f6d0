"""The Typer application: every command, with its panel of the help.

A command's file is imported when it is called, and heavy packages inside of it, so that help and listings are at once
there and need no torch.
"""

import shlex
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from remap import __version__
from remap.errors import RemapError, UnknownName
from remap_cli.options import LOOK, TRAIN, USE

# What other tools call their commands.
MEANT = {
    "train": "`remap distill` trains with a teacher, `remap tune` without one",
    "fit": "`remap distill` trains with a teacher, `remap tune` without one",
}


class Row(NamedTuple):
    """A command: ``function`` of the file ``module`` of this package, or the group of that name there.

    Attributes:
        about: What the list of commands says; the first line of the function's docstring, or the group's help.
    """

    panel: str
    module: str
    about: str
    function: str = ""


COMMANDS = {
    "init": Row(
        TRAIN, "init", "Look at your images and this machine, and write a commented recipe that `remap distill` runs."
    ),
    "distill": Row(TRAIN, "training", "Train a student with a teacher. With no options it runs a built-in demo."),
    "tune": Row(TRAIN, "training", "Tune a student without a teacher: the same loop, labels only."),
    "extend": Row(
        TRAIN,
        "extend",
        "Let a run learn new classes, or new images of its classes, and keep what it knew, without its old images.",
    ),
    "adapt": Row(
        TRAIN,
        "adapt",
        "Adapt a finished run to images of another domain, by these alone: no labels, and not the images of the run.",
    ),
    "lr": Row(
        TRAIN, "lr", "Suggest train.lr for a method on your images: a few steps at growing rates; nothing is written."
    ),
    "shrink": Row(
        TRAIN,
        "shrink",
        "Cut a student from a teacher: complete blocks, heads, MLP units and channels. The result is a folder for"
        " timm.",
    ),
    "recommend": Row(
        TRAIN, "recommend", "Rank methods for your images and budget by short runs on held-out training images."
    ),
    "compare": Row(
        TRAIN, "compare", "Compare methods, each with and without the teacher, on the same data, budget and seeds."
    ),
    "eval": Row(
        USE,
        "evaluate",
        "Evaluate a finished run. On its own split this gives exactly the reported accuracy.",
        "evaluate",
    ),
    "report": Row(USE, "report", "Write report.html about a finished run or comparison: one file that opens anywhere."),
    "predict": Row(
        USE, "predict", "Predict the class of each image. Unreadable files are reported; the exit code is then 2."
    ),
    "export": Row(USE, "export", "Export the student of a run, and check on images that the files answer as it does."),
    "repeat": Row(USE, "repeat", "Run a finished run's recipe again and compare, bit for bit."),
    "tasks": Row(USE, "tasks", "Keep many tasks on one backbone in a folder."),
    "methods": Row(LOOK, "listings", "List the tuning methods by the survey's categories, or the options of one."),
    "losses": Row(
        LOOK,
        "listings",
        "List the loss terms that transfer the teacher's knowledge (category 5), or show one with its options.",
    ),
    "remappings": Row(
        LOOK,
        "remappings",
        "List how a student gets its weights or its architecture from the teacher (category 5), or show one.",
    ),
    "models": Row(LOOK, "models", "List built-in models. With a search word, also list matching timm models."),
    "doctor": Row(
        LOOK,
        "doctor",
        "Check this machine: versions, devices, precision, caches and disk. Exit code 2 where something is missing.",
    ),
    "data": Row(LOOK, "data", "Look at images before a run."),
    "recipes": Row(LOOK, "recipes", "List, show, copy and check recipes."),
    "cache": Row(LOOK, "cache", "List, build and clear cached outputs of teachers, and tuned teachers."),
}


class _Loaded(Mapping[str, Any]):
    """The commands by name, each imported when it is looked up; ``others`` were added to the application itself."""

    def __init__(self, others: Mapping[str, Any]) -> None:
        self._others = others

    def __getitem__(self, name: str) -> Any:
        return _load(name) if name in COMMANDS else self._others[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*COMMANDS, *self._others])

    def __len__(self) -> int:
        return len(COMMANDS) + len(self._others)


@cache
def _load(name: str) -> Any:
    row, alone = COMMANDS[name], typer.Typer(rich_markup_mode="rich")
    found = getattr(import_module(f"remap_cli.{row.module}"), row.function or name)
    if isinstance(found, typer.Typer):
        alone.add_typer(found, name=name, rich_help_panel=row.panel)
    else:
        alone.command(name, rich_help_panel=row.panel)(found)
    return typer.main.get_group(alone).commands[name]


def _require_words(args: list[str]) -> None:
    """Refuse empty words, as of variables that are not set: as paths they would be the current folder.

    Raises:
        RemapError: There is one.
    """
    if any(not word or (word.startswith("--") and word.find("=") == len(word) - 1) for word in args):
        given = f"remap {shlex.join(args)}"
        raise RemapError("a word of the command line is empty", given=given, do="check the variable that it came from")


class Commands(TyperGroup):
    """The commands, and what is meant by some words that are none of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Loaded(self.commands)  # type: ignore[assignment]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # Typer's way to show the help prints by its own ``format_help``
            typer.echo(self.get_help(ctx))
            raise typer.Exit(2)
        if not ctx.resilient_parsing:  # which completion is
            _require_words(args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:  # type: ignore[override]
        if args and args[0] in MEANT:
            raise UnknownName(f"no such command '{args[0]}'", do=MEANT[args[0]])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except Exception as error:  # of a class that Typer does not export
            if ctx.invoked_subcommand == "tune" and getattr(error, "option_name", None) == "--teacher":
                raise UnknownName("`remap tune` has no --teacher", do="use `remap distill`") from None
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super(TyperGroup, self).format_help(ctx, formatter)  # not Typer's, which imports Markdown for boxes

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for panel, rows in groupby(COMMANDS.items(), key=lambda item: item[1].panel):
            with formatter.section(panel):
                formatter.write_dl([(name, row.about) for name, row in rows])


app = typer.Typer(
    name="remap",
    cls=Commands,
    help="Distil a large vision transformer into a small one tuned by a parameter-efficient method.",
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _show_version(given: bool) -> None:
    if given:
        typer.echo(f"remap {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    from remap_cli import console

    warnings.showwarning = console.show_warning
