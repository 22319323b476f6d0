"""Labelled images from a folder of class folders, with or without train, val and test; or from an archive of one."""

import os
import shlex
from pathlib import Path

from remap.data.file_listing import Listing
from remap.data.folder_layout import Layout, find_layout
from remap.data.image_files import Skipped, also_left_out, counted, is_leftover, why_left_out
from remap.data.images import SUFFIXES
from remap.data.labeled_files import BySplit, LabeledFiles, merged, table_hint
from remap.data.sources import PATHS, list_files
from remap.errors import DataError
from remap.io.human_size import number_of
from remap.io.names import plain, same_name

OUTSIDE = "lies outside the class folders"


class ClassFolders(LabeledFiles):
    """A class is a folder; see ``folder_layout`` for where the class folders are."""

    by_folders = True

    def recognises(self, path: Path) -> bool:
        return os.path.exists(path)

    def around(self, word: str) -> str:
        return find_layout(word, list_files(word, PATHS)).prefix

    def images(self, word: str) -> tuple[list[tuple[str, Listing]], Skipped]:
        listing = list_files(word, "a folder, a tar or a zip of images")
        reasons = {path: why_left_out(path) for path in listing.paths}
        skipped = [*listing.left_out, *((path, reason) for path, reason in reasons.items() if reason is not None)]
        return [(path, listing) for path, reason in reasons.items() if reason is None], skipped

    def read(self, word: str, depth: int | None) -> tuple[BySplit, Skipped]:
        listing = list_files(word, PATHS)
        layout = find_layout(word, listing)
        inside, level = listing.inside(layout.prefix), depth or 1
        splits: BySplit = {split: {} for split in layout.roots.values()}
        skipped = list(listing.left_out)
        levels: set[int] = set()
        for path in inside.paths:
            root, reason = layout.root_of(path), why_left_out(path)
            folders = path.removeprefix(root or "").split("/")[:-1]
            if root is None or reason is not None or len(folders) < level:
                skipped.append((plain(path), reason or OUTSIDE))
                continue
            levels.add(len(folders))
            splits[layout.roots[root]].setdefault("/".join(folders[:level]), []).append((path, inside))
        if layout.prefix:
            beside = (path for path in listing.paths if not path.startswith(layout.prefix))
            skipped += [(plain(path), why_left_out(path) or OUTSIDE) for path in beside]
        _require_images(word, inside, layout, splits, skipped, level)
        if depth is None and min(levels) > 1:
            raise _deeper(word, layout, splits, min(levels))
        return {split: merged(by_class) for split, by_class in splits.items()}, skipped


def _require_images(word: str, inside: Listing, layout: Layout, splits: BySplit, skipped: Skipped, level: int) -> None:
    if not any(splits.values()):
        images = [path for path in inside.paths if why_left_out(path) is None and layout.root_of(path) is not None]
        deep = max((path.removeprefix(layout.root_of(path) or "").count("/") for path in images), default=0)
        if 0 < deep < level:  # they are in class folders, of a lower level than is given
            raise DataError(
                f"no images {level} folders deep",
                given=f"{word}: {number_of(len(images), 'image')}, {number_of(deep, 'folder')} deep",
                do=f"add --set data.depth={deep} in place of {level} (remap data check and init: --depth {deep})",
            )
        raise DataError(
            "no images in class folders",
            given=f"{word} ({number_of(len(inside.paths), 'file')}{also_left_out(skipped)})",
            allowed=f"CLASS/NAME with one of {' '.join(SUFFIXES)}, also below train/ and val/",
            do=table_hint(word, skipped)
            or "put the images of each class into a folder of its name; images without labels are for"
            " `remap predict`, and for --unlabeled of `remap distill`",
        )
    names = {same_name(name) for by_class in splits.values() for name in by_class}
    empty: dict[str, str] = {}
    for folder in {*inside.folders, *(path.rpartition("/")[0] for path in inside.paths if "/" in path)}:
        root = layout.root_of(f"{folder}/")
        parts = f"{folder}/".removeprefix(root or "").split("/")[:-1][:level]
        name = "/".join(parts)
        if root is None or len(parts) < level or same_name(name) in names or any(map(is_leftover, parts)):
            continue
        files = [file for file in skipped if file[0].startswith(plain(f"{root}{name}/"))]
        empty[name] = plain(name) + (f" ({counted(files)})" if files else "")
    if empty:
        shown = ", ".join(empty[name] for name in sorted(empty)[:20])
        raise DataError("a class folder holds no images", given=shown, do="fill it, convert its files, or remove it")
    if not splits.get("train", True):
        raise DataError("the train folder holds no images", given=word + also_left_out(skipped))


def _deeper(word: str, layout: Layout, splits: BySplit, level: int) -> DataError:
    """Return the error for class folders that hold only folders."""
    by_class = splits.get("train") or next(filter(None, splits.values()))
    inner: dict[str, set[str]] = {}
    for name, files in by_class.items():
        below = (path.removeprefix(layout.root_of(path) or "").split("/") for path, _ in files)
        inner[name] = {"/".join(parts[1:level]) for parts in below}
    names = sorted(inner)
    deeper = [f"{name}/{below}" for name in names for below in sorted(inner[name])]
    do = (
        f"for {_some(deeper)} as classes add --set data.depth={level};"
        f" for {_some(names)} as classes add --set data.depth=1 (remap data check and init: --depth)"
    )
    if len(names) == 2 and set.intersection(*inner.values()):
        one, other = (shlex.quote(f"{word}/{name}") for name in names)
        do += f"; if these are splits, name them: --data {one} --val-data {other}"
    return DataError(
        f"the class folders hold sub-folders and no images themselves: the classes may lie {level} levels deep",
        given=f"{word} holds {', '.join(deeper[:5])}" + (" ..." if len(deeper) > 5 else ""),
        do=do,
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
