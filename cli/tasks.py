"""``remap tasks``: many tasks on one backbone in one folder, a shelf."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remap.errors import RecipeError
from remap.io.human_size import size
from remap_cli import console
from remap_cli import options as opt

if TYPE_CHECKING:
    from remap.tasks.shelf import Shelf, ShelfRow

tasks = typer.Typer(help="Keep many tasks on one backbone in a folder.", no_args_is_help=True)
ShelfPath = Annotated[Path, typer.Argument(metavar="SHELF", help="Folder of the tasks.", show_default=False)]


def _open(path: Path) -> "Shelf":
    from remap.tasks.shelf import Shelf

    return Shelf(path)


@tasks.command()
def add(
    shelf: ShelfPath,
    runs: Annotated[list[str], typer.Argument(metavar="NAME=RUN", help="Tasks to add.", show_default=False)],
) -> None:
    """Add finished runs; the first one brings the backbone. Runs that are there do not change."""
    from remap.tasks.shelf import Shelf

    named = [run.partition("=") for run in runs]
    wrong = [f"a task is given as NAME=RUN, got {''.join(task)!r}" for task in named if not all(task)]
    paths = {name: path for name, _, path in named}
    if len(paths) < len(named):
        wrong.append("a name is given twice")
    if wrong:
        raise RecipeError(wrong, "command line")
    Shelf.with_tasks(shelf, paths)
    _show(shelf, _open(shelf).rows())


@tasks.command("ls")
def list_tasks(shelf: ShelfPath, json: opt.Json = False) -> None:
    """List the tasks; `remap predict SHELF` uses the one with a star."""
    rows = _open(shelf).rows()
    console.emit([vars(row) for row in rows]) if json else _show(shelf, rows)


@tasks.command()
def switch(shelf: ShelfPath, name: Annotated[str, typer.Argument(help="A task.", show_default=False)]) -> None:
    """Make a task the one that `remap predict SHELF` uses."""
    _open(shelf).switch(name)
    console.line(f"{shelf} predicts {name}")


@tasks.command()
def remove(
    shelf: ShelfPath,
    name: Annotated[str, typer.Argument(help="A task.", show_default=False)],
    yes: opt.Yes = False,
) -> None:
    """Remove a task and its files from the shelf; the run that it was added from stays."""
    found = _open(shelf)
    found.folder(name)  # refuses an unknown one before it asks
    if not yes:
        console.confirm(f"Remove the task {name} from {shelf}?")
    found.remove(name)
    _show(shelf, _open(shelf).rows())


@tasks.command()
def verify(
    shelf: Annotated[
        Path, typer.Argument(metavar="SHELF", help="A shelf, or a run that extends others.", show_default=False)
    ],
    json: opt.Json = False,
) -> None:
    """Compare every file with the hash it was added with; exit code 2 where one differs.

    Of a run that extends others: whether the features of each session, or its answers to images that get its own set of
    parts, are still the same bits, and the drop of its accuracy.
    """
    from remap.tasks.shelf import Shelf

    if (shelf / "recipe.yaml").is_file() and not Shelf.is_at(shelf):
        return _verify_sessions(shelf, json)
    rows = _open(shelf).verify()
    console.emit([vars(row) for row in rows]) if json else _show(shelf, rows, verified=True)
    if any(row.problem for row in rows):
        raise typer.Exit(2)


def _verify_sessions(run: Path, json: bool) -> None:
    from remap.tasks.sessions import verify_sessions

    rows = verify_sessions(run)
    if json:
        console.emit([{**vars(row), "drop": row.drop} for row in rows])
    else:
        cells = [
            [
                *(number, row.classes),
                *("bit for bit" if same else "changed" for same in (row.same_features, row.same_answers)),
                *("-" if share is None else f"{share:.1%}" for share in (row.then, row.now, row.drop)),
                row.problem or "as written",
            ]
            for number, row in enumerate(rows, 1)
        ]
        columns = ["session", "classes", "features", "its answers", "then", "now", "drop", "files"]
        console.table(f"the sessions of {run}", columns, cells, right=(1, 4, 5, 6), wrap=(7,))
    if any(row.problem for row in rows):
        raise typer.Exit(2)


@tasks.command()
def export(
    shelf: ShelfPath,
    output: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    task: Annotated[
        list[str] | None, typer.Option(help="A task to take; all where none is named.", show_default=False)
    ] = None,
    input: Annotated[str, typer.Option(help="float (normalised), or uint8: normalisation is inside.")] = "float",
    layout: Annotated[str, typer.Option(help="Axes of the input: nchw or nhwc.")] = "nchw",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export of that name.")] = False,
) -> None:
    """Export tasks as one ONNX file with an output for each; the backbone is in it once."""
    from remap.io.paths import expanded
    from remap.tasks.one_file import FILE, export_tasks

    output = expanded(output)
    with console.Reporter() as progress:
        found = export_tasks(
            shelf, output, tasks=task or (), force=force, progress=progress, input=input, layout=layout
        )
    rows = [[name, f"{one.difference:.1e}", f"{one.seconds[1] * 1000:.2f}"] for name, one in found.items()]
    console.table(f"{shelf} as onnx", ["task", "largest difference", "ms an image, one thread"], rows, right=(1, 2))
    console.line(f"written: {output / FILE}, {size((output / FILE).stat().st_size)}; README.md says how to use it")


def _show(shelf: Path, rows: "list[ShelfRow]", *, verified: bool = False) -> None:
    cells = [
        ["*" if r.current else "", r.name, r.method, r.classes or "", size(r.bytes), r.problem or "as added" * verified]
        for r in rows
    ]
    console.table(str(shelf), ["", "task", "method", "classes", "size", ""], cells, right=(3, 4), wrap=(5,))
