"""The words every training command takes, each defined once."""

from pathlib import Path
from typing import Annotated, Any

import typer

TRAIN, USE, LOOK = "Train and compare", "Use a run", "Look things up"
_MODELS, _TRAINING, _RUN = "Models and losses", "Training", "Run"

# Shown in the help; the defaults themselves stand in the recipes, and a test compares the two.
DEFAULTS = {
    "teacher": "mini_teacher",
    "student": "mini_student",
    "method": "vpt_deep",
    "losses": "ce,kd,attention",
    "weights": "pretrained",
    "data": "digits",
    "epochs": "30",
    "batch_size": "64",
    "seed": "0",
}
# What the embedded recipe has otherwise.
DIGITS = {"epochs": "12", "batch_size": "32"}

Teacher = Annotated[
    str | None,
    typer.Option(
        help="Short name, timm name, local-dir:FOLDER or run directory; self or ema, made of the student; or several"
        " with weights: vit_large,dinov2_base:0.5.",
        show_default=DEFAULTS["teacher"],
        rich_help_panel=_MODELS,
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        help='One model, as for the teacher; or one cut from it: "shrink(teacher, depth=6, width=384)".',
        show_default=DEFAULTS["student"],
        rich_help_panel=_MODELS,
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        help="Start the student from the teacher's weights; see `remap remappings`.",
        show_default="its own",
        rich_help_panel=_MODELS,
    ),
]
ForceInit = Annotated[
    bool,
    typer.Option("--force-init", help="Let --init overwrite weights that are not random.", rich_help_panel=_MODELS),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="Tuning method of the student; see `remap methods`.",
        show_default=DEFAULTS["method"],
        rich_help_panel=_MODELS,
    ),
]
Losses = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated, with weights after a colon: ce,kd:0.5. See `remap losses`.",
        show_default=f"{DEFAULTS['losses']}, of these what the method can follow; without a teacher ce",
        rich_help_panel=_MODELS,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="For teacher and student: pretrained or none.", show_default=DEFAULTS["weights"], rich_help_panel=_MODELS
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder of class folders (with or without train/ and val/), a tar of one, or digits.",
        show_default=DEFAULTS["data"],
        rich_help_panel=_TRAINING,
    ),
]
ValData = Annotated[str | None, typer.Option(help="Separate folder or tar to evaluate on.", rich_help_panel=_TRAINING)]
Unlabeled = Annotated[
    str | None,
    typer.Option(
        help="Folder or tar of images without labels, to distil on beside the labelled ones.",
        rich_help_panel=_TRAINING,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        help="Passes over the training images.",
        show_default=f"{DEFAULTS['epochs']}; digits {DIGITS['epochs']}",
        rich_help_panel=_TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Images to one update, all processes together.",
        show_default=f"{DEFAULTS['batch_size']}; digits {DIGITS['batch_size']}",
        rich_help_panel=_TRAINING,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate.", show_default="the method's own, by the student's width", rich_help_panel=_TRAINING
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(help="Decides every random choice.", show_default=DEFAULTS["seed"], rich_help_panel=_TRAINING),
]
RecipeWord = Annotated[
    str | None,
    typer.Option(help="A shipped recipe's name or a YAML file; other words override it.", rich_help_panel=_RUN),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any field of the recipe: --set train.weight_decay=0.01. May be repeated.", rich_help_panel=_RUN
    ),
]
Output = Annotated[
    Path | None, typer.Option(help="Run directory to make.", show_default="runs/NAME-METHOD-001", rich_help_panel=_RUN)
]
Resume = Annotated[Path | None, typer.Option(help="Go on with an interrupted run directory.", rich_help_panel=_RUN)]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave unreadable images out of evaluation too.", rich_help_panel=_TRAINING)
]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="GPUs, or processes on the CPU: starts so many, unless torchrun or accelerate launch has.",
        show_default="1",
        rich_help_panel=_RUN,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Build both models, push one batch, print the estimates, train nothing.", rich_help_panel=_RUN
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.", rich_help_panel=_RUN)
]

_WORDS = (
    "teacher",
    "student",
    "init",
    "force_init",
    "method",
    "losses",
    "data",
    "val_data",
    "unlabeled",
    "weights",
    "epochs",
    "batch_size",
    "lr",
    "seed",
    "skip_bad",
)
# The word of recipes for --devices.
DEVICES = "processes"


def words(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe words among a command's arguments; a flag that is off counts as not given."""
    found = {name: None if values[name] is False else values[name] for name in _WORDS if name in values}
    return {**found, DEVICES: values["devices"]} if "devices" in values else found
