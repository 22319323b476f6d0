"""``remap cache``: outputs of teachers and tuned teachers on disk. Listing and clearing need no torch."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remap.io.human_size import number_of, size
from remap_cli import console, launch
from remap_cli import options as opt
from remap_cli.options import BUILD, training_command
from remap_cli.training import read_recipe

if TYPE_CHECKING:
    from remap.cache.cache_listing import Cache, CachedOutput

cache = typer.Typer(help="List, build and clear cached outputs of teachers, and tuned teachers.", no_args_is_help=True)


@cache.command("ls")
def cache_ls(json: opt.Json = False) -> None:
    """List what is cached: of which teacher and view, what in how many rows (a view of an image each), and when."""
    from remap.cache.cache_folders import cache_root
    from remap.cache.cache_listing import list_caches

    root = cache_root()
    found = list_caches(root)
    _say_damaged(root)
    if json:
        console.emit([row.to_dict() for row in found])
        return
    if not found:
        console.line(f"No teachers are cached in {root.parent}.")
        return
    total = size(sum(row.bytes for row in found))
    console.table(
        f"{number_of(len(found), 'teacher cache')} in {root.parent}: {total}",
        ["id", "teacher", "view", "cached", "rows", "size", "used"],
        [
            [
                row.id[:8],
                row.key.get("teacher", "-"),
                _view(row.key),
                ", ".join(map(_item, row.outputs)) or _prepared(row.key) or "-",
                f"{row.images:,}" if row.outputs else "-",
                size(row.bytes),
                _ago(row.last_used),
            ]
            for row in found
        ],
        right=(4, 5, 6),
        wrap=(1, 2, 3),
    )


def _say_damaged(root: Path) -> None:
    from remap.cache.cache_folders import damaged_folders, prepared_root

    for folder in (*damaged_folders(root), *damaged_folders(prepared_root(root))):
        console.note(f"damaged, neither listed nor cleared: delete it yourself with rm -r {shlex.quote(str(folder))}")


def _view(key: dict[str, Any]) -> str:
    """Return the part of the view that tells caches apart; ``--json`` has all of it."""
    seen = key.get("view")
    seen = seen if isinstance(seen, dict) else {}
    size, augmented = seen.get("size"), seen.get("augment")
    augmented = "+".join(augmented) if isinstance(augmented, dict) else augmented
    precision = "precision auto" if key.get("precision") == "auto" else key.get("precision")
    parts = (size and f"{size} px", augmented != "none" and augmented, precision)
    return ", ".join(str(part) for part in parts if part) or "-"


def _prepared(key: dict[str, Any]) -> str:
    """Return how a teacher was given its head, on which images, or how many texts there are; empty for outputs."""
    if "texts" in key:
        return f"sets of texts: {key['texts']}"
    made = "fitted" if key.get("method") == "probe" else "tuned"
    # Teachers tuned for different runs differ in these digests alone.
    digests = [f"{name} {str(key[name])[:8]}" for name in ("images", "recipe") if name in key]
    return ", ".join([f"{made}: {key['method']}", *digests]) if "method" in key else ""


def _item(item: "CachedOutput") -> str:
    shape = "x".join(map(str, item.shape)) or "1"
    return f"{item.name} ({f'top {item.top_k} of ' if item.top_k else ''}{shape} {item.dtype})"


def _ago(then: float) -> str:
    days = (time.time() - then) / 86400
    return "today" if days < 1 else f"{days:.0f} d ago"


@cache.command("clear")
def cache_clear(
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Beginnings of ids as shown by `remap cache ls`.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Clear every cache.")] = False,
    older_than: Annotated[float | None, typer.Option(min=0, help="Those unused for this many days.")] = None,
    yes: opt.Yes = False,
    json: opt.Json = False,
) -> None:
    """Delete cached outputs and tuned teachers. Those that a running command uses are left."""
    from remap.cache.cache_folders import cache_root
    from remap.cache.cache_listing import chosen_caches, clear

    root = cache_root()
    _say_damaged(root)
    chosen = chosen_caches(root, keys or (), everything=everything, older_than_days=older_than)
    if chosen and not yes:
        _confirm(chosen)
    cleared = clear(chosen)
    if json:
        console.emit(
            {
                "removed": [row.to_dict() for row in cleared.removed],
                "in_use": [row.to_dict() for row in cleared.in_use],
                "bytes": cleared.bytes,
            }
        )
    else:
        console.line(f"{number_of(len(cleared.removed), 'teacher cache')} cleared, {size(cleared.bytes)}.")
    for row in cleared.in_use:
        console.note(f"not cleared, because a running command uses it: {row.id[:8]} ({row.key.get('teacher', '-')})")


def _confirm(chosen: "list[Cache]") -> None:
    for row in chosen:
        what = _prepared(row.key) or number_of(row.images, "row")
        console.note(f"{row.id[:8]}  {row.key.get('teacher', '-')}, {what}, {size(row.bytes)}")
    console.confirm(f"Delete {number_of(len(chosen), 'teacher cache')}?")


@cache.command("build")
@training_command(BUILD)
def cache_build(values: dict[str, Any]) -> None:
    """Pre-compute the teacher outputs that `remap distill` with the same options needs.

    Can be interrupted and continued.
    """
    launch.start_processes(values["devices"])
    from remap.errors import Interrupted
    from remap.runs.environment import command

    with console.Reporter(quiet=not launch.is_first()) as progress:
        recipe = read_recipe(values, with_teacher=True)
        with progress.wait("loading PyTorch"):
            from remap.pipeline.build_cache import build_cache
            from remap.pipeline.objective import without_idle_losses
        recipe = without_idle_losses(recipe, progress)
        try:
            found = build_cache(recipe, progress)
        except Interrupted as error:
            do = f"what was computed is cached; continue with: {shlex.join(command())}"
            raise Interrupted(error.what, exit_code=error.exit_code, do=do, at_once=error.at_once) from error
    if launch.is_first():
        console.emit(found) if values["json"] else _show_built(found)


def _show_built(found: list[dict[str, Any]]) -> None:
    for one in found:
        console.table(
            f"Outputs of {one['teacher']}, cached on disk",
            ["output", "row", "size"],
            [[row["name"], "x".join(map(str, row["shape"])) or "1", size(row["bytes"])] for row in one["items"]],
            right=(1, 2),
            wrap=(0,),
        )
        console.line(
            f"{number_of(one['images'] // one['views'], 'image')} x {number_of(one['views'], 'view')},"
            f" {one['computed']:,} of {number_of(one['images'], 'row')} computed now in "
            f"{console.duration(one['seconds'])}; {size(one['bytes'])}\n{one['folder']}"
        )
    if not found:
        console.line("No loss uses the teacher: there is nothing to cache.")
