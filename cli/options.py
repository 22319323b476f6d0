"""The options of the training commands, one row each: the commands take their signatures from this table.

A new option is a row here, its recipe field in ``remap.recipe.resolve.WORDS`` if it sets one, and a line of
tests/cli/flags.txt.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

# Panels of the list of commands, and of a training command's options.
TRAIN, USE, LOOK = "Train and compare", "Use a run", "Look things up"
_COMPARISON, _MODELS, _TRAINING, _RUN = "Comparison", "Models and losses", "Training", "Run"

# Options that other commands take too.
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave unreadable images out of evaluation too.", rich_help_panel=_TRAINING)
]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of GPUs (or CPU processes) to use. Under torchrun or accelerate launch it is only checked.",
        show_default="1",
        rich_help_panel=_RUN,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.", rich_help_panel=_RUN)]


@dataclass(frozen=True)
class OptionRow:
    """One option of one or more training commands.

    Attributes:
        name: The key of its value; the flag is ``--name`` with hyphens.
        kind: Its type, or a complete annotation.
        commands: Names of the commands that take it.
        help: The line of the help.
        panel: The panel of the help.
        shown: The default as the help shows it; a test compares it with the recipes.
        flag: The flag, where it is not ``--name``.
        least: The smallest number allowed.
        default: The value when the option is not given.
        word: The key of ``remap.recipe.resolve.WORDS`` that it sets, where it is not ``name``.
    """

    name: str
    kind: Any
    commands: tuple[str, ...]
    help: str = ""
    panel: str = _RUN
    shown: str | None = None
    flag: str = ""
    least: int | None = None
    default: Any = None
    word: str = ""

    @property
    def option(self) -> str:
        """Return the flag as it is typed."""
        return self.flag or f"--{self.name.replace('_', '-')}"

    @property
    def parameter(self) -> inspect.Parameter:
        """Return the option as a parameter that Typer reads."""
        default = False if self.kind in (bool, SkipBad, Json) else self.default
        annotation = self.kind
        if self.help:
            # The flag is spelled out: Typer would add --no-NAME to that of a bool.
            option = typer.Option(
                self.option, help=self.help, show_default=self.shown or True, rich_help_panel=self.panel, min=self.least
            )
            annotation = Annotated[self.kind | None if default is None else self.kind, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


DISTILL, TUNE, BUILD, COMPARE = "distill", "tune", "cache build", "compare"
_ALL, _RUNS, _TEACH = (DISTILL, TUNE, BUILD, COMPARE), (DISTILL, TUNE), (DISTILL, BUILD, COMPARE)

# Those that set a recipe field.
RECIPE_OPTIONS = (
    OptionRow(
        "teacher",
        str,
        _TEACH,
        "Short name, timm name, local-dir:FOLDER or run directory; self or ema, made of the student; or several with"
        " weights: vit_large,dinov2_base:0.5.",
        _MODELS,
        "mini_teacher",
    ),
    OptionRow(
        "student",
        str,
        _ALL,
        'One model, as for the teacher; or one cut from it: "shrink(teacher, depth=6, width=384)".',
        _MODELS,
        "mini_student",
    ),
    OptionRow(
        "init",
        str,
        (DISTILL,),
        "Start the student from the teacher's weights; see `remap remappings`.",
        _MODELS,
        "the student's own",
    ),
    OptionRow("force_init", bool, (DISTILL,), "Let --init overwrite weights that are not random.", _MODELS),
    OptionRow(
        "method", str, (DISTILL, TUNE, BUILD), "Tuning method of the student; see `remap methods`.", _MODELS, "vpt_deep"
    ),
    OptionRow(
        "losses",
        str,
        _ALL,
        "Comma-separated, with weights after a colon: ce,kd:0.5. See `remap losses`.",
        _MODELS,
        "ce,kd,attention, of these what the method can follow; without a teacher ce",
    ),
    OptionRow(
        "data",
        str,
        _ALL,
        "Folder of class folders (with or without train/ and val/), a tar of one, or digits.",
        _TRAINING,
        "digits",
    ),
    OptionRow("val_data", str, _ALL, "Separate folder or tar to evaluate on.", _TRAINING),
    OptionRow(
        "unlabeled",
        str,
        _TEACH,
        "Folder or tar of images without labels, to distil on in addition to the labelled ones.",
        _TRAINING,
    ),
    OptionRow("weights", str, _ALL, "For teacher and student: pretrained or none.", _MODELS, "pretrained"),
    OptionRow("epochs", int, _ALL, "Passes over the training images.", _TRAINING, "30; digits 12"),
    OptionRow("batch_size", int, _ALL, "Images per update, over all processes.", _TRAINING, "64; digits 32"),
    OptionRow("lr", float, _RUNS, "Peak learning rate.", _TRAINING, "the method's own, by the student's width"),
    OptionRow("seed", int, _ALL, "Decides every random choice.", _TRAINING, "0"),
    OptionRow("skip_bad", SkipBad, _ALL),
    OptionRow("devices", Devices, (DISTILL, TUNE, BUILD), word="processes"),
)
OPTIONS = (
    *RECIPE_OPTIONS,
    OptionRow(
        "methods",
        str,
        (COMPARE,),
        "Comma-separated names, combinations (a+b) or categories (prompt), or all.",
        _COMPARISON,
        "one or two of each category",
    ),
    OptionRow("seeds", int, (COMPARE,), "Runs of each cell.", _COMPARISON, least=1, default=1),
    OptionRow("recipe", str, _ALL, "A shipped recipe's name or a YAML file; other options override it."),
    OptionRow(
        "settings",
        list[str],
        _ALL,
        "Any field of the recipe: --set train.weight_decay=0.01. May be repeated.",
        flag="--set",
    ),
    OptionRow("output", Path, _RUNS, "Run directory to make.", shown="runs/NAME-METHOD-001"),
    OptionRow(
        "output",
        Path,
        (COMPARE,),
        "Folder of the comparison. Finished cells are not run again.",
        shown="runs/compare-NAME",
    ),
    OptionRow("resume", Path, _RUNS, "Continue an interrupted run directory."),
    OptionRow(
        "dry_run",
        bool,
        _RUNS,
        "Build both models, run one batch and print estimates of time, memory and disk; train nothing.",
    ),
    OptionRow("json", Json, _ALL),
)


def training_command(command: str) -> Callable[[Callable[[dict[str, Any]], None]], Callable[..., None]]:
    """Give a function the options of ``command`` as its signature; it is called with the dict of their values."""
    parameters = [row.parameter for row in OPTIONS if command in row.commands]

    def decorate(run: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def call(**values: Any) -> None:
            run(values)

        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def recipe_words(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that set recipe fields, by their key in ``WORDS``; a flag that is off counts as not given."""
    rows = [row for row in RECIPE_OPTIONS if row.name in values]
    return {row.word or row.name: None if values[row.name] is False else values[row.name] for row in rows}
