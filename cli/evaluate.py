"""``remap eval``: evaluate a finished run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from remap.data import CLASSES, METRIC
from remap.io.paths import expanded
from remap.runs.interval import in_words
from remap.runs.summary_schema import metrics_in_words
from remap_cli import console, launch
from remap_cli import options as opt


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    data: Annotated[
        str | None, typer.Option(help="Other images with the same class names; by default the run's own split.")
    ] = None,
    skip_bad: opt.SkipBad = False,
    devices: opt.Devices = None,
    json: opt.Json = False,
) -> None:
    """Evaluate a finished run. On its own split this gives exactly the reported accuracy."""
    opt.require_there(run)
    launch.start_processes(devices)
    from remap.distributed.launch import check_processes
    from remap.pipeline.evaluate_run import evaluate_run

    with console.Reporter(quiet=not launch.is_first()) as progress:
        check_processes(devices)
        found = evaluate_run(run, data, skip_bad, progress)
    if launch.is_first():
        console.emit(found) if json else _show(run, found)


def _show(run: Path, found: dict[str, Any]) -> None:
    from remap.runs.run_dir import RunDir  # imports pydantic, which --help needs not

    rows = [
        [r["class"], f"{r['images']:,}", "-" if r["accuracy"] is None else f"{r['accuracy']:.1%}"]
        for r in found["classes"]
    ]
    rows.append(["all", f"{found['images']:,}", in_words(found["accuracy"], *found["interval"])])
    name = found["metric"] if found["metric"] == METRIC[CLASSES] else "average precision"
    console.table(f"{run} on {found['data']}", ["class", "images", name], rows, right=(1, 2))
    metrics = metrics_in_words(found["metrics"], len(found["classes"]))
    console.line(", ".join(f"{words} {value:.1%}" for words, value in metrics.items()))
    if any(not row["images"] for row in found["classes"]) and "sessions" in RunDir(expanded(run)).summary():
        console.note(
            "these are the images of the last session; those of earlier sessions are counted in the run's report and in"
            " summary.json (sessions), and --data FOLDER evaluates others"
        )
    for name, reason in found["skipped"]:
        console.note(f"skipped: {name} ({reason})")
