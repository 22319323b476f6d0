"""``remap remappings``. It needs no torch."""

from operator import itemgetter
from typing import Annotated

import typer

from remap.registry import Registry
from remap_cli import console
from remap_cli import options as opt
from remap_cli.listings import ABOUT, Columns, Row, arxiv, list_rows, show_row


def remappings(
    name: Annotated[str, typer.Argument(help="One of them: show it with its options.")] = "", json: opt.Json = False
) -> None:
    """List how a student gets its weights or its architecture from the teacher (category 5), or show one."""
    from remap.remapping.architecture import ARCHITECTURES
    from remap.remapping.entries import RemappingEntry
    from remap.remapping.weights import INITS

    fields = ("name", "category", "summary", "paper", "needs", "mismatch")
    table = Registry[RemappingEntry]("remapping", "remappings", [*INITS, *ARCHITECTURES])
    rows = [{field: getattr(row, field) for field in fields} for row in table]
    if name:
        _remapping(rows[table.names.index(table.row(name).name)], json)
        return
    if json:
        console.emit(rows)
        return
    columns: Columns = {"name": itemgetter("name"), **ABOUT, "arXiv": arxiv}
    list_rows("Remapping weights and architecture", rows, columns, wrap=tuple(ABOUT))
    console.line("Knowledge is carried over by losses: remap losses. All about one: remap remappings NAME.")


def _remapping(row: Row, json: bool) -> None:
    """Show one way to start from the teacher, with every option."""
    from remap.recipe.option_listing import listed, rows_of_config
    from remap.remapping.architecture.shrink_options import ShrinkSpec
    from remap.remapping.weights import INITS
    from remap.tuning import METHODS

    name = row["name"]
    if name == "shrink":
        options, section = rows_of_config(ShrinkSpec), "student.shrink"
    elif name in INITS:
        options, section = listed(INITS, name)["options"], "student.init"
    else:
        options, section = listed(METHODS, name)["options"], "method"
    show_row(row, {"needs": row["needs"], "models differ": row["mismatch"]}, options, section, json)
