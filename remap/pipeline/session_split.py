"""How ``remap compare --sessions`` divides one data set: by classes, or by folders of looks."""

import csv
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from remap.data.file_listing import list_folder
from remap.data.folder_layout import find_layout
from remap.data.image_files import is_leftover
from remap.errors import RecipeError
from remap.io import atomic_write
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
        most = len(classes) // 2
        if not 2 <= count <= most:
            allowed = f"2 to {most}, each of two classes or more"
            if most < 2:
                allowed = "from 4 classes on; or name the groups, the first of two classes or more: a,b/c"
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


def joint_data(data: DataSpec, parts: Sequence[DataSpec], table: Path, shared: SharedResources) -> DataSpec:
    """Return the images of all looks as those of one run: of the same classes and splits, which a table lists.

    As class folders one level deeper, a class of each look would be a class of its own.

    Args:
        table: The CSV to write.
    """
    root, file = absolute(data.source or ""), io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("path", "label", "split"))
    for part in parts:
        # What is held out to choose the epoch, the joint run holds out of all looks.
        images, folder = shared.index(part.model_copy(update={"selection": None})), Path(part.source or "")
        above = f"{folder.name}/{find_layout(str(folder), list_folder(folder)).prefix}"
        for name in ("train", "val", "test"):
            if (split := getattr(images, name)) is not None:
                labels = (images.classes[label] for label in split.labels)
                rows.writerows((above + path, label, name) for path, label in zip(split.names, labels, strict=True))
    atomic_write.make_folder(table.parent)
    atomic_write.write_text(table, file.getvalue())
    # What chooses among the images has chosen them.
    chosen = {**dict.fromkeys(("depth", "only", "subset", "labels", "per_class", "held_out")), "per_class_seed": 0}
    return data.model_copy(update={"source": f"csv:{absolute(str(table))},folder={root}", **chosen})


def name_of(data: DataSpec) -> list[str]:
    """Return what a session is called: its classes, or the folder of its look."""
    return list(data.only or [Path(data.source or "").name])
