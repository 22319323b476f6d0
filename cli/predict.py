"""``remap predict``: classes of images."""

from pathlib import Path
from typing import Annotated

import typer

from remap_cli import console, launch
from remap_cli import options as opt


def predict(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    images: Annotated[list[str], typer.Argument(help="Image files or folders.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 64,
    json: opt.Json = False,
) -> None:
    """Predict the class of each image. Unreadable files are reported; the exit code is then 2."""
    if not launch.is_first():  # the images are not divided among processes
        return
    from remap.data.image_files import counted
    from remap.pipeline.predict import image_files
    from remap.pipeline.predict import predict as predictions
    from remap.pipeline.student_api import load_student

    with console.Reporter() as progress:
        paths, left_out = image_files(images)
        if left_out:
            progress.say(f"left out {len(left_out)} other file(s): {counted(left_out)}")
        student = load_student(run)
        found = list(predictions(student, paths, top=top, batch_size=batch_size, progress=progress))
    if json:
        console.emit(
            [
                {"path": p.path, "top": [{"class": c, "probability": q} for c, q in p.top], "error": p.error or None}
                for p in found
            ]
        )
    else:
        rows = [[p.path, ", ".join(f"{c} {q:.1%}" for c, q in p.top) or f"cannot be read: {p.error}"] for p in found]
        console.table(f"{len(found)} image(s)", ["image", "class"], rows, wrap=(0, 1))
    if any(p.error for p in found):
        raise typer.Exit(2)
