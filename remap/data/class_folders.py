"""Labelled images from a folder of class folders, with or without train, val and test; or from a tar of one."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from remap.data.file_listing import Listing, is_hidden, unwrapped, why_skipped
from remap.data.images import SUFFIXES
from remap.data.sources import Source, list_files, unknown_classes
from remap.data.splits import ImageData, Split, stratified
from remap.errors import DataError
from remap.io.names import name_problem, plain

# Folder names of the usual splits, as timm knows them.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
    "test": ("test", "testing"),
}
# Images of each class: {"ants": [("train/ants/1.png", what reads it), ...]}.
ByClass = dict[str, list[tuple[str, Callable[[str], bytes]]]]
Skipped = list[tuple[str, str]]


class ClassFolders(Source):
    """Split folders are used where there are any; otherwise a share of each class is held out."""

    def recognises(self, path: Path) -> bool:
        return os.path.exists(path)

    def open(self, word: str, val_source: str | None, val_fraction: float) -> ImageData:
        splits, skipped = _read(word)
        if val_source is not None:
            other, more = _read(val_source)
            val = next((other[name] for name in ("val", "test", "all") if other.get(name)), None)
            if val is None:
                raise DataError("no images to evaluate on", given=val_source)
            splits, skipped = {"train": splits.get("train") or splits.get("all", {}), "val": val}, skipped + more
        elif "val" not in splits and "test" in splits:
            splits = {"train": splits["train"], "val": splits["test"]}
        if "val" not in splits:
            return _hold_out(word, splits.get("all") or splits["train"], val_fraction, skipped)
        return _with_splits(word, splits, skipped)

    def read_all(self, word: str, classes: Sequence[str]) -> Split:
        together: ByClass = {}
        for by_class in _read(word)[0].values():
            for name, files in by_class.items():
                together.setdefault(name, []).extend(files)
        unknown = sorted(set(together) - set(classes))
        if unknown:
            raise unknown_classes(unknown, classes)
        return _split(together, classes)


def _read(word: str) -> tuple[dict[str, ByClass], Skipped]:
    """Return the images by split and class, under "all" without split folders; and the skipped files."""
    listing = unwrapped(
        list_files(word, "a folder of class folders, or a tar of one"),
        not_into=[name for names in SPLIT_FOLDERS.values() for name in names],
    )
    split_of = _split_folders(word, listing)
    splits: dict[str, ByClass] = {}
    skipped: Skipped = []
    for path in listing.paths:
        parts = path.split("/")
        if any(map(is_hidden, parts)):
            continue
        split = split_of.get(parts[0]) if split_of else "all"
        inner = parts[1:] if split_of else parts
        if split is None or len(inner) < 2:
            skipped.append((plain(path), "lies outside the class folders"))
        elif not path.lower().endswith(SUFFIXES):
            skipped.append((plain(path), why_skipped(path)))
        else:
            splits.setdefault(split, {}).setdefault(inner[0], []).append((path, listing.read))
    names = {name for by_class in splits.values() for name in by_class}
    _require_images(word, listing, split_of, splits, names)
    for name in names:
        _require_class_name(name)
    return splits, skipped


def _split_folders(word: str, listing: Listing) -> dict[str, str]:
    """Return the split of each top folder that holds one; nothing where no folder is to learn from."""
    tops = {path.split("/")[0] for path in listing.paths if "/" in path}
    split_of = {top: split for split, names in SPLIT_FOLDERS.items() for top in tops if top.lower() in names}
    if "train" in split_of.values():
        return split_of
    if split_of and len(split_of) == len({top for top in tops if not is_hidden(top)}):
        raise DataError(
            "there is no train folder",
            given=f"{word} has {', '.join(sorted(split_of))}",
            do="name the training images' folder with --data and the other with --val-data",
        )
    return {}  # classes may be called "test" or "val"


def _require_images(
    word: str, listing: Listing, split_of: dict[str, str], splits: dict[str, ByClass], names: set[str]
) -> None:
    if not splits:
        raise DataError(
            "no images in class folders",
            given=f"{word} ({len(listing.paths)} files)",
            allowed=f"CLASS/NAME with one of {' '.join(SUFFIXES)}, also below train/ and val/",
        )
    folders = [*listing.folders, *(path.rpartition("/")[0] for path in listing.paths if "/" in path)]
    parted = [folder.split("/") for folder in folders]
    if split_of:
        parted = [parts[1:] for parts in parted if parts[0] in split_of]
    empty = sorted({parts[0] for parts in parted if parts and not is_hidden(parts[0])} - names)
    if empty:
        raise DataError("a class folder holds no images", given=plain(", ".join(empty[:20])), do="fill it or remove it")
    if split_of and not splits.get("train"):
        raise DataError("the train folder holds no images", given=word)


def _require_class_name(name: str) -> None:
    """Class names go into task files, tables and reports, and are typed on command lines."""
    problem = name_problem(name) or ("more than 255 letters" if len(name) > 255 else None)
    if problem:
        raise DataError(f"a class folder's name has {problem}", given=plain(name)[:80], do="rename the folder")


def _split(by_class: ByClass, classes: Sequence[str]) -> Split:
    rows = [(name, read, label) for label, one in enumerate(classes) for name, read in by_class.get(one, [])]
    names = tuple(plain(name) for name, _, _ in rows)
    labels = np.asarray([label for _, _, label in rows], dtype=np.int64)
    return Split(names, labels, lambda index: rows[index][1](rows[index][0]))


def _require_classes(word: str, names: Iterable[str]) -> tuple[str, ...]:
    classes = tuple(sorted(names))
    if len(classes) < 2:
        raise DataError(
            "at least two classes are needed",
            given=f"{word} has {', '.join(classes) or 'none'}",
            do="name the folder whose sub-folders are the classes",
        )
    return classes


def _hold_out(word: str, by_class: ByClass, fraction: float, skipped: Skipped) -> ImageData:
    """Hold out a share of each class; which images is a function of their number alone."""
    classes = _require_classes(word, by_class)
    images = _split(by_class, classes)
    small = [classes[label] for label, count in enumerate(np.bincount(images.labels)) if count < 2]
    if small:
        raise DataError("a class needs two images at least, one to learn from and one to check", given=", ".join(small))
    first = len(images) - max(len(classes), round(len(images) * fraction))
    train, val = stratified(images.labels, max(first, len(classes)))
    rule = f"{fraction:.0%} of each class held out for evaluation"
    return ImageData(word, classes, images.take(train), images.take(val), skipped=tuple(skipped), split_rule=rule)


def _with_splits(word: str, splits: dict[str, ByClass], skipped: Skipped) -> ImageData:
    classes = _require_classes(word, splits["train"])
    for name in ("val", "test"):
        unknown = sorted(set(splits.get(name, {})) - set(classes))
        if unknown:
            raise DataError(
                f"classes in {name} that train lacks",
                given=", ".join(unknown[:10]),
                allowed=", ".join(classes[:20]),
                do=f"remove them from {name}, or add training images",
            )
    train, val = _split(splits["train"], classes), _split(splits["val"], classes)
    test = _split(splits["test"], classes) if splits.get("test") else None
    return ImageData(word, classes, train, val, test, tuple(skipped), "the source's own train and evaluation folders")
