"""``remap adapt``: a finished run meets another domain."""

from pathlib import Path
from typing import Annotated, Any

import typer

from remap.runs.summary_schema import measured_of
from remap_cli import console
from remap_cli import options as opt


def adapt(
    run: Annotated[Path, typer.Argument(help="A run directory; it stays as it is.", show_default=False)],
    target: Annotated[
        str, typer.Option(help="Folder or tar of images of the other domain, without labels.", show_default=False)
    ],
    by: Annotated[
        str, typer.Option(help="shot trains what the method tuned; statistics are those of batch norms.")
    ] = "shot",
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images.", show_default="15")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per update.")] = 64,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default="a tenth of the run's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Decides every random choice.", show_default="0")] = None,
    val_data: Annotated[
        str | None, typer.Option(help="Labelled images of the other domain, to say what it brought.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run directory to make.", show_default="runs/RUN-adapted-001")
    ] = None,
    json: opt.Json = False,
) -> None:
    """Adapt a finished run to images of another domain, by these alone: no labels, and not the images of the run.

    [dim]remap adapt runs/photos-lora-001 --target new_camera/[/dim]
    """
    opt.require_there(run)
    with console.Reporter() as progress:
        with progress.wait("loading PyTorch"):
            from remap.pipeline.adapt import adapt as adapt_run
        options: dict[str, Any] = {
            "by": by,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "val_data": val_data,
        }
        found = adapt_run(run, target, output=output, progress=progress, **options)
    if json:
        console.emit(found)
        return
    data, student = found["data"], found["student"]
    rows = [["images", f"{data['train_images']:,}"], ["run directory", found["run_dir"]]]
    if student["accuracy"] is not None:
        before, after = (str(measured_of(found, student, key)) for key in ("initial_accuracy", "accuracy"))
        rows = [["accuracy before", before], ["accuracy after", after], *rows]
    console.table(f"{run} adapted to {target}", ["", by], rows)
