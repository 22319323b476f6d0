"""The options of the training commands, one row each: the commands take their signatures from this table.

A new option is a row here, its recipe field in ``remap.recipe.overrides.WORDS`` if it sets one, and a line of
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
_TRAINING, _RUN = "Training", "Run"

# Options that other commands take too.
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave unreadable images out of evaluation too.", rich_help_panel=_RUN)
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
Multilabel = Annotated[
    bool, typer.Option("--multilabel", help="Images have any number of labels (task: multilabel in a recipe).")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.", rich_help_panel=_RUN)]


def require_there(run: Path) -> None:
    """Refuse a run that is not there, before what reads it is loaded: PyTorch takes seconds."""
    from remap.io.paths import expanded
    from remap.runs import run_dir  # imports pydantic, which --help needs not

    run_dir.require_there(expanded(run))


@dataclass(frozen=True)
class OptionRow:
    """One option of one or more training commands.

    Attributes:
        name: The key of its value; the flag is ``--name`` with hyphens unless ``flag`` is given.
        kind: Its type, or a complete annotation that other commands use too.
        commands: Names of the commands that take it.
        shown: The default as the help shows it; a test compares it with the recipes.
        help: The line of the help.
        panel: The panel of the help.
        default: The value when the option is not given.
        least: The smallest number it takes.
        word: The key of ``remap.recipe.overrides.WORDS`` that it sets, where it is not ``name``.
    """

    name: str
    kind: Any
    commands: tuple[str, ...]
    shown: str | None = None
    help: str = ""
    panel: str = _RUN
    flag: str = ""
    default: Any = None
    least: int | None = None
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
            shown = self.shown or True
            option = typer.Option(
                self.option, help=self.help, show_default=shown, rich_help_panel=self.panel, min=self.least
            )
            annotation = Annotated[self.kind | None if default is None else self.kind, option]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_models = functools.partial(OptionRow, panel="Models and losses")
_training = functools.partial(OptionRow, panel=_TRAINING)
_comparison = functools.partial(OptionRow, panel="Comparison")
DISTILL, TUNE, BUILD, COMPARE, LR = "distill", "tune", "cache build", "compare", "lr"
RECOMMEND = "recommend"
_LONG, _RUNS = (DISTILL, TUNE, BUILD, COMPARE, RECOMMEND), (DISTILL, TUNE)
_ALL, _TEACH = (*_LONG, LR), (DISTILL, BUILD, COMPARE, RECOMMEND)
# Those that do not begin with the embedded recipe.
_ALONE = (TUNE, LR)
_MODEL = "Short name, timm name, local-dir:FOLDER, file, clip:NAME or run directory"
_TEACHER = f"{_MODEL}; self or ema, made of the student; or several with"
_METHOD = "Tuning method of the student; see `remap methods`."
_EPOCHS, _BATCH = "Passes over the training images.", "Images per update, over all processes."
_LISTED = "Comma-separated, with weights after a colon"
_LOSSES = (
    "ce,kd,attention, of these what the method can follow, with few labels ce:0.1 and kd at a temperature of 2; without"
    " a teacher ce"
)

_DATA = (
    "Folder of class folders, tar or zip of one, CSV of labels, Parquet file, hf:NAME, webdataset:TARS or digits; see"
    " docs/data.md."
)
_TRACKERS = "Experiment tracker: tensorboard, wandb, mlflow or trackio"

# Those that set a recipe field.
RECIPE_OPTIONS = (
    _models("teacher", str, (LR,), "none, labels only", f"{_TEACHER} weights: vit_large,dinov2_base:0.5."),
    _models("teacher", str, _TEACH, "mini_teacher", f"{_TEACHER} weights: vit_large,dinov2_base:0.5."),
    _models("student", str, _TEACH, "mini_student", f'{_MODEL}; or "shrink(teacher, depth=6, width=384)".'),
    _models("student", str, _ALONE, "mini_student", f"{_MODEL}."),
    _models("init", str, (DISTILL,), "the student's own", "Initialise from the teacher; see `remap remappings`."),
    _models("force_init", bool, (DISTILL,), None, "Let --init overwrite weights that are not random."),
    _models("method", str, (DISTILL, BUILD), "lora; digits hira", _METHOD),
    _models("method", str, _ALONE, "lora", _METHOD),
    _models("losses", str, (*_TEACH, LR), _LOSSES, f"{_LISTED}: ce,kd:0.5. See `remap losses`."),
    # Without a teacher: those on labels, and those on images of another domain.
    _models("losses", str, (TUNE,), "ce; with --target ce,infomax", f"{_LISTED}: ce,infomax:0.3. See `remap losses`."),
    _training("data", str, _ALL, "digits", _DATA),
    _training("val_data", str, _ALL, None, "Separate folder or tar to evaluate on."),
    _training(
        "unlabeled",
        str,
        (*_TEACH, LR),
        None,
        "Folder or tar of images without labels, to distil on as well; without --data, alone.",
    ),
    _training("target", str, _RUNS, None, "Folder or tar of another domain's images, without labels, to adapt to."),
    _models(
        "classes",
        str,
        _ALL,
        "names of the data",
        'Words for clip:NAME: "ant,hat|cap", or a file; see docs/language.md.',
    ),
    _models(
        "templates", str, _ALL, "one", "Sentences around the words: one, clip (its 80), or a file of lines with {}."
    ),
    _models("weights", str, (*_TEACH, LR), "pretrained", "For teacher and student: pretrained or none."),
    _models("weights", str, (TUNE,), "pretrained", "Of the student: pretrained or none."),
    _training("epochs", int, (DISTILL, BUILD, RECOMMEND), "30; digits 10", _EPOCHS),
    _training("epochs", int, (COMPARE,), "30; digits 10, and 6 where nothing is chosen", _EPOCHS),
    _training("epochs", int, (TUNE,), "30", _EPOCHS),
    _training("batch_size", int, _TEACH, "64; digits 32", _BATCH),
    _training("batch_size", int, _ALONE, "64", _BATCH),
    _training("lr", float, _RUNS, "the method's own, by the student's width", "Peak learning rate."),
    _training("seed", int, _ALL, "0", "Decides every random choice."),
    _training("track", str, (DISTILL, TUNE, COMPARE), None, f"{_TRACKERS}; several with commas."),
    OptionRow("skip_bad", SkipBad, _ALL),
    OptionRow("devices", Devices, (DISTILL, TUNE, BUILD), word="processes"),
)
_METHODS = "Comma-separated names, a+b together, categories (prompt, 2b) or all; full@layers starts from the teacher."
_SWEEP = "An option of methods, or any recipe field: method.num_prompts=5,10,50. Repeatable."
_LOSS_SET = "Losses with the teacher, compared with the other sets: ce,kd:0.5. Repeatable."
_BUDGET = "Of each cell: epochs=12, minutes=10 of training, or parameters=50000 trained."
_SUITE = "Compare on each set of a suite: offline, five_categories, vtab1k, fgvc, fewshot11, words or a YAML file."
_SESSIONS = "Learn in so many sessions, groups of classes (a,b/c,d) or `folders` of looks, by ways of `remap extend`."
_WAYS = "Of --sessions: those of `remap extend --how`, or joint; lwf:20 has a memory of 20 images a class."
_SEARCH = "Trials of learning rate and weight decay for each cell, on held-out training images: 20, or random:20."
_JOBS = "Cells at once: a number, or auto, by cores, GPUs and memory."
_SLURM = "Run the cells as a SLURM job array: slurm_partition=gpu,gpus_per_node=1,timeout_min=240 (submitit)."
_CELLS = "Folder of the comparison. Finished cells are not run again."
_TRIALS = "Folder of the trials. Finished ones are not run again."
_NO_BASELINE = "Leave out training the student once more on labels alone, to compare."
_DRY_RUN = "Build both models, run one batch and print estimates of time, memory and disk; train nothing."
OPTIONS = (
    *RECIPE_OPTIONS,
    _comparison("methods", str, (COMPARE,), "two of each category, full@weight_selection", _METHODS),
    _comparison("methods", str, (RECOMMEND,), "two of each category", _METHODS),
    _comparison("seeds", int, (COMPARE,), "3", "Runs of each cell.", least=1),
    _comparison("sweeps", list[str], (COMPARE,), None, _SWEEP, flag="--sweep"),
    _comparison("loss_sets", list[str], (COMPARE,), "the losses of the recipe", _LOSS_SET, flag="--loss-set"),
    _comparison("budget", str, (COMPARE,), "the epochs of the recipe", _BUDGET),
    _comparison("budget", str, (RECOMMEND,), "the epochs of the recipe", "epochs=12, or parameters=50000 trained."),
    _comparison("search", str, (COMPARE,), "declared defaults", _SEARCH),
    _comparison("jobs", str, (COMPARE,), "auto", _JOBS),
    _comparison("slurm", str, (COMPARE,), None, _SLURM),
    _comparison("suite", str, (COMPARE,), None, _SUITE),
    _comparison("sets", Path, (COMPARE,), None, "Folder of the sets of a suite."),
    _comparison("sessions", str, (COMPARE,), None, _SESSIONS),
    _comparison("ways", str, (COMPARE,), "ranpac,prototypes,lwf,finetune,joint", _WAYS),
    OptionRow("steps", int, (LR,), None, "Steps of the test.", _TRAINING, default=100, least=10),
    OptionRow("recipe", str, _ALL, None, "A shipped recipe's name or a YAML file; other options override it."),
    OptionRow("settings", list[str], _ALL, None, "Any recipe field: --set train.lr=0.1. Repeatable.", flag="--set"),
    OptionRow("output", Path, _RUNS, "runs/NAME-METHOD-001", "Run directory to make."),
    OptionRow("output", Path, (COMPARE,), "runs/compare-NAME", _CELLS),
    OptionRow("output", Path, (RECOMMEND,), "runs/recommend-NAME", _TRIALS),
    OptionRow("no_baseline", bool, (DISTILL,), None, _NO_BASELINE),
    OptionRow("resume", Path, _RUNS, None, "Continue an interrupted run directory."),
    OptionRow("dry_run", bool, _RUNS, None, _DRY_RUN),
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
