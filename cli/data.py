"""``remap data``: look at images before a run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remap.data import CLASSES, MULTILABEL
from remap.io.paths import expanded
from remap_cli import console
from remap_cli import options as opt

if TYPE_CHECKING:
    from remap.inspection.data_check import Report

data = typer.Typer(help="Look at images before a run.", no_args_is_help=True)
# Files that the table names of each finding.
SHOWN = 3


@data.callback()
def _root() -> None:
    """Keep `check` a sub-command although it is the only one."""


@data.command()
def check(
    source: Annotated[str, typer.Argument(help="Folder of class folders, tar, zip or CSV.", show_default=False)],
    html: Annotated[
        Path | None, typer.Option(help="Also write a page with images of every class.", show_default=False)
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Level of the folders that are the classes.")] = None,
    multilabel: opt.Multilabel = False,
    json: opt.Json = False,
) -> None:
    """Count images; find broken, copied, near-equal and odd ones; say what to do. Exit code 2 for serious findings."""
    from remap.inspection.contact_sheet import write_contact_sheet
    from remap.inspection.data_check import check_data

    with console.Reporter() as progress:
        report, images = check_data(source, depth, progress, task=MULTILABEL if multilabel else CLASSES)
    console.emit(report.to_dict()) if json else _show(report)
    if html is not None:  # afterwards: reading takes long, and what was found is not lost where this cannot be written
        write_contact_sheet(expanded(html), report, images)
        console.note(f"written: {html}")
    if any(finding.severity == "bad" for finding in report.findings):
        raise typer.Exit(2)


def _show(report: "Report") -> None:
    splits = list(report.counts)
    names = list(report.counts[splits[0]])
    rows = [[name, *(f"{report.counts[split].get(name, 0):,}" for split in splits)] for name in names]
    columns = tuple(range(1, len(splits) + 1))
    console.table(f"{report.source}: {report.split_rule}", ["class", *splits], rows, right=columns, wrap=(0,))
    sizes = (f"{word} {width} x {height}" for word, (width, height) in report.sizes.items())
    console.line(f"pixels: {', '.join(sizes)}")
    for finding in report.findings:
        console.line(f"\n{'!' if finding.severity == 'bad' else '-'} {finding.what}\n  do: {finding.do}")
        for name in finding.files[:SHOWN]:
            console.line(f"      {name}")
        if finding.count > SHOWN < len(finding.files):
            console.line(f"      and {finding.count - SHOWN} more (--json, --html)")
    if not report.findings:
        console.line("nothing odd was found")
