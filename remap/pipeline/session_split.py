"""How ``remap compare --sessions`` divides one data set: by classes, or by folders of looks."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from remap.data.image_files import is_leftover
from remap.errors import RecipeError
from remap.io.paths import absolute, expanded
from remap.pipeline.shared import SharedResources
from remap.recipe.schema import DataSpec

FOLDERS = "folders"


def parts_of(data: DataSpec, split: str, shared: SharedResources) -> list[DataSpec]:
    """Return the images of each session."""
    if split != FOLDERS:
        groups = groups_of(split, shared.index(data).classes)
        return [data.model_copy(update={"only": tuple(names)}) for names in groups]
    root = expanded(data.source or "")
    found = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    # Systems make folders too (@eaDir, lost+found), which are not sessions. Sorted, since a file system lists in any
    # order, and that of the sessions decides what is forgotten.
    folders = sorted(path for path in found if not is_leftover(path.name))
    if len(folders) < 2 or data.val_source is not None:
        problem = f"--sessions: folders needs a folder of two or more, and no --val-data (given {data.source})"
        raise RecipeError([problem], "compare")
    return [data.model_copy(update={"source": absolute(str(path))}) for path in folders]


def groups_of(split: str, classes: Sequence[str]) -> list[list[str]]:
    """Return the classes of each session, as even as they can be where a number is given.

    Raises:
        RecipeError: There are too few classes, or a class is unknown or missing.
    """
    if split.isdecimal():
        count = int(split)
        if not 2 <= count <= len(classes) // 2:
            allowed = f"2 to {len(classes) // 2}, each of two classes or more"
            raise RecipeError(
                [f"--sessions: {count} sessions of {len(classes)} classes (allowed: {allowed})"], "compare"
            )
        ends = [round(number * len(classes) / count) for number in range(count + 1)]
        return [list(classes[first:last]) for first, last in pairwise(ends)]
    groups = [[name.strip() for name in group.split(",")] for group in split.split("/")]
    # The first session is a run by itself, whose classifier needs two classes.
    if sorted(name for group in groups for name in group) != sorted(classes) or len(groups) < 2 or len(groups[0]) < 2:
        raise RecipeError(
            [f"--sessions: '{split}' is not a number or each of the {len(classes)} classes once, as in a,b/c,d"],
            "compare",
        )
    return groups


def name_of(data: DataSpec) -> list[str]:
    """Return what a session is called: its classes, or the folder of its look."""
    return list(data.only or [Path(data.source or "").name])
