"""``remap predict``: classes of images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from remap.errors import RecipeError
from remap.io.human_size import number_of
from remap.io.names import plain
from remap.io.paths import expanded
from remap_cli import console, launch
from remap_cli import options as opt

_FILE = "File"


def _into_file(flag: str, help: str) -> Any:
    return typer.Option(flag, help=help, show_default=False, rich_help_panel=_FILE)


def predict(
    run: Annotated[
        Path | None, typer.Argument(help="A run directory or shelf; left out with --task.", show_default=False)
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help='Images, folders, tars, zips, patterns ("photos/**/*.jpg"), or - for names on standard input.',
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="NAME=RUN, instead of RUN; repeat it for several on one backbone.")
    ] = None,
    list_file: Annotated[
        list[Path] | None, typer.Option("--list", help="Text file of images, folders and so on, one a line.")
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Likeliest classes to show for each image; by default 1.", show_default=False),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of task multilabel: show all classes that are as likely; by default 0.5.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images computed at once.")] = 64,
    adapt: Annotated[
        str | None,
        typer.Option(
            help="tent: adapt the norms to these images on the way; the run stays as it is.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32 or bf16; by default that of the run, and auto for tasks and shelves.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None, _into_file("--output", "Write rows to a .jsonl, .csv or .parquet file; continues if killed.")
    ] = None,
    probabilities: Annotated[
        bool, _into_file("--probabilities", "Let rows hold the probabilities of all classes.")
    ] = False,
    embeddings: Annotated[bool, _into_file("--embeddings", "Let rows hold the pooled features.")] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Exit with 0 although files cannot be read; they are still reported.")
    ] = False,
    devices: opt.Devices = None,
    json: opt.Json = False,
) -> None:
    """Predict the class of each image. Unreadable files are reported; the exit code is then 2."""
    runs, words = _runs(run, images or [], task or [])
    if output is None and (probabilities or embeddings or devices is not None):
        raise RecipeError(
            ["--probabilities, --embeddings and --devices are for a file: add --output FILE"], "command line"
        )
    if output is None and not launch.is_first():  # the images are not divided among processes
        return
    # What needs no PyTorch, so that a wrong name is said at once.
    from remap.prediction.formats import require_writable
    from remap.prediction.inputs import Inputs

    if output is not None:
        require_writable(expanded(output))
    if isinstance(runs, Path):
        opt.require_there(runs)
    inputs = Inputs(words, list_file or [])
    launch.start_processes(devices)
    from remap.prediction.predict import in_precision_of, open_students, predict_to_file
    from remap.prediction.predictions import Wanted, predictions

    wanted = Wanted(top, probabilities, embeddings, batch_size, precision=precision, adapt=adapt, threshold=threshold)
    with console.Reporter(quiet=not launch.is_first()) as progress:
        if output is not None:
            counts = predict_to_file(runs, inputs, output, wanted, progress)
            found = []
        else:
            students = open_students(runs)
            wanted = in_precision_of(runs, students, wanted)
            found = [row.to_dict() for rows in predictions(students, inputs, wanted) for row in rows]
            counts = (len(found), sum(row["error"] is not None for row in found))
        if inputs.left_out:
            progress.say(inputs.left_out_text)
    if counts is None:
        return
    if output is not None:
        summary = {"output": str(output), "images": counts[0], "unreadable": counts[1]}
        console.emit(summary) if json else console.line(
            f"{number_of(counts[0], 'image')}, {counts[1]:,} unreadable: {output}"
        )
    else:
        console.emit(found) if json else _show(found)
    if counts[1] and not skip_bad:
        raise typer.Exit(2)


def _runs(run: Path | None, images: list[str], tasks: list[str]) -> tuple[Path | dict[str, str], list[str]]:
    """Return what predicts, and the images: with --task the first word is an image."""
    if not tasks:
        if run is None:
            raise RecipeError(["name a run directory, or tasks with --task NAME=RUN"], "command line")
        return run, images
    named = [task.partition("=") for task in tasks]
    if not all(name and path for name, _, path in named) or len({name for name, _, _ in named}) < len(named):
        raise RecipeError(["--task is NAME=RUN, each name once"], "command line")
    if run is not None and any((run / name).is_file() for name in ("recipe.yaml", "task.json", "shelf.json")):
        what = f"{plain(str(run))}: a run beside --task, which names all of them (--task NAME={plain(str(run))})"
        raise RecipeError([what], "command line")
    return {name: path for name, _, path in named}, [*([str(run)] if run is not None else []), *images]


def _show(found: list[dict[str, Any]]) -> None:
    several = any("task" in row for row in found)
    rows = []
    for row in found:
        best = ", ".join(f"{one['class']}{console.HELD}{one['probability']:.1%}" for one in row["top"])
        answer = best or ("none" if row["error"] is None else f"cannot be read: {row['error']}")
        rows.append([row["path"], *([row["task"]] if several else []), answer])
    columns = ["image", *(["task"] if several else []), "class"]
    # Each image has a row for each task; one that is named twice is predicted twice.
    images = len(found) // max(1, len({row.get("task") for row in found}))
    console.table(number_of(images, "image"), columns, rows, wrap=(0, len(columns) - 1))
