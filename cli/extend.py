"""``remap extend``: a finished run learns new classes, or a new look of its classes."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap.errors import RecipeError
from remap.io.human_size import number_of, size
from remap_cli import console, report
from remap_cli import options as opt

if TYPE_CHECKING:
    from remap.pipeline.session_advice import Advice, Situation

# Letters of class names in a cell of a table.
_WIDEST = 40
_HOW = "ranpac, prototypes, lwf, finetune (the lower bound), or the run's method (ease, l2p ...); see --explain."


def extend(
    run: Annotated[Path, typer.Argument(help="A finished run directory; it stays as it is.", show_default=False)],
    data: Annotated[str, typer.Option(help="The new images, as for `remap tune`.", show_default=False)],
    val_data: Annotated[str | None, typer.Option(help="Separate folder or tar of them to evaluate on.")] = None,
    only: Annotated[str | None, typer.Option(help="Classes of --data to learn, with commas; all by default.")] = None,
    how: Annotated[str | None, typer.Option(help=_HOW, show_default="the first that fits")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which way fits, and why; train nothing.")] = False,
    memory: Annotated[
        int, typer.Option(min=0, help="Old images of each class to learn from as well, of lwf and finetune.")
    ] = 0,
    choose: Annotated[
        str | None, typer.Option(help="How these are chosen: herding or random.", show_default="herding")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of ways that take steps.", show_default="the run's")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate, of ways that take steps.", show_default="the run's")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides every random choice.", show_default="the run's")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any recipe field. Repeatable.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run directory to make.", show_default="runs/NAME-001")] = None,
    json: opt.Json = False,
) -> None:
    """Let a run learn new classes, or new images of its classes, and keep what it knew, without its old images.

    [dim]remap extend runs/birds-lora-001 --data new_birds --explain[/dim]
    """
    from remap.recipe.problems import checked
    from remap.recipe.schema import DataSpec

    idle = {"how": how, "choose": choose, "epochs": epochs, "lr": lr, "seed": seed, "output": output}
    if explain and (named := [f"--{name}" for name, value in idle.items() if value is not None]):
        raise RecipeError([f"--explain trains nothing (leave {', '.join(named)} out)"], "extend")
    given = {"source": data, "val_source": val_data, "only": only}
    spec = checked(DataSpec, {name: value for name, value in given.items() if value is not None}, "extend")
    opt.require_there(run)
    with console.Reporter() as progress:
        with progress.wait("loading PyTorch"):
            from remap.pipeline.extend import data_of
            from remap.pipeline.extend import extend as extend_run
            from remap.pipeline.session_advice import situation
        if explain:
            found = situation(run, data_of(spec, settings or ())[0])
            advice = found.advice(memory=memory > 0)
            ways = [vars(one) for one in advice]
            console.emit({"situation": found.text, "ways": ways}) if json else _explain(found, advice)
            return
        if choose not in (None, "herding", "random"):
            raise RecipeError([f"--choose: unknown word '{choose}' (allowed: herding, random)"], "extend")
        options = {"how": how, "memory": memory, "choose": choose, "settings": settings or (), "output": output}
        words: dict[str, Any] = {**options, "epochs": epochs, "lr": lr, "seed": seed}
        summary = extend_run(run, spec, progress=progress, **words).summary
    console.emit(dict(summary)) if json else show_sessions(summary)
    with console.Reporter() as progress:
        report.write_at_end(Path(summary["run_dir"]), progress)


def _explain(found: "Situation", advice: "list[Advice]") -> None:
    console.line(found.text)
    rows = [["yes" if one.fits else "no", one.way, one.why] for one in advice]
    console.table("ways to extend it, the first that fits first", ["fits", "--how", "why"], rows, wrap=(2,))
    run = shlex.quote(str(found.old.run.path))
    console.line(
        "If the task of each image is known when it is predicted, tune a run of its own on the same backbone and keep"
        f" both, each bit for bit as it was: remap tasks add SHELF old={run} new=RUN"
    )


def _some(names: list[str]) -> str:
    """Return the first names, as many as a cell of a table holds, and how many others there are."""
    shown = next(n for n in range(len(names), -1, -1) if len(", ".join(names[:n])) <= _WIDEST or n <= 1)
    more = f" and {len(names) - shown} more" if shown < len(names) else ""
    return ", ".join(names[:shown]) + more


def show_sessions(summary: "dict[str, Any] | Any") -> None:
    """Print what the student answers on the images of each session."""
    found = summary["sessions"]
    share = lambda value: "-" if value is None else f"{value:.1%}"  # noqa: E731
    last = found["accuracy"][-1]
    rows = [
        [number, _some(one["classes"]) or "the same", one["images"] or "-", share(right), size(one["bytes"])]
        for number, (one, right) in enumerate(zip(found["sessions"], last, strict=True), 1)
    ]
    columns = ["session", "new classes", "images", "accuracy", "saved size"]
    console.table(f"{summary['run_dir']}: each session's images now", columns, rows, right=(2, 3, 4), wrap=(1,))
    names = ("last", "average", "forgetting", "overall")
    unknown = last.count(None)
    without = f" (without {number_of(unknown, 'session')} that could not be measured)" if unknown else ""
    console.line(", ".join(f"{name} {share(found[name])}" for name in names if found[name] is not None) + without)
    run = shlex.quote(summary["run_dir"])
    console.line(f"{console.duration(summary['seconds'])} in all. next: remap predict {run} IMAGES...")
