"""Commands that use a finished run, and ``remap compare``."""

from pathlib import Path
from typing import Annotated

import typer

from remap.io.human_size import size
from remap.io.paths import expanded
from remap_cli import launch, view
from remap_cli import options as opt
from remap_cli.main import app

Run = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]


@app.command("eval", rich_help_panel=opt.USE)
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Other images with the same class names; by default the run's own split.")
    ] = None,
    skip_bad: opt.SkipBad = False,
    devices: opt.Devices = None,
    json: opt.Json = False,
) -> None:
    """Evaluate a run's student again; gives the run's accuracy to the sample."""
    launch.processes(devices)
    from remap.distributed.launch import check_processes
    from remap.pipeline.evaluation import evaluate_run

    with view.Reporter(quiet=not launch.is_first()) as progress:
        check_processes(devices)
        found = evaluate_run(run, data, skip_bad, progress)
    if not launch.is_first():
        return
    if json:
        view.emit(found)
        return
    rows = [
        [r["class"], r["images"], "-" if r["accuracy"] is None else f"{r['accuracy']:.1%}"] for r in found["classes"]
    ]
    rows.append(["all", found["images"], f"{found['accuracy']:.2%}"])
    view.table(f"{run} on {found['data']}", ["class", "images", "accuracy"], rows, right=(1, 2))
    for name, reason in found["skipped"]:
        view.note(f"left out: {name} ({reason})")


@app.command(rich_help_panel=opt.USE)
def predict(
    run: Run,
    images: Annotated[list[str], typer.Argument(help="Image files or folders.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images to one forward pass.")] = 64,
    json: opt.Json = False,
) -> None:
    """Name the class of images. An unreadable one is reported and ends in exit code 2, the others are predicted."""
    if not launch.is_first():  # nothing here is shared out
        return
    from remap.pipeline.predict import image_files
    from remap.pipeline.predict import predict as predictions
    from remap.pipeline.student_api import load_student

    with view.Reporter() as progress:
        paths = image_files(images)
        student = load_student(run)
        found = list(predictions(student, paths, top=top, batch_size=batch_size, progress=progress))
    if json:
        view.emit(
            [
                {"path": p.path, "top": [{"class": c, "probability": q} for c, q in p.top], "error": p.error or None}
                for p in found
            ]
        )
    else:
        rows = [[p.path, ", ".join(f"{c} {q:.1%}" for c, q in p.top) or f"cannot be read: {p.error}"] for p in found]
        view.table(f"{len(found)} image(s)", ["image", "class"], rows, wrap=(0, 1))
    if any(p.error for p in found):
        raise typer.Exit(2)


@app.command(rich_help_panel=opt.TRAIN)
def compare(
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated names, combinations (a+b) or categories (prompt), or all.",
            show_default="one or two of each category",
            rich_help_panel="Comparison",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell.", rich_help_panel="Comparison")] = 1,
    teacher: opt.Teacher = None,
    student: opt.Student = None,
    losses: opt.Losses = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    unlabeled: opt.Unlabeled = None,
    weights: opt.Weights = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    recipe: opt.RecipeWord = None,
    settings: opt.Settings = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the comparison; runs/compare-NAME by default. Finished cells are kept."),
    ] = None,
    skip_bad: opt.SkipBad = False,
    json: opt.Json = False,
) -> None:
    """Compare methods, each with and without the teacher, on the same data, budget and seeds."""
    from remap.pipeline.compare import compare as run_compare
    from remap.pipeline.comparison_cells import chosen_methods
    from remap.runs.run_dir import default_path
    from remap_cli.train import read_recipe

    values = locals()
    chosen = chosen_methods(methods)
    with view.Reporter() as progress:
        resolved = read_recipe(opt.words(values), recipe, settings or [], with_teacher=True)
        folder = expanded(output or default_path() / f"compare-{resolved.name}")
        table = run_compare(resolved, chosen, seeds, folder, progress)
    if json:
        view.emit(table)
    else:
        _show(table)


def _show(table: dict) -> None:
    def cell(found: dict) -> str:
        spread = "" if found["spread"] is None else f" ± {found['spread']:.1%}".replace("%", "")
        return f"{found['mean']:.1%}".replace("%", "") + spread

    rows = []
    for row in table["rows"]:
        share = row["trainable_parameters"] / row["total_parameters"]
        cells = [
            row["method"],
            f"{view.count(row['trainable_parameters'])} ({share:.1%})",
            cell(row["alone"]),
            cell(row["teacher"]),
            f"{100 * row['gain']:+.1f}",
            f"{row['teacher']['seconds']:.0f}",
            size(row["task_bytes"]),
        ]
        rows.append((row["category"].removesuffix(" tuning"), cells))
    count = len(table["seeds"])
    seeds = f"{count} seeds (mean ± standard deviation)" if count > 1 else "1 seed"
    view.table(
        f"{table['student']} on {table['data']}: accuracy in %, {table['epochs']} epochs, {seeds}",
        ["method", "trained", "labels only", "with teacher", "gain", "seconds", "to keep"],
        view.grouped(rows),
        right=(1, 2, 3, 4, 5, 6),
    )
    for teacher in (table["teacher"], *table["more_teachers"]):
        accuracy = "" if teacher["accuracy"] is None else f", accuracy {teacher['accuracy']:.1%}"
        view.line(f"teacher: {teacher['model']} (head: {teacher['head']}){accuracy}")
    view.line(f"table: {table['output']}/compare.json; every cell is a run directory beside it")
