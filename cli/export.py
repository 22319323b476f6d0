"""``remap export``: a tuned student as files that other programs load."""

from pathlib import Path
from typing import Annotated, Any

import typer

from remap.exporting import FORMATS
from remap.io.human_size import size
from remap_cli import console, launch
from remap_cli import options as opt

_GRAPH, _INT8 = "Of onnx and torch", "8 bits, of onnx"


def _choice(help: str, panel: str, shown: str | None = None) -> Any:
    return typer.Option(help=help, rich_help_panel=panel, show_default=shown or False)


def export(
    run: Annotated[Path, typer.Argument(help="A run directory, or a copy of its task folder.", show_default=False)],
    to: Annotated[str, typer.Option(help=f"Format: {', '.join(FORMATS.names)}.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="RUN/export/FORMAT")] = None,
    input: Annotated[
        str, _choice("float (normalised), or uint8: resizing and normalisation are inside.", _GRAPH, "float")
    ] = "float",
    layout: Annotated[str, _choice("Axes of the input: nchw or nhwc.", _GRAPH, "nchw")] = "nchw",
    softmax: Annotated[
        bool, typer.Option("--softmax", help="Answer with probabilities.", rich_help_panel=_GRAPH)
    ] = False,
    int8: Annotated[
        str | None,
        _choice("dynamic; static: calibrated on training images of the run; qat: trained on them, then static.", _INT8),
    ] = None,
    int8_epochs: Annotated[int | None, _choice("Epochs of --int8 qat.", _INT8, "3")] = None,
    max_drop: Annotated[
        float | None, _choice("Points of accuracy that 8 bits may cost, over all and of the worst class.", _INT8, "1")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images of the run to check on at most.")] = 256,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export of that name.")] = False,
    json: opt.Json = False,
) -> None:
    """Export the student of a run, and check on images that the files answer as it does.

    [dim]remap export runs/photos-lora-001 --to onnx --input uint8[/dim]
    """
    opt.require_there(run)
    if not launch.is_first():
        return
    from remap.exporting.export import export_student

    chosen = dict(input=input, layout=layout, softmax=softmax, images=images)
    chosen |= dict(int8=int8, int8_epochs=int8_epochs, max_drop=max_drop)
    with console.Reporter() as progress:
        found = export_student(run, to, output, force=force, progress=progress, **chosen)
    if json:
        console.emit({"output": str(found.output), "file": str(found.file), **found.record})
        return
    if comparison := found.comparison:
        names = ("student", to if int8 is None else f"{to} int8 ({int8})")
        rows = [
            [name, size(count), f"{seconds * 1000:.2f}"]
            for name, count, seconds in zip(names, comparison.bytes, comparison.seconds, strict=True)
        ]
        console.table(f"{run} as {to}", ["", "size", "ms an image, one thread"], rows, right=(1, 2))
        console.line(
            f"checked on {comparison.images}: {comparison.same_labels} of {comparison.count} labels the same,"
            f" answers differ by at most {comparison.difference:.1e}"
        )
    if report := found.record.get("int8"):
        before, after = report["accuracy"]
        name, drop = report["worst_class"]
        console.line(f"accuracy {before:.2%} -> {after:.2%}; the worst class, {name}, loses {drop:.1f} points")
    how = "how to use it" if "classify.py" in found.record["files"] else "what it takes and gives"
    console.line(f"written: {found.file}; {found.output / 'README.md'} says {how}")
