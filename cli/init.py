"""``remap init``: a recipe to begin with."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from remap.data import CLASSES, MULTILABEL
from remap_cli import console
from remap_cli import options as opt


def init(
    source: Annotated[str, typer.Argument(help="Folder of class folders, tar, zip or CSV.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    depth: Annotated[int | None, typer.Option(min=1, help="Level of the folders that are the classes.")] = None,
    multilabel: opt.Multilabel = False,
) -> None:
    """Look at your images and this machine, and write a commented recipe that `remap distill` runs."""
    from remap.inspection.suggest import init_recipe

    with console.Reporter() as progress:
        recipe = init_recipe(source, output, MULTILABEL if multilabel else CLASSES, progress, depth)
    console.line(f"{output}: {recipe.teachers[0].model} teaches {recipe.student.model}, {recipe.method.name}")
    levels = "" if depth is None else f" --depth {depth}"
    several = " --multilabel" if multilabel else ""
    console.line(
        f"next: remap data check {shlex.quote(source)}{levels}{several} (reads every image)  "
        f" remap distill --recipe {shlex.quote(str(output))}"
    )
