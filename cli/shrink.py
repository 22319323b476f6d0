"""``remap shrink``: a smaller model cut from a larger one, as a folder that timm opens."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from remap.errors import RecipeError
from remap.io.paths import expanded
from remap_cli import console
from remap_cli import options as opt

_SHAPE, _CHOICE = "Shape", "How the parts that stay are chosen"


def _size(what: str) -> Any:
    return typer.Option(min=1, help=f"{what}.", show_default="the teacher's", rich_help_panel=_SHAPE)


def _choice(help: str, shown: str | None = None, least: int | None = None) -> Any:
    return typer.Option(min=least, help=help, show_default=shown or True, rich_help_panel=_CHOICE)


def shrink(
    teacher: Annotated[
        str, typer.Argument(help="Short name, timm name, local-dir:FOLDER or run directory.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Model folder to make.", show_default=False)],
    depth: Annotated[int | None, _size("Blocks")] = None,
    width: Annotated[int | None, _size("Channels; width / heads is the width of a head")] = None,
    heads: Annotated[int | None, _size("Attention heads of a block")] = None,
    mlp: Annotated[int | None, _size("Hidden units of an MLP")] = None,
    importance: Annotated[str | None, _choice("Of channels, heads and units: taylor or magnitude.", "taylor")] = None,
    blocks: Annotated[
        str | None, _choice("sensitivity (those whose removal changes least go) or uniform.", "sensitivity")
    ] = None,
    images: Annotated[int | None, _choice("Images to measure on.", "64", least=1)] = None,
    data: Annotated[str | None, _choice("Their source: a folder of class folders, a tar, or digits.", "digits")] = None,
    seed: Annotated[int | None, _choice("Decides which images.", "0", least=0)] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the teacher: pretrained or none.", show_default="pretrained")
    ] = None,
    gates: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="For a run of the method skip, instead of a shape: remove blocks whose gates are at or below this.",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Cut a student from a teacher: complete blocks, heads, MLP units and channels. The result is a folder for timm.

    [dim]remap shrink vit_large --depth 12 --width 512 --data FOLDER --output small[/dim]

    In a run the same is [bold]--student "shrink(teacher, depth=12, width=512)"[/bold].
    """
    options = dict(depth=depth, width=width, heads=heads, mlp=mlp, importance=importance, blocks=blocks, images=images)
    given = {name: value for name, value in options.items() if value is not None}
    output = expanded(output)
    if gates is not None:
        others = {"data": data, "seed": seed, "weights": weights}
        _take_out(teacher, output, gates, [*given, *(name for name in others if others[name] is not None)], json)
        return
    if not {"depth", "width", "heads", "mlp"} & set(given):
        what = "nothing is to be cut (give --depth, --width, --heads or --mlp; for a run of the method skip, --gates)"
        raise RecipeError([what], "command line")
    from remap.recipe.problems import checked
    from remap.recipe.schema import DataSpec, ShrinkSpec, TeacherSpec

    spec = checked(ShrinkSpec, given, "command line")
    of_images = [name for name, value in {"seed": seed, "data": data}.items() if value is not None]
    if idle := spec.idle_problems([*given, *of_images]):
        raise RecipeError([f"--{problem}" for problem in idle], "command line")
    data = data or "digits"
    source = checked(DataSpec, {"source": data}, "command line")
    larger = checked(TeacherSpec, {"model": teacher, "weights": weights or "pretrained"}, "command line")
    from remap.pipeline.shrink_student import cut
    from remap.runs.task import require_tuned

    require_tuned(teacher)
    with console.Reporter() as progress:
        found = cut(larger, spec, source, output, seed or 0, progress)
    if json:
        console.emit({"output": str(output), **found.to_dict()})
        return
    rows = [[word, getattr(found.before, word), getattr(found.after, word)] for word in vars(found.after)]
    rows.append(["parameters", *(console.count(number) for number in found.parameters)])
    rows.append(["multiply-adds", *(_multiply_adds(number) for number in found.macs)])
    console.table(f"{teacher} shrunk, without classifiers", ["", "before", "after"], rows, right=(1, 2))
    if len(found.kept) < found.before.depth:
        console.line(f"blocks that stay, counted from 0: {', '.join(map(str, found.kept))}")
    words = ["remap", "distill", "--teacher", teacher, "--student", f"local-dir:{output}", "--data", data]
    console.line(f"next: {shlex.join(words)}")


def _take_out(run: str, output: Path, gates: float, given: list[str], json: bool) -> None:
    from remap.pipeline.shrink_student import take_out_skipped
    from remap.runs.run_dir import RunDir

    if given:
        problems = [f"--{name}: --gates removes blocks of a run, and nothing else" for name in given]
        raise RecipeError(problems, "command line")
    with console.Reporter():
        kept, openness = take_out_skipped(expanded(run), output, gates)
    if json:
        console.emit({"output": str(output), "kept": kept, "gates": openness})
        return
    rows = [[index, f"{gate:.3f}", "kept" if index in kept else "removed"] for index, gate in enumerate(openness)]
    console.table(f"{len(kept)} of {len(openness)} blocks of {run} stay", ["block", "gate", ""], rows, right=(0, 1))
    words = ["remap", "tune", "--student", f"local-dir:{output}"]
    seen = RunDir.open(expanded(run)).recipe().data
    for flag, source in {"--data": seen.source, "--val-data": seen.val_source}.items():
        words += [flag, source] if source is not None else []
    console.line(f"next: {shlex.join(words)}")


def _multiply_adds(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"
