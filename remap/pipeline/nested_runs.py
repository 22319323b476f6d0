"""Runs inside another one: its teachers, trials and the student by labels alone."""

from pathlib import Path

from remap.distributed.launch import accelerator
from remap.io.links import require_no_link, require_no_links
from remap.recipe.schema import Recipe
from remap.runs.run_dir import RunDir


def open_or_create(folder: Path, recipe: Recipe) -> RunDir:
    """Return a run directory inside another one, made by the main process where it is not there yet."""
    if accelerator().is_main_process and not (folder / "recipe.yaml").exists():
        RunDir.create(folder, recipe)
    accelerator().wait_for_everyone()
    return RunDir(folder)


def require_unlinked(folder: Path) -> None:
    """Refuse links at and below the folder of a teacher, which may lie outside of the run directory."""
    require_no_link(folder)
    require_no_links(folder)
