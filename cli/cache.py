"""``remap cache``: teacher outputs kept on disk. Listing and clearing need no torch."""

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap.io.human_size import size
from remap_cli import launch, view
from remap_cli import options as opt
from remap_cli.main import app

if TYPE_CHECKING:
    from remap.cache.cache_listing import Cache, CachedOutput

cache = typer.Typer(help="Look at, build and clear kept teacher outputs.", no_args_is_help=True)
app.add_typer(cache, name="cache", rich_help_panel=opt.LOOK)


@cache.command("ls")
def cache_ls(json: opt.Json = False) -> None:
    """List what is kept: of which teacher and view, what for how many images, and when it was last used."""
    from remap.cache.cache_folders import cache_root
    from remap.cache.cache_listing import list_caches

    root = cache_root()
    found = list_caches(root)
    if json:
        view.emit([row.to_dict() for row in found])
        return
    if not found:
        view.line(f"No teacher outputs are kept in {root}.")
        return
    total = size(sum(row.bytes for row in found))
    view.table(
        f"{len(found)} teacher cache(s) in {root}: {total}",
        ["id", "teacher", "view", "kept", "images", "size", "used"],
        [
            [
                row.id[:8],
                row.key.get("teacher", "-"),
                _view(row.key),
                ", ".join(map(_item, row.outputs)) or "-",
                f"{row.images:,}",
                size(row.bytes),
                _ago(row.last_used),
            ]
            for row in found
        ],
        right=(4, 5, 6),
        wrap=(1, 2, 3),
    )


def _view(key: dict[str, Any]) -> str:
    """Of the view only what tells caches apart at a glance; ``--json`` has all of it."""
    seen = key.get("view")
    size = seen.get("size") if isinstance(seen, dict) else None
    return ", ".join(str(part) for part in (size and f"{size} px", key.get("precision")) if part) or "-"


def _item(item: "CachedOutput") -> str:
    shape = "x".join(map(str, item.shape)) or "1"
    return f"{item.name} ({f'top {item.top_k} of ' if item.top_k else ''}{shape} {item.dtype})"


def _ago(then: float) -> str:
    days = (time.time() - then) / 86400
    return "today" if days < 1 else f"{days:.0f} d ago"


@cache.command("clear")
def cache_clear(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Beginnings of ids, as `remap cache ls` shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    older_than: Annotated[float | None, typer.Option(min=0, help="Those unused for so many days.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: opt.Json = False,
) -> None:
    """Delete kept outputs. Those that a running command uses are left."""
    from remap.cache.cache_folders import cache_root
    from remap.cache.cache_listing import chosen_caches, clear

    root = cache_root()
    chosen = chosen_caches(root, keys or (), everything=everything, older_than_days=older_than)
    if chosen and not yes:
        _ask(chosen)
    cleared = clear(chosen)
    if json:
        view.emit(
            {
                "removed": [row.to_dict() for row in cleared.removed],
                "in_use": [row.to_dict() for row in cleared.in_use],
                "bytes": cleared.bytes,
            }
        )
    else:
        view.line(f"{len(cleared.removed)} teacher cache(s) cleared, {size(cleared.bytes)}.")
    for row in cleared.in_use:
        view.note(f"left, since a running command uses it: {row.id[:8]} ({row.key.get('teacher', '-')})")


def _ask(chosen: "list[Cache]") -> None:
    import sys

    from remap.errors import RemapError

    for row in chosen:
        view.note(f"{row.id[:8]}  {row.key.get('teacher', '-')}, {row.images:,} images, {size(row.bytes)}")
    if not sys.stdin.isatty():
        raise RemapError("clearing asks first, and there is nobody to answer", do="say it beforehand: --yes")
    typer.confirm(f"Delete {len(chosen)} teacher cache(s)?", abort=True, err=True)


@cache.command("build")
def cache_build(
    teacher: opt.Teacher = None,
    student: opt.Student = None,
    method: opt.Method = None,
    losses: opt.Losses = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    unlabeled: opt.Unlabeled = None,
    weights: opt.Weights = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = None,
    seed: opt.Seed = None,
    recipe: opt.RecipeWord = None,
    settings: opt.Settings = None,
    skip_bad: opt.SkipBad = False,
    devices: opt.Devices = None,
    json: opt.Json = False,
) -> None:
    """Compute beforehand what `remap distill` with the same words asks the teacher; goes on where it was stopped."""
    words = opt.words(locals())
    launch.processes(devices)
    from remap.errors import Interrupted
    from remap.pipeline.objective import without_idle_losses
    from remap.runs.environment import command
    from remap_cli.train import read_recipe

    with view.Reporter(quiet=not launch.is_first()) as progress:
        resolved = without_idle_losses(read_recipe(words, recipe, settings or [], with_teacher=True), progress)
        with progress.wait("loading PyTorch"):
            from remap.pipeline.build_cache import build_cache
        try:
            found = build_cache(resolved, progress)
        except Interrupted as error:
            do = f"what was computed is kept; go on with: {shlex.join(command())}"
            raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error
    if not launch.is_first():
        return
    if json:
        view.emit(found)
        return
    for one in found:
        view.table(
            f"Outputs of {one['teacher']}, kept on disk",
            ["output", "row", "size"],
            [[row["name"], "x".join(map(str, row["shape"])) or "1", size(row["bytes"])] for row in one["items"]],
            right=(1, 2),
            wrap=(0,),
        )
        view.line(
            f"{one['images']:,} images, {one['computed']:,} of them computed now in "
            f"{view.duration(one['seconds'])}; {size(one['bytes'])}\n{one['folder']}"
        )
    if not found:
        view.line("No loss listens to the teacher: there is nothing to keep.")
