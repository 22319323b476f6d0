"""``remap report``: one page about a run or a comparison."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from remap_cli import console


def report(
    folder: Annotated[Path, typer.Argument(help="A run directory, or the folder of a comparison.", show_default=False)],
) -> None:
    """Write report.html about a finished run or comparison: one file that opens anywhere."""
    console.line(f"report: {write(folder)}")


def write(folder: Path, *, pngs: bool = True) -> Path:
    """Write the report of a run or comparison; return its path."""
    from remap.errors import RunError
    from remap.io.names import plain
    from remap.io.paths import expanded
    from remap.pipeline.comparison_folder import MARKER, RECOMMENDATION, command_of
    from remap.report.compare_report import RECORD, report_comparison
    from remap.report.run_report import report_run
    from remap.runs.run_dir import RunDir

    folder = expanded(folder)
    if not (folder / "recipe.yaml").is_file() and (folder / RECORD).is_file():
        return report_comparison(folder, pngs=pngs)
    if not (folder / "recipe.yaml").is_file() and (inside := min(folder.glob(f"*/{RECORD}"), default=None)):
        do = f"name a comparison in it, such as {shlex.quote(plain(str(inside.parent)))}"
        raise RunError(f"{plain(str(folder))} is a folder of comparisons, of which each has its report", do=do)
    if not (folder / "recipe.yaml").is_file() and (folder / RECOMMENDATION).is_file():
        what = f"{plain(str(folder))} holds a recommendation, which has no report"
        raise RunError(what, do=f"read {RECOMMENDATION} there, or compare the methods that it names: remap compare")
    if not (folder / "recipe.yaml").is_file() and (folder / MARKER).is_file():
        what = f"the comparison in {plain(str(folder))} has not finished"
        raise RunError(what, do=f"run its command again: {command_of(folder)}")
    return report_run(RunDir.open(folder), pngs=pngs)


def write_at_end(folder: Path, progress: console.Reporter) -> None:
    """Write the report of what has just ended, without PNG files, which take the longest; what fails is said."""
    from remap.errors import RemapError

    try:
        with progress.wait("writing the report"):
            path = write(folder, pngs=False)
        progress.say(f"report: {path}")
    except RemapError as error:
        progress.say(f"there is no report: {error.what}")
